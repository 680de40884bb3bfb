"""What nodes do for one another over real gRPC: under whose token, and what becomes of a peer that lies."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import PARTITIONS_PER_COMPARISON_MAX
from holdfast_core.runtime.capability import CapabilitySigner
from holdfast_core.runtime.server import ServiceHost
from holdfast_proto.v1 import blocks_pb2, common_pb2
from holdfast_proto.v1 import peers_pb2 as pb
from holdfast_proto.v1.cluster_pb2 import HeartbeatResponse
from holdfast_storagenode.batch import batch_of
from holdfast_storagenode.cluster import ClusterKnowledge
from holdfast_storagenode.embedded import EmbeddedStorageNode
from holdfast_storagenode.healing.grpc_peers import GrpcPeers
from holdfast_storagenode.healing.workers import HealingOptions
from holdfast_storagenode.store import BlockEntry, Verdict
from holdfast_storagenode.wire import PEER_SERVICE_NAME, add_peer_service, encode_get
from tests.storagenode.blocks import make_block, make_blocks
from tests.storagenode.cluster import HeartbeatCoordinator, NodeClient, eventually, mint, refusal
from tests.storagenode.fleet import table
from tests.storagenode.remote import batch_of as put_message

NODES = ["node-1", "node-2", "node-3"]
LAYOUT = table(1, [("node-1", "node-2"), ("node-1", "node-3")] * 4, nodes=NODES)
# Of partitions that node-2 owns, and of ones that it does not.
SHARED = [block for block in make_blocks(80) if LAYOUT.partition_of(block.id) % 2 == 0][:20]
OTHERS = [block for block in make_blocks(80) if LAYOUT.partition_of(block.id) % 2 == 1][:20]
PEER_METHODS = ("ComparePartitions", "ListPartition", "FetchBlocks", "ConfirmBlocks", "HandBlocks")
STREAMS = {"ListPartition", "FetchBlocks", "GetBlocks", "ScanBlocks"}


@dataclass(slots=True)
class Pair:
    """A node that serves, with its coordinator; node-2 and node-3 are the test's to play."""

    coordinator: HeartbeatCoordinator
    node: EmbeddedStorageNode
    address: str
    opened: list[NodeClient]

    def client(self, token: str) -> NodeClient:
        """Return a client with a token."""
        self.opened.append(NodeClient(self.address, token))
        return self.opened[-1]

    def token(self, node: str, **claims: Any) -> str:
        """Return a peer's token."""
        return mint(self.coordinator.signer, **{"verbs": ["peer"], "node": node, **claims})


@pytest_asyncio.fixture
async def pair() -> AsyncIterator[Pair]:
    """node-1 of three, with blocks."""
    coordinator = HeartbeatCoordinator(layout=LAYOUT)
    quiet = HealingOptions(interval_s=10_000, gentleness=0.0)
    node = EmbeddedStorageNode("node-1", [await coordinator.start()], heartbeat_s=0.05, healing=quiet)
    serving = Pair(coordinator, node, await node.start(), [])
    await eventually(lambda: any(beat.status.layout_epoch for beat in coordinator.beats))
    node.core.store.put(1, SHARED)
    node.core.store.put(1, OTHERS)
    yield serving
    for client in serving.opened:
        await client.close()
    await node.stop()
    await coordinator.stop()


def request_of(method: str, blocks: list[Any]) -> Any:
    """Return a request of each kind about `blocks`."""
    packed = b"".join(block.id for block in blocks)
    places = [LAYOUT.partition_of(block.id) for block in blocks]
    return {
        "ComparePartitions": pb.ComparePartitionsRequest(partitions=places, layout_epoch=1),
        "ListPartition": pb.ListPartitionRequest(partitions=[places[0]], tenant=1),
        "FetchBlocks": pb.FetchBlocksRequest(tenant=1, block_ids=packed),
        "ConfirmBlocks": pb.ConfirmBlocksRequest(tenant=1, block_ids=packed, layout_epoch=1),
        "HandBlocks": pb.HandBlocksRequest(
            tenant=1,
            block_ids=packed,
            layout_epoch=1,
            lengths=[len(block.data) for block in blocks],
            blocks=b"".join(block.data for block in blocks),
        ),
    }[method]


async def ask(client: NodeClient, method: str, request: Any) -> Any:
    """Make a call, whether it streams or not."""
    return await (client.stream(method, request) if method in STREAMS else client.call(method, request))


@pytest.mark.slow
@pytest.mark.parametrize("method", PEER_METHODS)
async def test_a_peers_call_takes_a_peers_token(pair: Pair, method: str) -> None:
    request = request_of(method, SHARED)
    assert await ask(pair.client(pair.token("node-2")), method, request)
    signer = pair.coordinator.signer
    foreign = CapabilitySigner(signer.key_id, bytes(32), "d" * 32)
    for token in (
        "",
        mint(signer),
        mint(signer, verbs=["peer"]),
        mint(foreign, verbs=["peer"], node="node-2"),
        pair.token("node-2", ttl_s=-1000.0),
    ):
        assert (await refusal(ask(pair.client(token), method, request))).code is ErrorCode.DENIED


async def test_a_peers_token_opens_nothing_that_is_for_clients(pair: Pair) -> None:
    packed = SHARED[0].id
    calls: dict[str, tuple[str, Any]] = {
        "get": ("GetBlocks", blocks_pb2.GetBlocksRequest(block_ids=packed)),
        "has": ("HasBlocks", blocks_pb2.HasBlocksRequest(block_ids=packed)),
        "scan": ("ScanBlocks", blocks_pb2.ScanBlocksRequest()),
        "delete": ("DeleteBlocks", blocks_pb2.DeleteBlocksRequest(block_ids=packed, cutoff=1)),
        "status": ("GetNodeStatus", blocks_pb2.GetNodeStatusRequest()),
    }
    for verb, (method, request) in calls.items():
        for verbs in (["peer"], ["peer", verb], [verb]):
            client = pair.client(pair.token("node-2", verbs=verbs))
            assert (await refusal(ask(client, method, request))).code is ErrorCode.DENIED, (verb, verbs)
    client = pair.client(pair.token("node-2", verbs=["peer", "put"]))
    assert (await refusal(client.put([put_message(SHARED)]))).code is ErrorCode.DENIED


@pytest.mark.parametrize("method", ["ComparePartitions", "ListPartition", "FetchBlocks"])
async def test_a_node_sees_no_partition_that_it_does_not_own(pair: Pair, method: str) -> None:
    client = pair.client(pair.token("node-2"))
    assert (await refusal(ask(client, method, request_of(method, OTHERS)))).code is ErrorCode.DENIED
    stranger = pair.client(pair.token("node-9"))
    assert (await refusal(ask(stranger, method, request_of(method, SHARED)))).code is ErrorCode.DENIED
    assert await ask(pair.client(pair.token("node-3")), method, request_of(method, OTHERS))


async def test_limits_and_forms_are_kept(pair: Pair) -> None:
    client = pair.client(pair.token("node-2"))
    many = pb.ComparePartitionsRequest(partitions=[0] * (PARTITIONS_PER_COMPARISON_MAX + 1), layout_epoch=1)
    assert (await refusal(ask(client, "ComparePartitions", many))).code is ErrorCode.LIMIT_EXCEEDED
    odd = pb.FetchBlocksRequest(tenant=1, block_ids=b"x" * 33)
    assert (await refusal(ask(client, "FetchBlocks", odd))).code is ErrorCode.INVALID_ARGUMENT
    torn = request_of("HandBlocks", SHARED[:2])
    torn.lengths[0] += 1
    assert (await refusal(ask(client, "HandBlocks", torn))).code is ErrorCode.INVALID_ARGUMENT
    wrong = request_of("HandBlocks", SHARED[:1])
    wrong.blocks = make_block(77).data
    assert (await refusal(ask(client, "HandBlocks", wrong))).code is ErrorCode.CORRUPT
    old = request_of("ConfirmBlocks", SHARED)
    old.layout_epoch = 2
    assert (await refusal(ask(client, "ConfirmBlocks", old))).code is ErrorCode.WRONG_EPOCH


async def test_peers_over_grpc_say_what_the_store_holds(pair: Pair) -> None:
    cluster = ClusterKnowledge()
    heard = HeartbeatResponse(peer_capability=pair.token("node-2"))
    heard.nodes.add(node_id="node-1", address=pair.address, up=True)
    cluster.hear(heard)
    peers = GrpcPeers(cluster)
    store = pair.node.core.store
    places = sorted({LAYOUT.partition_of(block.id) for block in SHARED})
    told = await peers.compare("node-1", places, layout_epoch=1)
    assert told.fenced_epoch == 1
    assert told.holdings == tuple(tuple(store.holdings(place)) for place in places)
    listed: list[BlockEntry] = []
    async for page in peers.listing("node-1", partitions=places, tenant=1):
        listed += page
    assert listed == [entry for place in places for entry in store.scan(1, partition=place, after=b"", limit=1000)]
    ids = [block.id for block in SHARED]
    lost = next(block for block in make_blocks(300, first=100) if LAYOUT.partition_of(block.id) == places[0])
    items = await peers.fetch("node-1", tenant=1, ids=[*ids, lost.id], bytes_max=1 << 20)
    assert [bytes(item) if not isinstance(item, Verdict) else item for item in items] == [
        *(block.data for block in SHARED),
        Verdict.MISSING,
    ]
    with pytest.raises(HoldfastError):
        await peers.fetch("node-1", tenant=1, ids=ids, bytes_max=100)
    given = batch_of(1, [(lost.id, lost.data)])
    assert await peers.hand("node-1", tenant=1, batch=given, collection_epoch=0) == [Verdict.OK]
    asked = {"tenant": 1, "ids": [lost.id, ids[0]], "layout_epoch": 1, "collection_epoch": 0}
    assert await peers.confirm("node-1", **asked) == [Verdict.OK] * 2  # type: ignore[arg-type]
    with pytest.raises(HoldfastError) as unknown:
        await peers.compare("node-7", places, layout_epoch=1)
    assert unknown.value.code is ErrorCode.UNREACHABLE
    await peers.close()


class Liar:
    """A peer that holds everything, it says, and sends what it likes."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.asked = 0

    async def ComparePartitions(self, request: pb.ComparePartitionsRequest, context: object) -> Any:
        """Say that there are more blocks than there are."""
        self.asked += self.how == "too many answers"
        response = pb.ComparePartitionsResponse(fenced_epoch=1 << 40)
        count = 3 * len(request.partitions) if self.how == "too many answers" else len(request.partitions)
        for _ in range(count):
            response.partitions.add().holdings.add(tenant=1, count=1000, digest=b"?" * 32)
        return response

    async def ListPartition(
        self, request: pb.ListPartitionRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """List what was asked for, or what was not."""
        self.asked += self.how in ("foreign ids", "no order", "odd listing", "large")
        of = [block for block in SHARED if LAYOUT.partition_of(block.id) in request.partitions]
        ids = sorted((block.id for block in of), key=lambda block_id: (LAYOUT.partition_of(block_id), block_id))
        if self.how == "foreign ids":
            ids = sorted(block.id for block in OTHERS)
        if self.how == "no order":
            ids = [*ids, *ids]
        if self.how == "odd listing":
            await context.write(pb.ListPartitionResponse(block_ids=b"".join(ids), lengths=[1], stamps=[0], kinds=b""))
            return
        length = 5_000_000 if self.how == "large" else len(SHARED[0].data)
        await context.write(
            pb.ListPartitionResponse(
                block_ids=b"".join(ids), lengths=[length] * len(ids), stamps=[1 << 31] * len(ids), kinds=bytes(len(ids))
            )
        )

    async def FetchBlocks(self, request: pb.FetchBlocksRequest, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Send bytes that are not the blocks', or too many, or none."""
        self.asked += 1
        count = len(request.block_ids) // 32
        size = 100_000 if self.how == "too much" else len(SHARED[0].data)
        if self.how == "nothing":
            return
        verdict = bytes([77]) if self.how == "odd verdicts" else bytes([Verdict.OK])
        await context.write(
            encode_get(first=0, verdicts=verdict * count, lengths=[size] * count, blocks=[bytes(size)] * count)
        )

    def __getattr__(self, name: str) -> Any:
        """The other calls, which nobody makes here."""
        if name[0].isupper():
            return lambda *_: None
        raise AttributeError(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        "wrong bytes",
        "foreign ids",
        "no order",
        "odd listing",
        "large",
        "too much",
        "nothing",
        "odd verdicts",
        "too many answers",
    ],
)
async def test_a_peer_that_lies_leaves_nothing_here_and_stops_nothing(pair: Pair, how: str) -> None:
    host = ServiceHost("liar", bind="127.0.0.1:0")
    liar = Liar(how)
    host.add(add_peer_service, liar, PEER_SERVICE_NAME)
    await host.start()
    before = pair.node.core.store.status().block_count
    for block in SHARED:
        pair.node.core.store.delete(1, [block.id])
    pair.coordinator.nodes["node-2"] = common_pb2.NodeStatus(node_id="node-2", address=host.address, up=True)
    healing = pair.node.core.healing
    await eventually(lambda: "node-2" in pair.node.core.cluster.peers)
    await eventually(lambda: liar.asked > 0)
    # What it was asked for is worked on while some heartbeats pass.
    beats = len(pair.coordinator.beats)
    await eventually(lambda: len(pair.coordinator.beats) > beats + 4)
    assert pair.node.core.store.status().block_count == before - len(SHARED)
    assert {entry.block_id for entry in pair.node.core.store.scan(1, partition=None, after=b"", limit=1000)} == {
        block.id for block in OTHERS
    }
    assert healing.repaired_blocks == 0
    alive = pair.client(mint(pair.coordinator.signer))
    assert (await alive.put([put_message(SHARED[:1])]))[0].verdicts == bytes([Verdict.OK])
    await host.stop(0.1)
