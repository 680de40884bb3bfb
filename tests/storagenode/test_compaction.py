"""Compaction: dead space comes back, living blocks stay, deleted ones stay deleted, corrupt ones are kept."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import KIB, MIB
from holdfast_storagenode.segments.engine import EngineOptions, SegmentStore
from holdfast_storagenode.store import Verdict
from tests.storagenode.blocks import make_blocks
from tests.storagenode.engines import Recorder, open_engine, plant_rot, segment_paths

ALL = 1 << 30


def compact_all(store: SegmentStore, dead_fraction_min: float = 0.3) -> int:
    freed = 0
    # Less than this is a file of tombstones, which have to be carried on and free nothing.
    while (step := store.compact(dead_fraction_min=dead_fraction_min)) > 200:
        freed += step
    return freed


@pytest.mark.parametrize("rebuild", [False, True], ids=["index", "rebuilt"])
def test_dead_space_comes_back_and_the_living_stay(tmp_path: Path, rebuild: bool) -> None:
    store = open_engine(tmp_path)
    blocks = make_blocks(120)
    store.put(1, blocks)
    dead = [block for at, block in enumerate(blocks) if at % 4]
    store.delete(1, [block.id for block in dead])
    store.put(1, dead[:3])
    used = store.status().used_bytes
    freed = compact_all(store)
    # Each new file has a header of its own.
    assert 0 <= store.status().used_bytes - (used - freed) < 500
    assert store.status().used_bytes < used / 2
    assert sum(path.stat().st_size for path in segment_paths(tmp_path)) == store.status().used_bytes
    alive = [block for block in blocks if block not in dead[3:]]
    gone = [block.id for block in dead[3:]]

    def check(checked: SegmentStore) -> None:
        assert checked.get(1, [block.id for block in alive], bytes_max=ALL) == alive
        assert checked.has(1, gone) == [Verdict.MISSING] * len(gone)
        assert checked.status().block_count == len(alive)

    check(store)
    store.close()
    if rebuild:
        shutil.rmtree(tmp_path / "index")
    again = open_engine(tmp_path)
    check(again)
    compact_all(again, 0.01)
    check(again)
    again.close()
    shutil.rmtree(tmp_path / "index")
    third = open_engine(tmp_path)
    check(third)
    third.close()


def test_a_small_store_that_is_full_of_garbage_gives_it_back(tmp_path: Path) -> None:
    options = EngineOptions(capacity_bytes=24 * MIB, reserve_bytes=0)
    store = open_engine(tmp_path, options=options)
    blocks = make_blocks(400, size=64 * KIB)

    def fill() -> None:
        for block in blocks:
            store.put(1, [block])

    with pytest.raises(HoldfastError) as refused:
        fill()
    assert refused.value.code is ErrorCode.DISK_FULL
    assert store.status().full
    store.delete(1, [block.id for block in blocks])
    while store.compact(dead_fraction_min=0.1) > MIB:
        pass
    assert not store.status().full
    # What was written to last stays as it is until it is finished.
    assert store.status().used_bytes < 3 * MIB
    store.close()


def test_a_tombstone_outlives_every_older_copy(tmp_path: Path) -> None:
    """The copy is in an old segment that stays, the tombstone in a younger one that is compacted."""
    store = open_engine(tmp_path)
    old = make_blocks(14)
    store.put(1, old)
    store.put(1, make_blocks(8, first=50))
    store.delete(1, [old[0].id])
    store.put(1, make_blocks(20, first=100))
    store.delete(1, [b.id for b in (*make_blocks(8, first=50), *make_blocks(20, first=100))])
    compact_all(store, 0.5)
    assert (tmp_path / "segments" / "00000001.seg").exists()
    store.close()
    shutil.rmtree(tmp_path / "index")
    again = open_engine(tmp_path)
    assert again.has(1, [b.id for b in old]) == [Verdict.MISSING, *[Verdict.OK] * 13]
    again.close()


def test_a_corrupt_copy_is_kept_and_never_served(tmp_path: Path) -> None:
    store = open_engine(tmp_path)
    blocks = make_blocks(40)
    store.put(1, blocks)
    plant_rot(tmp_path, blocks[2].data)
    plant_rot(tmp_path, blocks[3].data)
    assert store.has(1, [blocks[2].id], verify=True) == [Verdict.CORRUPT]
    store.delete(1, [block.id for block in blocks[5:15]])
    freed = compact_all(store)
    assert freed
    assert not (tmp_path / "segments" / "00000001.seg").exists()
    assert store.has(1, [b.id for b in blocks[1:5]]) == [Verdict.OK, Verdict.CORRUPT, Verdict.CORRUPT, Verdict.OK]
    assert store.status().quarantined_count == 2, "the one that compaction found is counted too"
    store.close()
    shutil.rmtree(tmp_path / "index")
    recorder = Recorder()
    again = open_engine(tmp_path, observer=recorder)
    assert again.has(1, [b.id for b in blocks[1:5]]) == [Verdict.OK, Verdict.CORRUPT, Verdict.CORRUPT, Verdict.OK]
    assert again.put(1, blocks[2:4]) == [Verdict.OK, Verdict.OK]
    assert again.get(1, [b.id for b in blocks[:5]], bytes_max=ALL) == blocks[:5]
    again.close()


def test_a_segment_with_a_damaged_range_stays(tmp_path: Path) -> None:
    store = open_engine(tmp_path)
    blocks = make_blocks(40)
    store.put(1, blocks)
    store.delete(1, [block.id for block in blocks[3:13]])
    first = segment_paths(tmp_path)[0]
    with open(first, "r+b") as file:
        file.seek(32)
        file.write(b"\0" * 8)
    compact_all(store)
    assert first.exists()
    assert store.get(1, [block.id for block in blocks[:3]], bytes_max=ALL) == blocks[:3], "the index still finds it"
    store.close()


@pytest.mark.slow
def test_readers_and_writers_go_on_meanwhile(tmp_path: Path) -> None:
    store = open_engine(tmp_path)
    alive = make_blocks(100)
    store.put(1, alive)
    stop = threading.Event()
    wrong: list[object] = []

    def read() -> None:
        ids = [block.id for block in alive]
        while not stop.is_set():
            if store.get(1, ids, bytes_max=ALL) != alive:
                wrong.append("a block was not there")
                return

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    freed = 0
    for turn in range(12):
        chaff = make_blocks(30, first=1000 + 100 * turn)
        store.put(1, chaff)
        store.delete(1, [block.id for block in chaff])
        freed += compact_all(store, 0.2)
    stop.set()
    for reader in readers:
        reader.join()
    assert wrong == []
    assert freed > 12 * 30 * 1000 * 0.8
    store.close()
