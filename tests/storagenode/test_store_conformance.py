"""One suite for every block store: the segment engine, the one in memory, and both kinds of node behind gRPC."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from holdfast_core.model.block import Kind, SealedBlock, verify_view
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_storagenode.store import BlockEntry, Holding, Verdict
from tests.storagenode.blocks import make_block, make_blocks
from tests.storagenode.rigs import Rig

ALL = 1 << 30


def test_what_was_put_is_read_back(rig: Rig) -> None:
    blocks = make_blocks(40)
    assert rig.store.put(1, blocks) == [Verdict.OK] * 40
    ids = [block.id for block in blocks]
    random.Random(5).shuffle(ids)
    by_id = {block.id: block for block in blocks}
    assert rig.store.get(1, ids, bytes_max=ALL) == [by_id[block_id] for block_id in ids]
    assert rig.store.has(1, ids) == [Verdict.OK] * 40
    assert rig.store.has(1, ids, verify=True) == [Verdict.OK] * 40


def test_an_unknown_block_is_missing(rig: Rig) -> None:
    held, unknown = make_block(1), make_block(2)
    rig.store.put(1, [held])
    assert rig.store.get(1, [unknown.id, held.id], bytes_max=ALL) == [Verdict.MISSING, held]
    assert rig.store.has(1, [unknown.id, held.id]) == [Verdict.MISSING, Verdict.OK]
    assert rig.store.has(1, [unknown.id, held.id], verify=True) == [Verdict.MISSING, Verdict.OK]


def test_a_second_put_is_present_and_takes_no_space(rig: Rig) -> None:
    blocks = make_blocks(3)
    rig.store.put(1, blocks[:2])
    used = rig.store.status().used_bytes
    assert rig.store.put(1, blocks[:2]) == [Verdict.PRESENT, Verdict.PRESENT]
    assert rig.store.status().used_bytes == used
    assert rig.store.put(1, blocks) == [Verdict.PRESENT, Verdict.PRESENT, Verdict.OK]


def test_a_block_twice_in_one_batch_is_kept_once(rig: Rig) -> None:
    block = make_block(1)
    assert rig.store.put(1, [block, block]) == [Verdict.OK, Verdict.PRESENT]
    assert rig.store.status().block_count == 1


def test_tenants_do_not_see_one_another(rig: Rig) -> None:
    block = make_block(1)
    rig.store.put(1, [block])
    assert rig.store.get(2, [block.id], bytes_max=ALL) == [Verdict.MISSING]
    assert rig.store.has(2, [block.id]) == [Verdict.MISSING]
    assert rig.store.scan(2, partition=None, after=b"", limit=10) == []
    assert rig.store.delete(2, [block.id]) == [Verdict.MISSING]
    assert rig.store.put(2, [block]) == [Verdict.OK], "that another tenant has it must not show"
    assert rig.store.delete(1, [block.id]) == [Verdict.OK]
    assert rig.store.get(2, [block.id], bytes_max=ALL) == [block]


def test_a_deleted_block_is_gone_and_can_come_back(rig: Rig) -> None:
    blocks = make_blocks(3)
    ids = [block.id for block in blocks]
    rig.store.put(1, blocks)
    assert rig.store.delete(1, [ids[1], make_block(9).id, ids[1]]) == [Verdict.OK, Verdict.MISSING, Verdict.MISSING]
    assert rig.store.get(1, ids, bytes_max=ALL) == [blocks[0], Verdict.MISSING, blocks[2]]
    assert rig.store.status().block_count == 2
    assert rig.store.put(1, [blocks[1]]) == [Verdict.OK]
    assert rig.store.get(1, ids, bytes_max=ALL) == blocks


def test_rot_is_never_served_and_a_put_heals_it(rig: Rig) -> None:
    blocks = make_blocks(3)
    ids = [block.id for block in blocks]
    rig.store.put(1, blocks)
    rig.rot(1, blocks[1])
    assert rig.store.get(1, ids, bytes_max=ALL) == [blocks[0], Verdict.CORRUPT, blocks[2]]
    assert rig.store.has(1, ids, verify=True) == [Verdict.OK, Verdict.CORRUPT, Verdict.OK]
    assert rig.store.status().block_count == 3, "set aside, not deleted"
    assert rig.store.put(1, [blocks[1]]) == [Verdict.OK]
    assert rig.store.get(1, ids, bytes_max=ALL) == blocks
    assert rig.store.status().quarantined_count == 0


def test_blocks_are_taken_from_the_message_that_they_lie_in(rig: Rig) -> None:
    blocks = make_blocks(3)
    size = len(blocks[0].data)
    message = b"".join(block.data for block in blocks)
    views = [verify_view(block.id, memoryview(message)[at * size :][:size]) for at, block in enumerate(blocks)]
    assert rig.store.put(1, views) == [Verdict.OK] * 3
    assert rig.store.put(1, [views[0], blocks[1]]) == [Verdict.PRESENT] * 2
    assert rig.store.get(1, [block.id for block in blocks], bytes_max=ALL) == blocks


def test_rot_is_found_by_a_verifying_has_and_counted(rig: Rig) -> None:
    block = make_block(1)
    rig.store.put(1, [block])
    rig.rot(1, block)
    assert rig.store.has(1, [block.id], verify=True) == [Verdict.CORRUPT]
    assert rig.store.has(1, [block.id], verify=True) == [Verdict.CORRUPT]
    # The marker becomes durable with the next write at the latest.
    rig.store.put(1, [make_block(2)])
    assert rig.store.status().quarantined_count == 1
    assert rig.store.has(1, [block.id]) == [Verdict.CORRUPT]
    assert rig.store.delete(1, [block.id]) == [Verdict.OK]
    assert rig.store.status().quarantined_count == 0


def test_an_answer_is_bounded_but_never_empty(rig: Rig) -> None:
    blocks = make_blocks(5)
    ids = [block.id for block in blocks]
    rig.store.put(1, blocks)
    size = len(blocks[0].data)
    assert rig.store.get(1, ids, bytes_max=3 * size) == blocks[:3]
    assert rig.store.get(1, ids, bytes_max=1) == blocks[:1]
    assert rig.store.get(1, [make_block(8).id, *ids], bytes_max=size) == [Verdict.MISSING, blocks[0]]


def test_a_scan_lists_by_partition_and_id_and_goes_on_where_it_stopped(rig: Rig) -> None:
    blocks = [make_block(number, kind=Kind(number % 3)) for number in range(30)]
    rig.store.put(1, blocks)
    rig.store.delete(1, [blocks[4].id])
    expected = sorted((rig.partition_of(b.id), b.id, number % 3) for number, b in enumerate(blocks) if number != 4)
    listed = rig.store.scan(1, partition=None, after=b"", limit=100)
    assert [(entry.block_id, entry.kind) for entry in listed] == [(i, kind) for _, i, kind in expected]
    assert {entry.length for entry in listed} == {len(blocks[0].data)}
    walked: list[bytes] = []
    while page := rig.store.scan(1, partition=None, after=walked[-1] if walked else b"", limit=7):
        walked.extend(entry.block_id for entry in page)
    assert walked == [block_id for _, block_id, _ in expected]
    for partition in range(16):
        held = [entry.block_id for entry in rig.store.scan(1, partition=partition, after=b"", limit=100)]
        assert held == [block_id for p, block_id, _ in expected if p == partition]


@pytest.mark.parametrize(("first", "end"), [(0, 16), (3, 11), (5, 6), (12, 4096)])
def test_a_scan_of_several_partitions_lists_those_alone(rig: Rig, first: int, end: int) -> None:
    blocks = [make_block(number) for number in range(60)]
    rig.store.put(1, blocks)
    rig.store.put(2, [make_block(100)])
    expected = sorted((rig.partition_of(b.id), b.id) for b in blocks if first <= rig.partition_of(b.id) < end)
    walked: list[tuple[int, bytes]] = []
    after = b""
    while page := rig.store.scan(1, partition=first, end=end, after=after, limit=4):
        walked += [(rig.partition_of(entry.block_id), entry.block_id) for entry in page]
        after = page[-1].block_id
        assert len(walked) <= len(expected)
    assert walked == expected


def test_kinds_are_known(rig: Rig) -> None:
    blocks = [make_block(number, kind=kind) for number, kind in enumerate(Kind)]
    rig.store.put(1, blocks)
    assert rig.store.kinds(1, [*(b.id for b in blocks), make_block(9).id]) == [0, 1, 2, None]


def test_a_full_store_refuses_whole_batches_and_serves_reads(rig: Rig) -> None:
    kept = make_blocks(10, size=40_000)
    rig.store.put(1, kept)
    surplus = make_blocks(40, size=40_000, first=100)
    with pytest.raises(HoldfastError) as refused:
        rig.store.put(1, surplus)
    assert refused.value.code is ErrorCode.DISK_FULL
    assert rig.store.has(1, [block.id for block in surplus]) == [Verdict.MISSING] * 40
    assert rig.store.get(1, [block.id for block in kept], bytes_max=ALL) == kept
    assert rig.store.put(1, kept) == [Verdict.PRESENT] * 10, "what needs no space is taken"
    assert rig.store.put(1, surplus[:2]) == [Verdict.OK, Verdict.OK]


def test_status_adds_up(rig: Rig) -> None:
    before = rig.store.status()
    blocks = make_blocks(4)
    rig.store.put(1, blocks)
    after = rig.store.status()
    assert after.block_count == 4
    assert after.used_bytes - before.used_bytes >= sum(len(block.data) for block in blocks)
    assert before.free_bytes - after.free_bytes == after.used_bytes - before.used_bytes
    assert after.capacity_bytes == 1 << 20


def stamps(rig: Rig, tenant: int = 1) -> dict[bytes, int]:
    """What each whole block counts as stamped with."""
    return {entry.block_id: entry.stamp for entry in rig.store.scan(tenant, partition=None, after=b"", limit=1000)}


def test_a_put_stamps_what_it_brings_and_what_is_there(rig: Rig) -> None:
    old, new = make_block(1), make_block(2)
    rig.store.put(1, [old], stamp=3)
    assert rig.store.put(1, [old, new], stamp=5) == [Verdict.PRESENT, Verdict.OK]
    assert stamps(rig) == {old.id: 5, new.id: 5}
    assert rig.store.put(1, [old, new], stamp=4) == [Verdict.PRESENT, Verdict.PRESENT]
    assert stamps(rig) == {old.id: 5, new.id: 5}, "a stamp never goes back"


@pytest.mark.parametrize("verify", [False, True])
def test_what_is_found_under_an_epoch_is_stamped_and_what_is_looked_at_is_not(rig: Rig, verify: bool) -> None:
    blocks = make_blocks(3)
    ids = [block.id for block in blocks]
    rig.store.put(1, blocks, stamp=2)
    assert rig.store.has(1, ids, verify=verify) == [Verdict.OK] * 3
    assert stamps(rig) == dict.fromkeys(ids, 2)
    asked = [ids[0], make_block(9).id, ids[1], ids[0]]
    answers = [Verdict.OK, Verdict.MISSING, Verdict.OK, Verdict.OK]
    assert rig.store.has(1, asked, verify=verify, stamp=6) == answers
    assert stamps(rig) == {ids[0]: 6, ids[1]: 6, ids[2]: 2}
    used = rig.store.status().used_bytes
    assert rig.store.has(1, asked, verify=verify, stamp=6) == answers
    assert rig.store.has(1, asked, verify=verify, stamp=5) == answers
    assert rig.store.put(1, blocks[:2], stamp=6) == [Verdict.PRESENT] * 2
    assert rig.store.status().used_bytes == used, "stamped already, so nothing is written"
    assert stamps(rig) == {ids[0]: 6, ids[1]: 6, ids[2]: 2}


def test_a_delete_keeps_what_is_stamped_at_or_above_its_cutoff(rig: Rig) -> None:
    blocks = make_blocks(4)
    ids = [block.id for block in blocks]
    for block, stamp in zip(blocks, (3, 4, 5, 3), strict=True):
        rig.store.put(1, [block], stamp=stamp)
    rig.store.has(1, [ids[3]], stamp=7)
    asked = [*ids, make_block(9).id, ids[0]]
    answers = [Verdict.OK, Verdict.KEPT, Verdict.KEPT, Verdict.KEPT, Verdict.MISSING, Verdict.MISSING]
    assert rig.store.delete(1, asked, cutoff=4) == answers
    assert stamps(rig) == {ids[1]: 4, ids[2]: 5, ids[3]: 7}
    assert rig.store.delete(1, ids, cutoff=6) == [Verdict.MISSING, Verdict.OK, Verdict.OK, Verdict.KEPT]
    assert rig.store.get(1, ids, bytes_max=ALL) == [*[Verdict.MISSING] * 3, blocks[3]]


def test_a_cutoff_below_the_highest_seen_is_refused(rig: Rig) -> None:
    block = make_block(1)
    rig.store.put(1, [block], stamp=1)
    assert rig.store.delete(1, [make_block(2).id], cutoff=6) == [Verdict.MISSING]
    with pytest.raises(HoldfastError) as refused:
        rig.store.delete(1, [block.id], cutoff=5)
    assert refused.value.code is ErrorCode.CONFLICT
    assert rig.store.has(1, [block.id]) == [Verdict.OK]
    assert rig.store.delete(1, [block.id], cutoff=6) == [Verdict.OK]


def test_the_highest_cutoff_is_a_tenants_own(rig: Rig) -> None:
    block = make_block(1)
    rig.store.put(2, [block], stamp=1)
    assert rig.store.delete(1, [block.id], cutoff=6) == [Verdict.MISSING]
    assert rig.store.delete(2, [block.id], cutoff=3) == [Verdict.OK], "its own oldest session may be older"


def test_a_block_that_was_deleted_begins_anew(rig: Rig) -> None:
    block = make_block(1)
    rig.store.put(1, [block], stamp=8)
    rig.store.delete(1, [block.id])
    assert rig.store.has(1, [block.id], stamp=9) == [Verdict.MISSING]
    assert rig.store.put(1, [block], stamp=2) == [Verdict.OK]
    assert stamps(rig) == {block.id: 2}


def test_a_corrupt_copy_is_not_listed_and_hands_its_stamp_on(rig: Rig) -> None:
    blocks = sorted(make_blocks(6), key=lambda block: (rig.partition_of(block.id), block.id))
    ids = [block.id for block in blocks]
    rig.store.put(1, blocks, stamp=7)
    rig.rot(1, blocks[2])
    assert rig.store.has(1, ids, verify=True, stamp=8)[2] is Verdict.CORRUPT
    assert stamps(rig) == dict.fromkeys([*ids[:2], *ids[3:]], 8)
    page = rig.store.scan(1, partition=None, after=ids[0], limit=3)
    assert [entry.block_id for entry in page] == [ids[1], ids[3], ids[4]], "a page is as long as was asked"
    assert rig.store.put(1, [blocks[2]], stamp=3) == [Verdict.OK]
    assert stamps(rig) == {**dict.fromkeys(ids, 8), ids[2]: 7}


def set_aside(rig: Rig, blocks: Sequence[SealedBlock]) -> None:
    """Let copies rot and be found; the markers become durable with the next write at the latest."""
    for block in blocks:
        rig.rot(1, block)
    assert rig.store.has(1, [block.id for block in blocks], verify=True) == [Verdict.CORRUPT] * len(blocks)
    rig.store.put(2, [make_block(99)])


def test_corrupt_copies_are_listed_as_such_where_that_is_asked_for(rig: Rig) -> None:
    blocks = sorted(make_blocks(30), key=lambda block: (rig.partition_of(block.id), block.id))
    for at, block in enumerate(blocks):
        rig.store.put(1, [block], stamp=1 + at % 3)
    rotten = blocks[::4]
    set_aside(rig, rotten)
    rig.behind.raise_floor([rig.partition_of(rotten[1].id)], 9)
    floors = {rig.partition_of(rotten[1].id): 9}
    expected = [
        BlockEntry(
            block.id,
            len(block.data),
            int(Kind.VOLUME),
            max(1 + at % 3, floors.get(rig.partition_of(block.id), 0)),
            at % 4 == 0,
        )
        for at, block in enumerate(blocks)
    ]
    whole = [entry for entry in expected if not entry.quarantined]
    assert rig.behind.scan(1, partition=None, after=b"", limit=100, with_quarantined=True) == expected
    for store in (rig.store, rig.behind):
        assert store.scan(1, partition=None, after=b"", limit=100) == whole
        walked: list[BlockEntry] = []
        while page := store.scan(
            1, partition=None, after=walked[-1].block_id if walked else b"", limit=7, with_quarantined=True
        ):
            walked.extend(page)
        assert [(e.block_id, e.length, e.stamp, e.quarantined) for e in walked] == [
            (e.block_id, e.length, e.stamp, e.quarantined) for e in expected
        ]
        for partition in range(16):
            here = store.scan(1, partition=partition, after=b"", limit=100, with_quarantined=True)
            assert [(entry.block_id, entry.quarantined) for entry in here] == [
                (e.block_id, e.quarantined) for e in expected if rig.partition_of(e.block_id) == partition
            ]


def test_a_delete_decides_about_corrupt_copies_as_about_whole_ones(rig: Rig) -> None:
    blocks = make_blocks(5)
    ids = [block.id for block in blocks]
    for block, stamp in zip(blocks, (3, 4, 5, 3, 3), strict=True):
        rig.store.put(1, [block], stamp=stamp)
    rig.store.has(1, [ids[3]], stamp=7)
    set_aside(rig, blocks)
    used = rig.behind.status()
    assert rig.store.put(1, [blocks[4]], stamp=6) == [Verdict.OK], "it takes the corrupt copy's place"
    answers = [Verdict.OK, Verdict.KEPT, Verdict.KEPT, Verdict.KEPT, Verdict.KEPT]
    assert rig.store.delete(1, ids, cutoff=4) == answers
    assert rig.store.delete(1, ids[:1], cutoff=4) == [Verdict.MISSING]
    assert rig.store.has(1, ids) == [Verdict.MISSING, *[Verdict.CORRUPT] * 3, Verdict.OK]
    rig.behind.raise_floor([rig.partition_of(ids[1])], 6)
    low = [block_id for block_id in ids[:4] if rig.partition_of(block_id) == rig.partition_of(ids[1])]
    assert ids[1] in low
    answers = [Verdict.KEPT if i in low else Verdict.OK for i in ids[1:3]]
    assert rig.store.delete(1, ids[1:3], cutoff=6) == answers
    assert rig.store.delete(1, ids[1:], cutoff=8)[2:] == [Verdict.OK] * 2
    assert rig.store.status().quarantined_count == 0
    assert rig.behind.tenants() == [2]
    assert rig.behind.status().block_count == used.block_count - 5
    assert rig.store.put(1, [blocks[0]], stamp=1) == [Verdict.OK]
    assert stamps(rig) == {ids[0]: 6 if ids[0] in low else 1}, "nothing of what went is left to hand on"


def test_the_same_block_of_two_tenants_has_two_stamps(rig: Rig) -> None:
    block = make_block(1)
    rig.store.put(1, [block], stamp=3)
    rig.store.put(2, [block], stamp=5)
    assert (stamps(rig, 1), stamps(rig, 2)) == ({block.id: 3}, {block.id: 5})
    assert rig.store.delete(1, [block.id], cutoff=4) == [Verdict.OK]
    assert rig.store.delete(2, [block.id], cutoff=4) == [Verdict.KEPT]


# What the block service does not offer is asked of the store behind it.


def test_tenants_are_those_of_which_something_is_held(rig: Rig) -> None:
    assert rig.behind.tenants() == []
    blocks = make_blocks(3)
    for tenant in (300, 2, 70_000):
        rig.store.put(tenant, blocks)
    assert rig.behind.tenants() == [2, 300, 70_000]
    rig.store.delete(300, [block.id for block in blocks])
    assert rig.behind.tenants() == [2, 70_000]


def expected_holdings(entries: dict[int, list[bytes]]) -> list[Holding]:
    return [
        Holding(tenant, len(ids), (sum(int.from_bytes(i, "big") for i in ids) % 2**256).to_bytes(32, "big"))
        for tenant, ids in sorted(entries.items())
        if ids
    ]


def test_holdings_are_counts_and_sums_of_ids_and_follow_every_change(rig: Rig) -> None:
    held: dict[int, list[bytes]] = {1: [], 2: []}

    def check() -> None:
        for partition in range(16):
            there = {tenant: [i for i in ids if rig.partition_of(i) == partition] for tenant, ids in held.items()}
            assert rig.behind.holdings(partition) == expected_holdings(there)

    blocks = make_blocks(60)
    check()
    for at in range(0, 60, 20):
        rig.store.put(1 + at % 40 // 20, blocks[at : at + 20])
        held[1 + at % 40 // 20].extend(block.id for block in blocks[at : at + 20])
        check()
    rig.store.has(1, held[1], stamp=4)
    gone = held[1][:7]
    rig.store.delete(1, gone)
    held[1] = held[1][7:]
    check()
    rotten = next(block for block in blocks if block.id == held[1][0])
    rig.rot(1, rotten)
    assert rig.store.get(1, [rotten.id], bytes_max=ALL) == [Verdict.CORRUPT]
    rig.store.put(1, [blocks[0]])
    held[1] = [*held[1][1:], blocks[0].id]
    check()
    rig.store.put(1, [rotten])
    held[1].append(rotten.id)
    check()


def test_copies_that_are_set_aside_are_listed(rig: Rig) -> None:
    blocks = sorted(make_blocks(5), key=lambda block: (rig.partition_of(block.id), block.id))
    for tenant in (1, 2):
        rig.store.put(tenant, blocks)
    assert rig.behind.quarantined(limit=10) == []
    for block in blocks[1:4]:
        rig.rot(1, block)
    for tenant in (2, 1):
        rig.store.get(tenant, [block.id for block in blocks], bytes_max=ALL)
    rig.store.put(1, [make_block(50)])
    damaged = [(tenant, block_id) for tenant, block_id in rig.behind.quarantined(limit=10) if tenant == 1]
    assert damaged == [(1, block.id) for block in blocks[1:4]]
    assert rig.behind.quarantined(limit=2) == damaged[:2]
    rig.store.put(1, [blocks[1]])
    rig.store.delete(1, [blocks[2].id])
    assert [i for tenant, i in rig.behind.quarantined(limit=10) if tenant == 1] == [blocks[3].id]


def test_a_floor_counts_for_what_is_there_and_what_comes(rig: Rig) -> None:
    blocks = make_blocks(40)
    rig.store.put(1, blocks[:30], stamp=2)
    low = {rig.partition_of(block.id) for block in blocks[::3]}
    rig.behind.raise_floor(sorted(low), 6)
    rig.behind.raise_floor(sorted(low), 5)
    rig.store.put(1, blocks[30:], stamp=3)
    expected = {
        block.id: 6 if rig.partition_of(block.id) in low else (2 if at < 30 else 3) for at, block in enumerate(blocks)
    }
    assert stamps(rig) == expected
    used = rig.store.status().used_bytes
    under = [block.id for block in blocks if expected[block.id] == 6]
    assert rig.store.has(1, under, stamp=6) == [Verdict.OK] * len(under)
    assert rig.store.status().used_bytes == used
    answers = rig.store.delete(1, [block.id for block in blocks], cutoff=6)
    assert answers == [Verdict.KEPT if expected[block.id] == 6 else Verdict.OK for block in blocks]
    assert rig.store.delete(1, under, cutoff=7) == [Verdict.OK] * len(under)


def test_the_epoch_learnt_only_rises(rig: Rig) -> None:
    block = make_block(1)
    rig.store.put(1, [block], stamp=1)
    for epoch, newest in ((0, 0), (4, 4), (3, 4), (4, 4), (5, 5)):
        rig.behind.learn_epoch(epoch)
        assert rig.behind.epoch == newest
    assert rig.behind.scan(1, partition=None, after=b"", limit=9) == [
        BlockEntry(block.id, len(block.data), int(Kind.VOLUME), 1)
    ], "stamps are of blocks, and to learn an epoch is no reason to stamp any"
