"""Tallies of partitions: counted while writes go on, kept up afterwards, bounded in number."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from holdfast_storagenode.segments.engine import EngineOptions
from holdfast_storagenode.segments.holdings import HoldingsBook
from holdfast_storagenode.segments.index import make_key
from holdfast_storagenode.store import Holding
from tests.storagenode.blocks import make_blocks
from tests.storagenode.engines import open_engine

LOCK = threading.Lock()


def ids(*numbers: int) -> list[bytes]:
    return [number.to_bytes(32, "big") for number in numbers]


def holding(tenant: int, *numbers: int) -> Holding:
    return Holding(tenant, len(numbers), (sum(numbers) % 2**256).to_bytes(32, "big"))


class Blocks:
    """Keys by partition, with a hook that runs while a partition is being counted."""

    def __init__(self) -> None:
        self.keys: set[bytes] = set()
        self.counted: list[int] = []
        self.meanwhile: Callable[[], None] = lambda: None

    def change(self, book: HoldingsBook, tenant: int, partition: int, *numbers: int, sign: int = +1) -> None:
        with LOCK:
            for block_id in ids(*numbers):
                key = make_key(tenant, partition, block_id)
                (self.keys.add if sign > 0 else self.keys.remove)(key)
                book.note(key, sign)

    @contextmanager
    def counting(self, partition: int) -> Iterator[Iterable[bytes]]:
        """Lend the keys as they are now."""
        assert LOCK.locked()
        self.counted.append(partition)
        view = [key for key in self.keys if key[4:6] == partition.to_bytes(2, "big")]

        def keys() -> Iterator[bytes]:
            assert not LOCK.locked()
            self.meanwhile()
            yield from view

        yield keys()


def test_a_partition_is_counted_once_and_then_kept_up() -> None:
    book, blocks = HoldingsBook(), Blocks()
    blocks.change(book, 1, 7, 10, 20)
    blocks.change(book, 2, 8, 30)
    assert book.of(7, LOCK, blocks.counting) == [holding(1, 10, 20)]
    blocks.change(book, 2, 7, 5)
    blocks.change(book, 1, 7, 10, sign=-1)
    blocks.change(book, 1, 8, 11)
    assert book.of(7, LOCK, blocks.counting) == [holding(1, 20), holding(2, 5)]
    blocks.change(book, 1, 7, 20, sign=-1)
    assert book.of(7, LOCK, blocks.counting) == [holding(2, 5)]
    assert book.of(8, LOCK, blocks.counting) == [holding(1, 11), holding(2, 30)]
    assert blocks.counted == [7, 8]


def test_sums_wrap_around() -> None:
    book, blocks = HoldingsBook(), Blocks()
    largest = 2**256 - 1
    blocks.change(book, 1, 0, largest, 2, 3)
    assert book.of(0, LOCK, blocks.counting) == [Holding(1, 3, (4).to_bytes(32, "big"))]


def test_what_changes_while_it_is_counted_counts_once() -> None:
    book, blocks = HoldingsBook(), Blocks()
    blocks.change(book, 1, 7, 10, 20)
    blocks.change(book, 2, 7, 40)

    def meanwhile() -> None:
        blocks.meanwhile = lambda: None
        blocks.change(book, 1, 7, 30)
        blocks.change(book, 1, 7, 10, sign=-1)
        blocks.change(book, 2, 7, 40, sign=-1)
        blocks.change(book, 3, 7, 50)

    blocks.meanwhile = meanwhile
    expected = [holding(1, 20, 30), holding(3, 50)]
    assert book.of(7, LOCK, blocks.counting) == expected
    assert book.of(7, LOCK, blocks.counting) == expected
    assert blocks.counted == [7]


def test_tallies_are_bounded_and_the_rest_is_counted_each_time() -> None:
    book, blocks = HoldingsBook(tallies_max=3), Blocks()
    for partition in range(5):
        blocks.change(book, 1, partition, partition)
    for _ in range(3):
        for partition in range(5):
            assert book.of(partition, LOCK, blocks.counting) == [holding(1, partition)]
    assert [blocks.counted.count(partition) for partition in range(5)] == [1, 1, 1, 3, 3]
    assert len(book.partitions) == 3
    # One that grows past the bound is given up, which makes room again.
    blocks.change(book, 2, 0, 9)
    assert book.of(0, LOCK, blocks.counting) == [holding(1, 0), holding(2, 9)]
    assert sum(len(partition.tenants) for partition in book.partitions.values()) <= 3


def test_a_count_that_fails_leaves_nothing_behind() -> None:
    book, blocks = HoldingsBook(), Blocks()
    blocks.change(book, 1, 7, 10)

    def fails() -> None:
        raise OSError("the index cannot be read")

    blocks.meanwhile = fails
    with pytest.raises(OSError, match="cannot be read"):
        book.of(7, LOCK, blocks.counting)
    blocks.meanwhile = lambda: None
    assert book.of(7, LOCK, blocks.counting) == [holding(1, 10)]


@pytest.mark.slow
@pytest.mark.parametrize("tallies_max", [0, 10, 1000])
def test_an_engines_holdings_are_true_whatever_is_written_and_checkpointed_meanwhile(
    tmp_path: Path, tallies_max: int
) -> None:
    options = EngineOptions(capacity_bytes=1 << 30, reserve_bytes=0, segment_bytes=30_000, checkpoint_entries=50)
    store = open_engine(tmp_path, options=options)
    store._table.holdings = HoldingsBook(tallies_max=tallies_max)
    writing = threading.Event()

    def write() -> None:
        for turn in range(12):
            blocks = make_blocks(60, size=40, first=60 * turn)
            store.put(1 + turn % 2, blocks)
            store.delete(1 + turn % 2, [block.id for block in blocks[::3]])
            store.compact(dead_fraction_min=0.2)
        writing.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not writing.is_set():
        for partition in range(16):
            # Never more than was ever put, and never a tally that was taken from the middle of a count.
            assert all(0 < held.count <= 360 for held in store.holdings(partition))
    writer.join()
    for partition in range(16):
        listed = {
            tenant: [entry.block_id for entry in store.scan(tenant, partition=partition, after=b"", limit=999)]
            for tenant in (1, 2)
        }
        assert sum(map(len, listed.values())) > 0
        assert store.holdings(partition) == [
            holding(tenant, *(int.from_bytes(block_id, "big") for block_id in found))
            for tenant, found in listed.items()
            if found
        ]
    store.close()
