"""One suite for every block store: the segment engine, the one in memory, and both kinds of node behind gRPC."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from holdfast_core.model.block import Kind, SealedBlock, verify_view
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_storagenode.embedded import EmbeddedStorageNode
from holdfast_storagenode.memory import MemoryStore
from holdfast_storagenode.segments.engine import EngineOptions
from holdfast_storagenode.store import BlockStore, PartitionOf, Verdict
from tests.storagenode.blocks import make_block, make_blocks, partition_of
from tests.storagenode.cluster import HeartbeatCoordinator, LoopThread, eventually, make_layout
from tests.storagenode.engines import SMALL, open_engine, plant_rot
from tests.storagenode.remote import RemoteStore

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
