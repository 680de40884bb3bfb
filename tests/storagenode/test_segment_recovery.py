"""What a start makes of what it finds: torn tails, lost and damaged indexes, rot in the middle, half-made files."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from holdfast_core.model.block import SealedBlock
from holdfast_core.model.errors import HoldfastError
from holdfast_storagenode.segments.engine import EngineOptions, SegmentStore
from holdfast_storagenode.segments.record import (
    FILE_HEADER_BYTES,
    RECORD_HEADER_BYTES,
    RecordFormat,
    RecordHeader,
    RecordType,
)
from holdfast_storagenode.store import Verdict
from tests.storagenode.blocks import flip, make_block, make_blocks, partition_of
from tests.storagenode.engines import INCARNATION, SMALL, Recorder, open_engine, plant_rot, segment_paths

ALL = 1 << 30


def copy_live(store_directory: Path, to: Path) -> Path:
    """Copy what a running store has on disk, as a crash would leave it."""
    shutil.copytree(store_directory, to)
    return to


def read_all(store: SegmentStore, blocks: list[SealedBlock]) -> list[object]:
    return list(store.get(1, [block.id for block in blocks], bytes_max=ALL))


def test_blocks_survive_a_crash_without_any_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "live").mkdir()
    store = open_engine(tmp_path / "live")
    blocks = make_blocks(60)
    store.put(1, blocks)
    store.delete(1, [blocks[7].id])
    crashed = copy_live(tmp_path / "live", tmp_path / "crashed")
    store.close()
    recorder = Recorder()
    again = open_engine(crashed, observer=recorder)
    assert len(segment_paths(crashed)) > 2, "the test means to span segments"
    expected: list[object] = list(blocks)
    expected[7] = Verdict.MISSING
    assert read_all(again, blocks) == expected
    assert recorder.replays == [61]
    assert recorder.tails == []
    assert again.status().block_count == 59
    again.close()


def test_only_the_log_behind_the_checkpoint_is_replayed(tmp_path: Path) -> None:
    store = open_engine(tmp_path)
    store.put(1, make_blocks(20))
    assert store.checkpoint()
    late = make_blocks(3, first=50)
    store.put(1, late)
    crashed = copy_live(tmp_path, tmp_path / "crashed")
    store.close()
    recorder = Recorder()
    again = open_engine(crashed, observer=recorder)
    assert recorder.replays == [3]
    assert read_all(again, [*make_blocks(20), *late]) == [*make_blocks(20), *late]
    again.close()
    recorder = Recorder()
    open_engine(crashed, observer=recorder).close()
    assert recorder.replays == [0], "a clean end leaves nothing to replay"


def test_a_torn_tail_is_cut_and_reported_at_every_offset(tmp_path: Path) -> None:
    live = tmp_path / "live"
    live.mkdir()
    store = open_engine(live)
    kept = make_blocks(2, size=40)
    store.put(1, kept)
    (segment,) = segment_paths(live)
    whole = segment.stat().st_size
    last = make_block(9, size=1)
    store.put(1, [last])
    crashed = copy_live(live, tmp_path / "crashed")
    store.close()
    (segment,) = segment_paths(crashed)
    content = segment.read_bytes()
    shutil.rmtree(crashed / "index")
    for length in range(whole + 1, len(content)):
        segment.write_bytes(content[:length])
        recorder = Recorder()
        again = open_engine(crashed, observer=recorder)
        assert recorder.tails == [(1, whole, length - whole)]
        assert read_all(again, [*kept, last]) == [*kept, Verdict.MISSING]
        assert segment.stat().st_size == whole
        if length % 16 == 0:
            assert again.put(1, [last]) == [Verdict.OK], "the log goes on where it was cut"
            assert read_all(again, [*kept, last]) == [*kept, last]
        again.close()
        shutil.rmtree(crashed / "index")


@pytest.mark.parametrize("tail", [b"\0" * 5000, b"HFR1" * 40, b"HFR1" + bytes(60), b"\xff" * 100])
def test_a_tail_of_anything_but_records_is_cut(tmp_path: Path, tail: bytes) -> None:
    store = open_engine(tmp_path)
    blocks = make_blocks(3)
    store.put(1, blocks)
    store.close()
    (segment,) = segment_paths(tmp_path)
    size = segment.stat().st_size
    with open(segment, "ab") as file:
        file.write(tail)
    recorder = Recorder()
    again = open_engine(tmp_path, observer=recorder)
    assert recorder.tails == [(1, size, len(tail))]
    assert read_all(again, blocks) == blocks
    again.close()


def _delete(index: Path) -> None:
    shutil.rmtree(index)


def _truncate(index: Path) -> None:
    data = index / "data.mdb"
    data.write_bytes(data.read_bytes()[:5000])


def _empty(index: Path) -> None:
    (index / "data.mdb").write_bytes(b"")


def _noise(index: Path) -> None:
    data = index / "data.mdb"
    data.write_bytes(random.Random(3).randbytes(data.stat().st_size))


def _noise_behind_the_head(index: Path) -> None:
    data = index / "data.mdb"
    content = data.read_bytes()
    data.write_bytes(content[:8192] + random.Random(3).randbytes(len(content) - 8192))


@pytest.mark.parametrize("damage", [_delete, _truncate, _empty, _noise, _noise_behind_the_head])
def test_a_lost_or_damaged_index_is_rebuilt(tmp_path: Path, damage: object) -> None:
    store = open_engine(tmp_path)
    blocks = make_blocks(60)
    store.put(1, blocks)
    store.put(2, blocks[:5])
    store.delete(1, [blocks[3].id])
    store.put(1, [blocks[3]])
    store.delete(1, [blocks[4].id])
    before = store.status()
    store.close()
    assert callable(damage)
    damage(tmp_path / "index")
    recorder = Recorder()
    again = open_engine(tmp_path, observer=recorder)
    assert len(recorder.rebuilds) == 1
    expected: list[object] = list(blocks)
    expected[4] = Verdict.MISSING
    assert read_all(again, blocks) == expected
    assert again.get(2, [block.id for block in blocks[:6]], bytes_max=ALL) == [*blocks[:5], Verdict.MISSING]
    assert again.status() == before
    again.close()
    recorder = Recorder()
    open_engine(tmp_path, observer=recorder).close()
    assert recorder.rebuilds == [], "once rebuilt it is good"


def test_an_entry_that_lies_is_noticed_and_the_next_start_rebuilds(tmp_path: Path) -> None:
    store = open_engine(tmp_path)
    blocks = make_blocks(30)
    store.put(1, blocks)
    store.close()
    data = tmp_path / "index" / "data.mdb"
    # The key stays whole, so the structure is sound; the place that it points to is another.
    data.write_bytes(flip(data.read_bytes(), blocks[0].id, at=33))
    store = open_engine(tmp_path)
    with pytest.raises(HoldfastError, match="index is damaged"):
        store.get(1, [blocks[0].id], bytes_max=ALL)
    store.close()
    recorder = Recorder()
    again = open_engine(tmp_path, observer=recorder)
    assert recorder.rebuilds == ["it was caught with a wrong entry"]
    assert read_all(again, blocks) == blocks
    again.close()
    recorder = Recorder()
    open_engine(tmp_path, observer=recorder).close()
    assert recorder.rebuilds == []


def test_a_rebuild_in_pieces_bounds_memory_and_ends_the_same(tmp_path: Path) -> None:
    store = open_engine(tmp_path)
    blocks = make_blocks(3000, size=40)
    store.put(1, blocks)
    store.close()
    shutil.rmtree(tmp_path / "index")
    options = EngineOptions(
        capacity_bytes=1 << 30, reserve_bytes=0, segment_bytes=SMALL.segment_bytes, checkpoint_entries=500
    )
    again = open_engine(tmp_path, options=options)
    assert again.status().block_count == 3000
    assert read_all(again, blocks[:500]) == blocks[:500]
    again.close()


def test_segments_that_were_cut_behind_the_index_are_noticed(tmp_path: Path) -> None:
    store = open_engine(tmp_path)
    blocks = make_blocks(5)
    store.put(1, blocks)
    store.close()
    (segment,) = segment_paths(tmp_path)
    segment.write_bytes(segment.read_bytes()[: FILE_HEADER_BYTES + 2 * (RECORD_HEADER_BYTES + len(blocks[0].data))])
    recorder = Recorder()
    again = open_engine(tmp_path, observer=recorder)
    assert recorder.rebuilds == ["segment 1 is shorter than the index says"]
    assert read_all(again, blocks) == [*blocks[:2], *[Verdict.MISSING] * 3]
    again.close()


def test_a_lost_segment_loses_its_blocks_and_no_others(tmp_path: Path) -> None:
    store = open_engine(tmp_path)
    blocks = make_blocks(60)
    store.put(1, blocks)
    store.close()
    segment_paths(tmp_path)[1].unlink()
    recorder = Recorder()
    again = open_engine(tmp_path, observer=recorder)
    assert recorder.rebuilds == ["segment 2 is gone"]
    found = read_all(again, blocks)
    assert 0 < found.count(Verdict.MISSING) < 30
    assert [f for f in found if f is not Verdict.MISSING] == [
        b for b, f in zip(blocks, found, strict=True) if f is not Verdict.MISSING
    ]
    again.close()


def test_rot_in_the_middle_is_quarantined_by_a_rebuild(tmp_path: Path) -> None:
    store = open_engine(tmp_path)
    blocks = make_blocks(40)
    store.put(1, blocks)
    store.close()
    plant_rot(tmp_path, blocks[11].data)
    shutil.rmtree(tmp_path / "index")
    recorder = Recorder()
    again = open_engine(tmp_path, observer=recorder)
    assert recorder.quarantines == [blocks[11].id]
    assert again.status().quarantined_count == 1
    assert again.has(1, [blocks[11].id]) == [Verdict.CORRUPT]
    assert read_all(again, blocks)[:11] == blocks[:11]
    assert read_all(again, blocks)[12:] == blocks[12:]
    again.close()


def test_a_rotten_header_is_stepped_over_and_reported(tmp_path: Path) -> None:
    store = open_engine(tmp_path)
    blocks = make_blocks(10)
    store.put(1, blocks)
    store.close()
    (segment,) = segment_paths(tmp_path)
    record = RECORD_HEADER_BYTES + len(blocks[0].data)
    content = bytearray(segment.read_bytes())
    content[FILE_HEADER_BYTES + 4 * record + 9] ^= 1
    segment.write_bytes(bytes(content))
    shutil.rmtree(tmp_path / "index")
    recorder = Recorder()
    again = open_engine(tmp_path, observer=recorder)
    assert recorder.gaps == [(1, FILE_HEADER_BYTES + 4 * record, record)]
    assert recorder.tails == []
    assert read_all(again, blocks) == [*blocks[:4], Verdict.MISSING, *blocks[5:]]
    again.close()


def test_bytes_of_a_block_that_imitate_a_record_are_not_believed(tmp_path: Path) -> None:
    """A tenant who stores a tombstone for another's block must not see it take effect after damage."""
    victim = make_block(1)
    forged = RecordFormat(bytes(16)).pack(RecordHeader(RecordType.TOMBSTONE, 1, victim.id))
    true_form = RecordFormat(INCARNATION).pack(RecordHeader(RecordType.TOMBSTONE, 1, victim.id))
    assert forged[:56] == true_form[:56]
    store = open_engine(tmp_path)
    store.put(1, [victim])
    store.close()
    (segment,) = segment_paths(tmp_path)
    with open(segment, "ab") as file:
        file.write(b"damage" + forged * 20)
    shutil.rmtree(tmp_path / "index")
    again = open_engine(tmp_path)
    assert read_all(again, [victim]) == [victim]
    again.close()


def test_a_quarantine_marker_survives_a_crash(tmp_path: Path) -> None:
    live = tmp_path / "live"
    live.mkdir()
    store = open_engine(live)
    blocks = make_blocks(3)
    store.put(1, blocks)
    assert store.checkpoint()
    plant_rot(live, blocks[0].data)
    assert read_all(store, blocks)[0] is Verdict.CORRUPT
    store.put(1, [make_block(77)])
    crashed = copy_live(live, tmp_path / "crashed")
    store.close()
    again = open_engine(crashed)
    assert again.status().quarantined_count == 1
    assert again.has(1, [blocks[0].id]) == [Verdict.CORRUPT]
    again.close()


def test_a_segment_whose_making_was_interrupted_is_completed(tmp_path: Path) -> None:
    store = open_engine(tmp_path)
    blocks = make_blocks(3)
    store.put(1, blocks)
    store.close()
    (tmp_path / "segments" / "00000002.seg").write_bytes(b"HFS")
    again = open_engine(tmp_path)
    late = make_block(50)
    assert again.put(1, [late]) == [Verdict.OK]
    again.close()
    assert segment_paths(tmp_path)[1].read_bytes()[:FILE_HEADER_BYTES] == RecordFormat(INCARNATION).file_header(2)
    shutil.rmtree(tmp_path / "index")
    third = open_engine(tmp_path)
    assert read_all(third, [*blocks, late]) == [*blocks, late]
    third.close()


def test_the_bytes_of_a_record_are_fixed() -> None:
    header = RecordHeader(RecordType.BLOCK, 0x01020304, bytes(range(32)), kind=2, length=0x0A0B)
    packed = RecordFormat(INCARNATION).pack(header)
    assert packed.hex() == GOLDEN_HEADER
    assert RecordFormat(INCARNATION).parse(packed) == header
    assert RecordFormat(INCARNATION).file_header(7).hex() == GOLDEN_FILE_HEADER
    for bit in range(8 * len(packed)):
        broken = bytearray(packed)
        broken[bit // 8] ^= 1 << bit % 8
        assert RecordFormat(INCARNATION).parse(bytes(broken)) is None
    assert partition_of(header.block_id) == 0


GOLDEN_HEADER = (
    "4846523101020000040302010b0a000000000000000000000001020304050607"
    "08090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f2fe52de3f74a43c5"
)
GOLDEN_FILE_HEADER = "4846534707000000000102030405060708090a0b0c0d0e0fa5f9d76d77b23967"
