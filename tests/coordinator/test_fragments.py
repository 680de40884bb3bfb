"""How points and objects spread over nodes: by the layout, by a real scan, and as the SDK tells it."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence

import pytest

from holdfast import convert
from holdfast.cli.cluster import describe_shares
from holdfast_coordinator.fragments import NodeShare, spread
from holdfast_core.model.block import SealedBlock
from holdfast_core.model.layout import Layout, LayoutNode
from holdfast_core.runtime.clock import SystemClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_proto.v1 import state_pb2
from holdfast_proto.v1.common_pb2 import Grant
from holdfast_storagenode.embedded import EmbeddedStorageNode
from tests.coordinator.content import Cluster, cluster, put, random_blocks, seal_object, seal_volume
from tests.coordinator.rig import point_commit, ring_of

LAYOUT = Layout(
    epoch=1,
    seed=7,
    partitions=4,
    replicas=2,
    nodes=(LayoutNode("node-b", "east", 1), LayoutNode("node-a", "west", 1), LayoutNode("node-c", "west", 0)),
    owners=bytes([0, 0, 1, 0] * 4),
)


def test_every_owner_keeps_a_block_and_others_keep_nothing() -> None:
    ids = [random.Random(n).randbytes(32) for n in range(10)]
    lengths = dict.fromkeys(ids[:7], 100)  # nobody lists the other three: they are lost
    assert spread(ids, lengths, LAYOUT) == [
        NodeShare("node-a", "west", 10, 700),
        NodeShare("node-b", "east", 10, 700),
        NodeShare("node-c", "west", 0, 0),
    ]
    assert [share.blocks for share in spread([], {}, LAYOUT)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("blocks", "sentence"),
    [
        ({"a": 6, "b": 7, "c": 9}, "no node holds all of it"),
        ({"a": 10}, "a holds all of it: as many replicas as nodes"),
        ({"b": 10, "a": 10}, "a, b hold all of it: as many replicas as nodes"),
        ({"a": 10, "b": 0}, "a holds all of it: too few blocks to spread further"),
    ],
)
def test_the_sentence_names_who_holds_everything(blocks: dict[str, int], sentence: str) -> None:
    assert describe_shares(10, blocks) == sentence


@pytest.fixture
async def five() -> AsyncIterator[Cluster]:
    """A cluster of five nodes that keeps three copies."""
    store = await SqliteStore.open(":memory:", SystemClock())
    try:
        async with cluster(store, nodes=5) as made:
            yield made
    finally:
        await store.close()


async def put_to_owners(grant: Grant, blocks: Sequence[SealedBlock]) -> None:
    """Put each block where the layout wants it and nowhere else."""
    layout = Layout.from_message(grant.layouts[0])
    for node in layout.nodes:
        mine = [block for block in blocks if node.node_id in layout.owners_of_block(block.id)]
        await put(grant, mine, nodes=[node.node_id])


def held(node: EmbeddedStorageNode) -> dict[bytes, int]:
    """Ids and lengths of all that a node holds of the tenant, behind the service's back."""
    assert node._memory is not None
    assert node._memory._store is not None
    entries = node._memory._store.scan(1, partition=None, after=b"", limit=1_000_000)
    return {entry.block_id: entry.length for entry in entries}


async def test_no_node_holds_all_and_the_numbers_are_those_of_a_scan(five: Cluster) -> None:
    begun = await five.client.begin()
    volume, sealed = seal_volume(ring_of(begun.grant.keys), random_blocks(1, range(200)), total=600)
    await put_to_owners(begun.grant, sealed.everything)
    await five.client.commit(point_commit(begun, [volume]))
    stored = await five.client.state("BeginObject", state_pb2.BeginObjectRequest(task_id="task-1", nonce=bytes(16)))
    commit, cuts = seal_object(stored, "task-1", [random.Random(n).randbytes(500) for n in range(40)])
    await put_to_owners(stored.grant, cuts.everything)
    await five.client.state("CommitObject", commit)
    of_vm = {block.id for block in sealed.everything}
    everything = of_vm | {block.id for block in cuts.everything}
    for vm_id, ids in (("vm-1", of_vm), ("", everything)):
        answer = await five.client.state("GetStats", state_pb2.GetStatsRequest(vm_id=vm_id))
        told = convert.stats_info(answer)
        assert told.share_blocks == len(ids)
        assert [share.node_id for share in told.shares] == sorted(five.nodes)
        for share in told.shares:
            scanned = {block_id: size for block_id, size in held(five.nodes[share.node_id]).items() if block_id in ids}
            assert (share.blocks, share.bytes) == (len(scanned), sum(scanned.values()))
            assert 0 < share.blocks < told.share_blocks
        assert sum(share.blocks for share in told.shares) == 3 * told.share_blocks
        assert sum(share.bytes for share in told.shares) == 3 * (told.exclusive_bytes or 0)
        shares = {share.node_id: share.blocks for share in told.shares}
        assert describe_shares(told.share_blocks, shares) == "no node holds all of it"


async def test_with_no_node_to_ask_nothing_is_told(five: Cluster) -> None:
    begun = await five.client.begin()
    volume, sealed = seal_volume(ring_of(begun.grant.keys), random_blocks(1, range(5)), total=5)
    await put_to_owners(begun.grant, sealed.everything)
    await five.client.commit(point_commit(begun, [volume]))
    for node in five.nodes.values():
        await node.stop(0)
    told = convert.stats_info(await five.client.state("GetStats", state_pb2.GetStatsRequest(vm_id="vm-1")))
    assert (told.point_count, told.share_blocks, told.shares, told.exclusive_bytes) == (1, 0, (), None)
