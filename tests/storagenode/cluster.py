"""Real nodes behind real gRPC, told about their cluster by a small coordinator that only answers heartbeats."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import grpc.aio

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.layout import Layout, LayoutNode
from holdfast_core.runtime.capability import CAPABILITY_METADATA_KEY, CapabilitySigner
from holdfast_core.runtime.channels import open_channel
from holdfast_core.runtime.clock import SystemClock
from holdfast_core.runtime.server import ServiceHost
from holdfast_core.runtime.status import error_from_rpc, reaches_peer
from holdfast_proto.v1 import blocks_pb2 as pb
from holdfast_proto.v1 import cluster_pb2, cluster_pb2_grpc, common_pb2
from holdfast_proto.v1.blocks_pb2_grpc import BlockServiceStub
from holdfast_proto.v1.peers_pb2_grpc import PeerServiceStub
from tests.storagenode.blocks import KINDS

Result = TypeVar("Result")

CLUSTER_ID = "c" * 32
WAIT_S = 20.0
_UNHEARD_MAX = 10


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds; the one polling loop of the asynchronous tests."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - conditions are about threads and processes too
            await asyncio.sleep(0.005)


def wait_until(condition: Callable[[], bool]) -> None:
    """As `eventually`, for tests without a loop."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come about"
        time.sleep(0.005)


def make_layout(epoch: int = 1, *, seed: int = 7, partitions: int = 16) -> Layout:
    """Return a layout of one node that owns everything."""
    return Layout(
        epoch=epoch,
        seed=seed,
        partitions=partitions,
        replicas=1,
        nodes=(LayoutNode("node-1", "default", 1 << 30),),
        owners=bytes(2 * partitions),
    )


class TestClock(SystemClock):
    """The machine's clock, whose wall time a test can put forward."""

    __test__ = False
    __slots__ = ("ahead_ms",)

    def __init__(self) -> None:
        self.ahead_ms = 0

    def now_unix_ms(self) -> int:
        """Return the wall clock, put forward."""
        return super().now_unix_ms() + self.ahead_ms


class HeartbeatCoordinator:
    """Answers heartbeats with what its attributes say, and remembers what nodes sent."""

    def __init__(self, *, layout: Layout | None = None, cluster_id: str = CLUSTER_ID) -> None:
        self.layout = layout
        self.cluster_id = cluster_id
        self.signer = CapabilitySigner("key-1", bytes(32), cluster_id)
        self.beats: list[cluster_pb2.HeartbeatRequest] = []
        self.collection_epoch = 0
        self.lease_id = 41
        self.nodes: dict[str, common_pb2.NodeStatus] = {}
        self._host: ServiceHost | None = None

    async def Heartbeat(
        self, request: cluster_pb2.HeartbeatRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> cluster_pb2.HeartbeatResponse:
        """Answer one heartbeat."""
        self.beats.append(request)
        name = request.status.node_id
        self.nodes[name] = request.status
        response = cluster_pb2.HeartbeatResponse(lease_id=self.lease_id, interval_ms=50, cluster_id=self.cluster_id)
        response.verifying_keys.add(key_id=self.signer.key_id, public_key=self.signer.public_key)
        if self.layout is not None:
            response.layout.CopyFrom(self.layout.to_message())
        response.collection_epoch = self.collection_epoch
        response.peer_capability = mint(self.signer, verbs=["peer"], node=name)
        response.nodes.extend(self.nodes.values())
        return response

    def __getattr__(self, name: str) -> Callable[..., None]:
        """The methods that nodes never call."""
        if name[0].isupper():
            return lambda *_: None
        raise AttributeError(name)

    async def start(self) -> str:
        """Serve; return the address."""
        self._host = ServiceHost("test-coordinator", bind="127.0.0.1:0")
        self._host.add(cluster_pb2_grpc.add_ClusterServiceServicer_to_server, self, "holdfast.v1.ClusterService")
        await self._host.start()
        return self._host.address

    async def stop(self) -> None:
        """Stop serving."""
        if self._host is not None:
            await self._host.stop(0.1)


class NodeClient:
    """Speaks the block service to one node, as a client with a given capability does."""

    def __init__(self, address: str, capability: str) -> None:
        self.channel = open_channel(address)
        self.stub: Any = BlockServiceStub(self.channel)
        self.peer_stub: Any = PeerServiceStub(self.channel)
        self.metadata = ((CAPABILITY_METADATA_KEY, capability),) if capability else ()

    async def put(self, batches: Sequence[pb.PutBlocksRequest]) -> list[pb.PutBlocksResponse]:
        """Send batches in one stream; return the acknowledgements in the order in which they came.

        grpc.aio forgets what the server said when a write meets a stream that has just ended; then it is asked again.
        """

        async def requests() -> AsyncIterator[pb.PutBlocksRequest]:
            for batch in batches:
                yield batch

        for _ in range(_UNHEARD_MAX):
            try:
                return await self.collect(self.stub.PutBlocks(requests(), metadata=self.metadata))
            except HoldfastError as error:
                if error.code is not ErrorCode.INTERNAL or reaches_peer(error):
                    raise
        raise AssertionError("the node was never heard")

    async def stream(self, method: str, request: Any) -> list[Any]:
        """Call a method that answers with a stream; return all of it."""
        return await self.collect(self._method(method)(request, metadata=self.metadata))

    async def call(self, method: str, request: Any) -> Any:
        """Call a unary method."""
        try:
            return await self._method(method)(request, metadata=self.metadata)
        except grpc.aio.AioRpcError as failure:
            raise error_from_rpc(failure, peer="node") from failure

    def _method(self, name: str) -> Any:
        return getattr(self.stub, name, None) or getattr(self.peer_stub, name)

    async def close(self) -> None:
        """Close the channel."""
        await self.channel.close()

    async def collect(self, call: Any) -> list[Any]:
        """Return all that a call still answers."""
        try:
            return [message async for message in call]
        except grpc.aio.AioRpcError as failure:
            raise error_from_rpc(failure, peer="node") from failure


async def refusal(work: Coroutine[Any, Any, Any]) -> HoldfastError:
    """Return the error that `work` ends with."""
    try:
        await work
    except HoldfastError as error:
        return error
    raise AssertionError("it was not refused")


def mint(
    signer: CapabilitySigner,
    *,
    tenant: int = 1,
    verbs: Sequence[str] = ("put", "get", "has", "scan", "delete", "status"),
    kinds: frozenset[int] = KINDS,
    ttl_s: float = 3600.0,
    now_unix_ms: int | None = None,
    read_kinds: frozenset[int] | None = None,
    node: str = "",
    collection_epoch: int = 0,
) -> str:
    """Return a capability; by default for everything of tenant 1."""
    now = time.time_ns() // 1_000_000 if now_unix_ms is None else now_unix_ms
    return signer.mint(
        tenant=tenant,
        verbs=frozenset(verbs),
        kinds=kinds,
        ttl_s=ttl_s,
        now_unix_ms=now,
        read_kinds=read_kinds,
        collection_epoch=collection_epoch,
        node=node,
    )


class LoopThread:
    """An event loop in a thread, for tests that are not asynchronous themselves."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Return what `work` returns in the loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT_S)

    def close(self) -> None:
        """End the loop."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
