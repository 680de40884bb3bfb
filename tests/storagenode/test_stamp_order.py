"""Stamps, puts and deletes that meet before any of them is durable: the order in which they were decided counts."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

from holdfast_core.model.block import SealedBlock
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_storagenode.segments.engine import SegmentStore
from holdfast_storagenode.store import Verdict
from tests.storagenode.blocks import make_block, make_blocks
from tests.storagenode.cluster import wait_until
from tests.storagenode.engines import FaultyDisk, Recorder, open_engine, plant_rot

ALL = 1 << 30
Answer = TypeVar("Answer")


class Held:
    """An engine whose disk can hold syncs back, so that decisions pile up before any is durable."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.disk = FaultyDisk()
        self.recorder = Recorder()
        self.store = open_engine(directory, disk=self.disk, observer=self.recorder)
        self.store.learn_epoch(1)
        self._threads = ThreadPoolExecutor(8)
        self._chaff = 10_000

    def hold(self) -> None:
        """From here on nothing becomes durable; the committer waits in a sync."""
        self._chaff += 1
        self.disk.release.clear()
        self.store.submit(1, [make_block(self._chaff)])
        wait_until(lambda: not self.store._committer._queue)

    def release(self) -> None:
        """Let everything become durable."""
        self.disk.release.set()

    def decide(self, call: Callable[[], Answer]) -> Future[Answer]:
        """Make a call in a thread; return once it is decided, while its answer waits for the disk."""
        queued = len(self.store._committer._queue)
        answer = self._threads.submit(call)
        wait_until(lambda: len(self.store._committer._queue) > queued or answer.done())
        return answer

    def stamp_of(self, block: SealedBlock) -> int | None:
        """What a block counts as stamped with; None if it is not listed."""
        listed = {entry.block_id: entry.stamp for entry in self.store.scan(1, partition=None, after=b"", limit=999)}
        return listed.get(block.id)

    def close(self) -> None:
        """Release what is held."""
        self.release()
        self._threads.shutdown()
        self.store.close()


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    """An engine with a disk that can be held back."""
    engine = Held(tmp_path)
    yield engine
    engine.close()


def test_a_stamp_that_waits_for_the_disk_counts_in_a_delete(held: Held) -> None:
    blocks = make_blocks(3)
    held.store.put(1, blocks, stamp=2)
    held.hold()
    found = held.decide(lambda: held.store.has(1, [blocks[0].id], stamp=5))
    sent = held.decide(lambda: held.store.put(1, [blocks[1]], stamp=5))
    deleted = held.decide(lambda: held.store.delete(1, [block.id for block in blocks], cutoff=5))
    assert not any(answer.done() for answer in (found, sent, deleted))
    held.release()
    assert found.result() == [Verdict.OK]
    assert sent.result() == [Verdict.PRESENT]
    assert deleted.result() == [Verdict.KEPT, Verdict.KEPT, Verdict.OK]
    assert [held.stamp_of(block) for block in blocks] == [5, 5, None]
    assert held.store.get(1, [blocks[0].id, blocks[1].id], bytes_max=ALL) == blocks[:2]


def test_a_put_that_waits_for_the_disk_counts_in_a_delete(held: Held) -> None:
    block = make_block(1)
    held.hold()
    sent = held.store.submit(1, [block], stamp=5)
    kept = held.decide(lambda: held.store.delete(1, [block.id], cutoff=5))
    held.release()
    assert sent.result() == [Verdict.OK]
    assert kept.result() == [Verdict.KEPT]
    assert held.stamp_of(block) == 5


def test_a_block_that_has_the_stamp_is_not_found_behind_a_delete(held: Held) -> None:
    blocks = make_blocks(3)
    held.store.put(1, blocks, stamp=5)
    held.hold()
    deleted = held.decide(lambda: held.store.delete(1, [blocks[1].id], cutoff=6))
    found = held.decide(lambda: held.store.has(1, [block.id for block in blocks], stamp=5))
    held.release()
    assert deleted.result() == [Verdict.OK]
    assert found.result() == [Verdict.OK, Verdict.MISSING, Verdict.OK]


def test_a_block_that_has_the_stamp_is_found_without_a_wait(held: Held) -> None:
    blocks = make_blocks(3)
    held.store.put(1, blocks, stamp=5)
    held.hold()
    higher = held.decide(lambda: held.store.has(1, [blocks[0].id], stamp=7))
    found = held.decide(lambda: held.store.has(1, [block.id for block in blocks], stamp=5))
    assert found.done()
    assert found.result() == [Verdict.OK] * 3
    assert not higher.done()


def test_a_block_that_has_the_stamp_and_is_set_aside_is_corrupt(held: Held) -> None:
    block = make_block(1)
    held.store.put(1, [block], stamp=5)
    held.hold()
    plant_rot(held.directory, block.data)
    assert held.store.get(1, [block.id], bytes_max=ALL) == [Verdict.CORRUPT]
    # The marker is on its way, and then it is there.
    assert held.store.has(1, [block.id], stamp=5) == [Verdict.CORRUPT]
    held.release()
    wait_until(lambda: held.store.status().quarantined_count == 1)
    assert held.store.has(1, [block.id], stamp=5) == [Verdict.CORRUPT]


def test_what_comes_behind_a_delete_finds_nothing_and_a_put_writes_anew(held: Held) -> None:
    block = make_block(1)
    held.store.put(1, [block], stamp=2)
    held.hold()
    deleted = held.decide(lambda: held.store.delete(1, [block.id], cutoff=5))
    found = held.decide(lambda: held.store.has(1, [block.id], stamp=6))
    sent = held.store.submit(1, [block], stamp=6)
    again = held.decide(lambda: held.store.has(1, [block.id], stamp=7))
    held.release()
    assert deleted.result() == [Verdict.OK]
    assert found.result() == [Verdict.MISSING]
    assert sent.result() == [Verdict.OK]
    assert again.result() == [Verdict.OK]
    assert held.stamp_of(block) == 7
    assert held.store.get(1, [block.id], bytes_max=ALL) == [block]


def test_a_stamp_is_answered_when_it_is_durable_and_shared_by_who_asks_the_same(held: Held) -> None:
    block = make_block(1)
    held.store.put(1, [block], stamp=2)
    held.hold()
    first = held.decide(lambda: held.store.has(1, [block.id], stamp=5))
    second = held.decide(lambda: held.store.has(1, [block.id], stamp=5))
    third = held.decide(lambda: held.store.has(1, [block.id], stamp=4))
    assert not any(answer.done() for answer in (first, second, third))
    held.release()
    assert [first.result(), second.result(), third.result()] == [[Verdict.OK]] * 3
    assert held.recorder.stamps == [1], "one record for all three"


def test_who_builds_on_a_stamp_that_fails_fails_with_it(held: Held) -> None:
    block = make_block(1)
    held.store.put(1, [block], stamp=2)
    held.hold()
    answers = [held.decide(lambda: held.store.has(1, [block.id], stamp=5)) for _ in range(2)]
    answers.append(held.decide(lambda: held.store.put(1, [block], stamp=5)))
    held.disk.write_error = errno.ENOSPC
    held.release()
    for answer in answers:
        with pytest.raises(HoldfastError) as refused:
            answer.result()
        assert refused.value.code is ErrorCode.DISK_FULL
    held.disk.write_error = 0
    assert held.stamp_of(block) == 2
    assert held.store.has(1, [block.id], stamp=5) == [Verdict.OK]
    assert held.stamp_of(block) == 5


def test_a_stamp_does_not_make_a_block_of_a_put_that_failed(held: Held) -> None:
    """The put fails for want of space, the small record of the stamp behind it would fit."""
    block = make_block(1)
    held.hold()
    sent = held.store.submit(1, [block], stamp=2)
    found = held.decide(lambda: held.store.has(1, [block.id], stamp=5))
    again = held.decide(lambda: held.store.put(1, [block], stamp=5))
    held.disk.write_error = errno.ENOSPC
    held.release()
    for answer in (sent, found, again):
        with pytest.raises(HoldfastError):
            answer.result()
    held.disk.write_error = 0
    assert held.store.has(1, [block.id], stamp=6) == [Verdict.MISSING]
    assert held.store.put(1, [block], stamp=3) == [Verdict.OK]
    assert held.stamp_of(block) == 3


def test_a_failed_disk_still_answers_for_what_is_stamped_already(held: Held) -> None:
    block = make_block(1)
    held.store.put(1, [block], stamp=5)
    held.disk.sync_error = errno.EIO
    with pytest.raises(HoldfastError):
        held.store.put(1, [make_block(2)])
    assert held.store.has(1, [block.id], stamp=5) == [Verdict.OK]
    with pytest.raises(HoldfastError) as refused:
        held.store.has(1, [block.id], stamp=6)
    assert refused.value.code is ErrorCode.INTERNAL
    held.disk.sync_error = 0


def test_a_copy_that_is_being_set_aside_is_not_stamped_and_its_heir_keeps_the_stamp(held: Held) -> None:
    block = make_block(1)
    held.store.put(1, [block], stamp=7)
    plant_rot(held.directory, block.data)
    held.hold()
    assert held.store.get(1, [block.id], bytes_max=ALL) == [Verdict.CORRUPT]
    found = held.decide(lambda: held.store.has(1, [block.id], stamp=8))
    healed = held.store.submit(1, [block], stamp=2)
    kept = held.decide(lambda: held.store.delete(1, [block.id], cutoff=7))
    held.release()
    assert found.result() == [Verdict.CORRUPT]
    assert healed.result() == [Verdict.OK]
    assert kept.result() == [Verdict.KEPT]
    assert held.stamp_of(block) == 7


def test_compaction_moves_a_block_with_the_stamp_that_is_on_its_way(held: Held) -> None:
    store: SegmentStore = held.store
    blocks = make_blocks(30)
    store.put(1, blocks, stamp=2)
    store.delete(1, [block.id for block in blocks[:10]])
    held.hold()
    found = held.decide(lambda: store.has(1, [blocks[12].id], stamp=9))
    moving = held.decide(lambda: store.compact(dead_fraction_min=0.3))
    deleted = held.decide(lambda: store.delete(1, [blocks[12].id], cutoff=9))
    held.release()
    assert found.result() == [Verdict.OK]
    assert deleted.result() == [Verdict.KEPT]
    assert moving.result() > 0
    assert held.stamp_of(blocks[12]) == 9
    assert held.stamp_of(blocks[13]) == 2
    assert store.get(1, [block.id for block in blocks[10:]], bytes_max=ALL) == blocks[10:]


def test_stamping_and_deleting_side_by_side_never_lose_what_was_stamped(held: Held) -> None:
    """Whoever was told OK under an epoch finds the block as long as no cut-off is above that epoch."""
    store = held.store
    blocks = make_blocks(40, size=40)
    ids = [block.id for block in blocks]
    wrong: list[object] = []
    # A cut-off is never above the epoch of an open session; here a session is one block of one epoch.
    cutoff = [1]
    done = threading.Event()

    def lean() -> None:
        try:
            for epoch in range(2, 40):
                for block in blocks[:4]:
                    if store.has(1, [block.id], stamp=epoch) != [Verdict.OK]:
                        store.put(1, [block], stamp=epoch)
                    cutoff[0] = epoch
                    if store.has(1, [block.id]) != [Verdict.OK]:
                        wrong.append((epoch, block.id))
        finally:
            done.set()

    def collect() -> None:
        while not done.is_set():
            store.delete(1, ids, cutoff=cutoff[0])

    store.put(1, blocks, stamp=1)
    threads = [threading.Thread(target=lean), threading.Thread(target=collect)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert store.has(1, ids[:4]) == [Verdict.OK] * 4
    assert store.has(1, ids[4:]) == [Verdict.MISSING] * 36


def test_a_stamp_of_a_copy_that_was_removed_does_not_count_for_its_heir(held: Held) -> None:
    block = make_block(1)
    held.store.put(1, [block], stamp=2)
    held.hold()
    first = held.decide(lambda: held.store.has(1, [block.id], stamp=9))
    deleted = held.decide(lambda: held.store.delete(1, [block.id]))
    sent = held.store.submit(1, [block], stamp=3)
    again = held.decide(lambda: held.store.has(1, [block.id], stamp=9))
    held.release()
    assert [answer.result() for answer in (first, deleted, sent, again)] == [[Verdict.OK]] * 4
    assert held.stamp_of(block) == 9


@pytest.mark.slow
def test_many_ids_are_decided_in_parts_and_answered_in_order(held: Held) -> None:
    blocks = make_blocks(3, size=40)
    held.store.put(1, blocks, stamp=1)
    unknown = [number.to_bytes(32, "big") for number in range(5000)]
    asked = [blocks[0].id, *unknown, blocks[1].id, *unknown, blocks[2].id]
    answers = [Verdict.OK, *[Verdict.MISSING] * 5000, Verdict.OK, *[Verdict.MISSING] * 5000, Verdict.OK]
    assert held.store.has(1, asked, stamp=4) == answers
    assert held.store.has(1, asked, verify=True, stamp=5) == answers
    assert held.store.has(1, [], stamp=6) == []
    assert [held.stamp_of(block) for block in blocks] == [5, 5, 5]
    assert held.store.delete(1, asked, cutoff=6) == answers
    assert held.store.delete(1, [], cutoff=6) == []
