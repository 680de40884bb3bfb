"""Heartbeats: the node tells any coordinator that it lives, and learns layout, keys and the cluster's id in return."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import HEARTBEAT_INTERVAL_S
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.endpoints import Endpoints
from holdfast_core.runtime.logs import Log
from holdfast_proto.v1.cluster_pb2 import HeartbeatRequest, HeartbeatResponse
from holdfast_proto.v1.cluster_pb2_grpc import ClusterServiceStub
from holdfast_proto.v1.common_pb2 import NodeStatus

# Until the first layout has formed a node asks often: the whole cluster waits for it.
_WAITING_INTERVAL_S: Final = 0.2
_TIMEOUT_S: Final = 5.0


class Heartbeats:
    """Beats for one node until it is cancelled.

    `status` makes the node's status, `learn` takes a coordinator's answer and says whether it brought news, and
    `waiting` says whether the node still lacks a layout.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        *,
        incarnation: bytes,
        interval_s: float | None,
        status: Callable[[], Awaitable[NodeStatus]],
        learn: Callable[[HeartbeatResponse], Awaitable[bool]],
        waiting: Callable[[], bool],
        clock: Clock,
        log: Log,
    ) -> None:
        """Prepare; `interval_s` bounds what the coordinator asks for."""
        self._endpoints = endpoints
        self._incarnation = incarnation
        self._interval_s = interval_s
        self._status = status
        self._learn = learn
        self._waiting = waiting
        self._clock = clock
        self._log = log
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

    async def _beat(self) -> float:
        """Send one heartbeat and return the seconds until the next."""
        request = HeartbeatRequest(status=await self._status(), lease_id=self._lease_id, incarnation=self._incarnation)
        interval_s = HEARTBEAT_INTERVAL_S if self._interval_s is None else self._interval_s
        try:
            response = await self._endpoints.call(
                lambda channel: ClusterServiceStub(channel).Heartbeat, request, timeout_s=_TIMEOUT_S
            )
            news = await self._learn(response)
        except HoldfastError as error:
            self._note(error)
            return min(interval_s, _WAITING_INTERVAL_S) if self._waiting() else interval_s
        self._settle(response)
        if news:
            # The coordinator waits to hear that this node knows the new layout.
            return 0.0
        asked_s = response.interval_ms / 1000 or interval_s
        interval_s = asked_s if self._interval_s is None else min(self._interval_s, asked_s)
        return min(interval_s, _WAITING_INTERVAL_S) if self._waiting() else interval_s

    def _settle(self, response: HeartbeatResponse) -> None:
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
