"""Heartbeats: the node tells any coordinator that it lives, and learns layouts, keys and the cluster's id in return."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import HEARTBEAT_INTERVAL_S
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.endpoints import Endpoints
from holdfast_core.runtime.logs import Log
from holdfast_proto.v1.cluster_pb2 import HeartbeatRequest, HeartbeatResponse
from holdfast_proto.v1.cluster_pb2_grpc import ClusterServiceStub
from holdfast_proto.v1.common_pb2 import NodeStatus
from holdfast_storagenode.core import NodeCore

# Until the first layout has formed a node asks often: the whole cluster waits for it.
_WAITING_INTERVAL_S: Final = 0.2
_TIMEOUT_S: Final = 5.0

Send: TypeAlias = Callable[[HeartbeatRequest], Awaitable[HeartbeatResponse]]
"""Sends a heartbeat to any coordinator, within a deadline of its own."""


def heartbeats_over(endpoints: Endpoints) -> Send:
    """Return what sends heartbeats to the coordinators of `endpoints`."""

    async def send(request: HeartbeatRequest) -> HeartbeatResponse:
        return await endpoints.call(
            lambda channel: ClusterServiceStub(channel).Heartbeat, request, timeout_s=_TIMEOUT_S
        )

    return send


class Heartbeats:
    """Beats for one node until it is cancelled; one heartbeat is under way at a time."""

    def __init__(
        self,
        core: NodeCore,
        send: Send,
        *,
        incarnation: bytes,
        interval_s: float | None,
        status: Callable[[], Awaitable[NodeStatus]],
        clock: Clock,
        log: Log,
    ) -> None:
        """Prepare; `status` makes the node's status, `interval_s` bounds what the coordinator asks for."""
        self._core = core
        self._send = send
        self._incarnation = incarnation
        self._interval_s = interval_s
        self._status = status
        self._clock = clock
        self._log = log
        self._turn = asyncio.Lock()
        self._lease_id = 0
        self._joined = False
        self._trouble = ""

    async def run(self) -> None:
        """Beat until cancelled.

        Raises:
            HoldfastError: MISMATCH if the first coordinator that ever answers belongs to another cluster, or
                ALREADY_EXISTS if it knows another node of this name. Later such answers are only logged: a node with
                good blocks does not stop because somebody mistyped an address.
        """
        while True:
            await self._clock.sleep(await self._beat())

    async def fresh_epoch(self) -> int:
        """Return the collection epoch that a coordinator read after this call began; the store knows it by then.

        Raises:
            HoldfastError: what the coordinator answered, or UNREACHABLE.
        """
        response, _ = await self._exchange()
        return response.collection_epoch

    async def _beat(self) -> float:
        """Send one heartbeat and return the seconds until the next."""
        interval_s = HEARTBEAT_INTERVAL_S if self._interval_s is None else self._interval_s
        try:
            response, news = await self._exchange()
        except HoldfastError as error:
            self._note(error)
            return self._soon(interval_s)
        if news:
            # The coordinator waits to hear that this node knows the new layout.
            return 0.0
        asked_s = response.interval_ms / 1000 or interval_s
        return self._soon(asked_s if self._interval_s is None else min(self._interval_s, asked_s))

    async def _exchange(self) -> tuple[HeartbeatResponse, bool]:
        """Send one heartbeat and learn from the answer; return it, and whether it brought news."""
        async with self._turn:
            request = HeartbeatRequest(
                status=await self._status(),
                lease_id=self._lease_id,
                incarnation=self._incarnation,
                layout_revision=self._core.cluster.layout_revision,
            )
            response = await self._send(request)
            news = await self._core.learn(response)
        if news:
            cluster = self._core.cluster
            self._log.info(
                "cluster learnt",
                layout_epoch=cluster.layout_epoch,
                older_epochs=[] if cluster.living is None else [layout.epoch for layout in cluster.living.older],
                granted_epoch=0 if cluster.living is None else cluster.living.granted_epoch,
                keys=len(response.verifying_keys),
            )
        self._settle(response)
        return response, news

    def _soon(self, interval_s: float) -> float:
        return min(interval_s, _WAITING_INTERVAL_S) if self._core.cluster.living is None else interval_s

    def _settle(self, response: HeartbeatResponse) -> None:
        if self._lease_id and response.lease_id != self._lease_id:
            self._core.lapses += 1
        self._lease_id = response.lease_id
        if self._trouble or not self._joined:
            self._log.info("joined", cluster_id=response.cluster_id)
        self._joined, self._trouble = True, ""

    def _note(self, error: HoldfastError) -> None:
        """Log a change of trouble once; raise what only an operator can mend while the node has not joined."""
        if not self._joined and error.code in (ErrorCode.MISMATCH, ErrorCode.ALREADY_EXISTS):
            raise error
        if error.message != self._trouble:
            self._trouble = error.message
            self._log.warning("heartbeat failed", code=error.code.name, message=error.message)
