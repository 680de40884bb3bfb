"""Connections to storage nodes, and what is known of how they answer.

One channel an address. The pool remembers which nodes failed a moment ago and which are busy, so that readers can ask
the owner that answers best first. It decides nothing about blocks: `reader`, `presence` and the SDK's writer do.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Final, cast

import grpc.aio

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import RPC_TIMEOUT_S
from holdfast_core.runtime.blocks.wire import GetAnswer, decode_get
from holdfast_core.runtime.channels import Channels
from holdfast_core.runtime.clock import Clock, SystemClock
from holdfast_core.runtime.options import TlsFiles
from holdfast_core.runtime.status import error_from_rpc
from holdfast_proto.v1.blocks_pb2 import GetBlocksRequest, HasBlocksRequest, HasBlocksResponse
from holdfast_proto.v1.common_pb2 import NodeStatus

CAPABILITY_KEY: Final = "holdfast-capability"
PENALTY_S: Final = 5.0
PENALTY_S_MAX: Final = 60.0
SLOW_FACT: Final = "slow"
"""Marks the error of a node that may still answer, if one waits longer."""

_SERVICE: Final = "/holdfast.v1.BlockService/"

Serializer = Callable[[Any], bytes]
Deserializer = Callable[[bytes], Any]


def _unreachable(node_id: str, why: str) -> HoldfastError:
    return HoldfastError(ErrorCode.UNREACHABLE, f"storage node {node_id} {why}", facts={"node_id": node_id})


class NodePool:
    """Channels to the nodes of a cluster, by node id.

    Not thread-safe: belongs to one event loop. Used as an async context manager, or closed with `close()`.
    """

    def __init__(self, *, tls: TlsFiles | None = None, clock: Clock | None = None) -> None:
        """Make an empty pool; `update` fills it. `tls` is the client's certificate for nodes that ask for one.

        Raises:
            HoldfastError: INVALID_ARGUMENT if the TLS files cannot be used.
        """
        self._channels = Channels(tls)
        self._clock: Clock = clock or SystemClock()
        self._nodes: dict[str, NodeStatus] = {}
        self._penalty_until_s: dict[str, float] = {}
        self._failures: dict[str, int] = {}
        self._in_flight: dict[str, int] = {}
        self._closed = False

    async def __aenter__(self) -> NodePool:
        """Return the pool."""
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close the pool."""
        await self.close()

    def update(self, nodes: Sequence[NodeStatus]) -> None:
        """Take over what a coordinator says of the nodes: addresses and who is up. Nodes not named are forgotten."""
        self._nodes = {node.node_id: node for node in nodes}

    def known(self) -> tuple[str, ...]:
        """Return the ids of all nodes that the last update named."""
        return tuple(self._nodes)

    def channel(self, node_id: str) -> grpc.aio.Channel:
        """Return the channel to a node.

        Raises:
            HoldfastError: UNREACHABLE if the node is unknown or has no address.
        """
        node = self._nodes.get(node_id)
        if node is None or not node.address:
            raise _unreachable(node_id, "is not registered")
        if self._closed:
            raise _unreachable(node_id, "was asked after the pool was closed")
        return self._channels.to(node.address)

    def rank(self, node_id: str) -> tuple[bool, int]:
        """Return a sort key: nodes that answer come before those that are down or just failed, idle before busy."""
        node = self._nodes.get(node_id)
        suspect = node is None or not node.up
        until_s = self._penalty_until_s.get(node_id)
        if until_s is not None:
            if self._clock.monotonic_s() < until_s:
                suspect = True
            else:
                del self._penalty_until_s[node_id]
        return suspect, self._in_flight.get(node_id, 0)

    def failed(self, node_id: str) -> None:
        """Note that a node did not answer: for a few seconds others are asked first, for longer each time in a row."""
        failures = self._failures[node_id] = self._failures.get(node_id, 0) + 1
        penalty_s = min(PENALTY_S_MAX, PENALTY_S * 2.0 ** min(failures - 1, 8))
        self._penalty_until_s[node_id] = self._clock.monotonic_s() + penalty_s

    def answered(self, node_id: str) -> None:
        """Note that a node answers: whatever it failed at is over."""
        if self._failures.pop(node_id, 0):
            self._penalty_until_s.pop(node_id, None)

    async def get_blocks(
        self, node_id: str, block_ids: Sequence[bytes], capability: str, *, timeout_s: float = RPC_TIMEOUT_S
    ) -> AsyncGenerator[GetAnswer, None]:
        """Ask a node for blocks; yields its answers as they come. `timeout_s` bounds the wait for each of them.

        Raises:
            HoldfastError: what the node said, or UNREACHABLE.
        """
        method = self.channel(node_id).unary_stream(
            _SERVICE + "GetBlocks",
            request_serializer=GetBlocksRequest.SerializeToString,
            response_deserializer=decode_get,
        )
        await self._channels.tidy()
        self._in_flight[node_id] = self._in_flight.get(node_id, 0) + 1
        call = method(GetBlocksRequest(block_ids=b"".join(block_ids)), metadata=((CAPABILITY_KEY, capability),))
        try:
            while True:
                async with asyncio.timeout(timeout_s):
                    answer = await call.read()
                self.answered(node_id)
                if answer is grpc.aio.EOF:
                    break
                yield cast("GetAnswer", answer)
        except grpc.aio.AioRpcError as error:
            raise self._told(node_id, error) from error
        except TimeoutError as error:
            self.failed(node_id)
            slow = _unreachable(node_id, f"did not answer within {timeout_s:g} s")
            raise HoldfastError(slow.code, slow.message, facts={**slow.facts, SLOW_FACT: "yes"}) from error
        finally:
            self._in_flight[node_id] -= 1
            call.cancel()

    async def has_blocks(
        self,
        node_id: str,
        block_ids: bytes,
        capability: str,
        *,
        layout_epoch: int = 0,
        verify: bool = False,
        timeout_s: float = RPC_TIMEOUT_S,
    ) -> bytes:
        """Ask a node which of the packed `block_ids` it holds; returns one `Verdict` byte an id.

        Raises:
            HoldfastError: what the node said, or UNREACHABLE.
        """
        method = self.channel(node_id).unary_unary(
            _SERVICE + "HasBlocks",
            request_serializer=HasBlocksRequest.SerializeToString,
            response_deserializer=HasBlocksResponse.FromString,
        )
        await self._channels.tidy()
        request = HasBlocksRequest(block_ids=block_ids, layout_epoch=layout_epoch, verify=verify)
        try:
            answer = await method(request, metadata=((CAPABILITY_KEY, capability),), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise self._told(node_id, error) from error
        self.answered(node_id)
        verdicts: bytes = answer.verdicts
        if len(verdicts) * 32 != len(block_ids):
            raise HoldfastError(ErrorCode.INTERNAL, f"storage node {node_id} answered for another number of blocks")
        return verdicts

    def put_stream(
        self, node_id: str, capability: str, *, serializer: Serializer, deserializer: Deserializer
    ) -> grpc.aio.StreamStreamCall[Any, Any]:
        """Open a PutBlocks stream; the writer brings its own serializer because batches are made without copies.

        Raises:
            HoldfastError: UNREACHABLE if the node is unknown.
        """
        method = self.channel(node_id).stream_stream(
            _SERVICE + "PutBlocks", request_serializer=serializer, response_deserializer=deserializer
        )
        return method(metadata=((CAPABILITY_KEY, capability),))

    def _told(self, node_id: str, error: grpc.aio.AioRpcError) -> HoldfastError:
        told = error_from_rpc(error, peer=f"storage node {node_id}")
        if told.code is ErrorCode.UNREACHABLE:
            self.failed(node_id)
        return told

    async def close(self) -> None:
        """Close every channel. Calls under way fail."""
        self._closed = True
        await self._channels.close()
