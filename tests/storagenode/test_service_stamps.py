"""Stamps, cut-offs and ranges of partitions as the block service offers them."""

from __future__ import annotations

import pytest

from holdfast_core.model.block import Kind
from holdfast_core.model.errors import ErrorCode
from holdfast_proto.v1 import blocks_pb2 as pb
from holdfast_storagenode.store import Verdict
from tests.storagenode.blocks import make_block, make_blocks
from tests.storagenode.cluster import NodeClient, make_layout, mint, refusal
from tests.storagenode.conftest import Served
from tests.storagenode.engines import plant_rot
from tests.storagenode.remote import batch_of

BLOCKS = make_blocks(3)
IDS = [block.id for block in BLOCKS]
PACKED = b"".join(IDS)


def session(served: Served, epoch: int) -> NodeClient:
    """A client of a session that began under a collection epoch."""
    return served.client(mint(served.coordinator.signer, collection_epoch=epoch))


def stamps(served: Served) -> list[int]:
    listed = {entry.block_id: entry.stamp for entry in served.store.scan(1, partition=None, after=b"", limit=99)}
    return [listed[block_id] for block_id in IDS]


async def test_a_put_is_stamped_with_the_newer_of_the_sessions_epoch_and_the_nodes(served: Served) -> None:
    served.store.learn_epoch(5)
    await session(served, 3).put([batch_of(BLOCKS[:1])])
    await session(served, 8).put([batch_of(BLOCKS[1:2])])
    await served.client().put([batch_of(BLOCKS[2:])])
    assert stamps(served) == [5, 8, 5]
    await session(served, 6).put([batch_of(BLOCKS)])
    assert stamps(served) == [6, 8, 6]


async def test_who_leans_on_what_it_finds_stamps_it_and_who_only_asks_does_not(served: Served) -> None:
    await session(served, 2).put([batch_of(BLOCKS)])
    served.store.learn_epoch(5)
    asked = pb.HasBlocksRequest(block_ids=PACKED)
    assert (await served.client().call("HasBlocks", asked)).verdicts == bytes([Verdict.OK] * 3)
    assert stamps(served) == [2, 2, 2]
    leaning = pb.HasBlocksRequest(block_ids=IDS[0])
    assert (await session(served, 3).call("HasBlocks", leaning)).verdicts == bytes([Verdict.OK])
    verified = pb.HasBlocksRequest(block_ids=IDS[1], verify=True)
    assert (await session(served, 9).call("HasBlocks", verified)).verdicts == bytes([Verdict.OK])
    assert stamps(served) == [5, 9, 2]
    assert served.metric("holdfast_node_stamped_blocks_total") == 2


async def test_a_delete_says_what_it_kept_and_always_names_a_cutoff(served: Served) -> None:
    await session(served, 4).put([batch_of(BLOCKS[:2])])
    await session(served, 6).put([batch_of(BLOCKS[2:])])
    client = served.client()
    error = await refusal(client.call("DeleteBlocks", pb.DeleteBlocksRequest(block_ids=PACKED)))
    assert error.code is ErrorCode.INVALID_ARGUMENT
    answer = await client.call("DeleteBlocks", pb.DeleteBlocksRequest(block_ids=PACKED, cutoff=6))
    assert answer.verdicts == bytes([Verdict.OK, Verdict.OK, Verdict.KEPT])
    error = await refusal(client.call("DeleteBlocks", pb.DeleteBlocksRequest(block_ids=PACKED, cutoff=5)))
    assert error.code is ErrorCode.CONFLICT


async def test_a_listing_says_which_of_what_it_lists_is_corrupt_if_asked(served: Served) -> None:
    blocks = [make_block(number, kind=Kind(number % 3)) for number in range(30)]
    served.store.put(1, blocks, stamp=4)
    rotten = blocks[::2]
    for block in rotten:
        plant_rot(served.directory, block.data)
    served.store.has(1, [block.id for block in blocks], verify=True, stamp=5)
    confined = served.client(mint(served.coordinator.signer, kinds=frozenset({int(Kind.INDEX)})))
    (plain,) = await confined.stream("ScanBlocks", pb.ScanBlocksRequest())
    assert (len(plain.lengths), list(plain.quarantined)) == (5, [])
    asked = pb.ScanBlocksRequest(partition=0, partition_count=16, with_quarantined=True)
    (told,) = await confined.stream("ScanBlocks", asked)
    listed = [told.block_ids[32 * at : 32 * at + 32] for at in range(len(told.lengths))]
    assert set(listed) == {block.id for block in blocks[2::3]}, "of other kinds none"
    assert {listed[at] for at in told.quarantined} == {block.id for block in rotten} & set(listed)
    assert [stamp == 4 for stamp in told.stamps] == [at in told.quarantined for at in range(10)]


@pytest.mark.parametrize(("first", "count"), [(0, 16), (3, 5), (7, 1), (7, 0), (14, 4_000_000_000), (200, 3)])
async def test_a_range_of_partitions_is_listed_with_stamps_and_goes_on_where_it_stopped(
    served: Served, first: int, count: int
) -> None:
    blocks = make_blocks(60)
    partition_of = make_layout().partition_of
    for at, block in enumerate(blocks):
        served.store.put(1, [block], stamp=1 + at % 4)
    wanted = sorted(
        (partition_of(block.id), block.id, len(block.data), 1 + at % 4)
        for at, block in enumerate(blocks)
        if first <= partition_of(block.id) < first + max(1, count)
    )

    async def listed(after: bytes, limit: int) -> list[tuple[bytes, int, int]]:
        request = pb.ScanBlocksRequest(partition=first, partition_count=count, after=after, limit=limit)
        return [
            (answer.block_ids[32 * at : 32 * at + 32], answer.lengths[at], answer.stamps[at])
            for answer in await served.client().stream("ScanBlocks", request)
            for at in range(len(answer.lengths))
        ]

    assert await listed(b"", 0) == [item[1:] for item in wanted]
    walked: list[tuple[bytes, int, int]] = []
    while page := await listed(walked[-1][0] if walked else b"", 4):
        assert len(page) <= 4
        walked.extend(page)
    assert walked == [item[1:] for item in wanted]
