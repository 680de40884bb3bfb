"""What a start makes of stamps: kept exactly by a replay, not trusted where the log or the index lost something."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import lmdb
import pytest

from holdfast_core.model.block import block_id
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_storagenode.memory import MemoryStore
from holdfast_storagenode.segments.epochs import EPOCHS_NAME
from holdfast_storagenode.segments.record import RECORD_HEADER_BYTES, RecordFormat, RecordHeader, RecordType
from holdfast_storagenode.store import BlockStore, Verdict
from tests.storagenode.blocks import flip, make_block, make_blocks, partition_of
from tests.storagenode.engines import INCARNATION, Recorder, open_engine, plant_rot, segment_paths

BLOCKS = make_blocks(12, size=60)
IDS = [block.id for block in BLOCKS]


@pytest.fixture
def live(tmp_path: Path) -> Path:
    """The directory of the store under test."""
    directory = tmp_path / "live"
    directory.mkdir()
    return directory


def crash(directory: Path, name: str = "crashed") -> Path:
    """Copy what a running store has on disk, as a crash would leave it."""
    return Path(shutil.copytree(directory, directory.with_name(name)))


def stamps(store: BlockStore) -> dict[bytes, int]:
    return {entry.block_id: entry.stamp for entry in store.scan(1, partition=None, after=b"", limit=999)}


def code_of_delete(store: BlockStore, *, cutoff: int) -> ErrorCode | None:
    """Return how a delete of an unknown block is refused, None if it is not."""
    try:
        store.delete(1, [make_block(999).id], cutoff=cutoff)
    except HoldfastError as error:
        return error.code
    return None


@pytest.mark.parametrize("checkpoint", ["none", "before", "between", "after"])
def test_stamps_survive_a_crash_exactly(live: Path, checkpoint: str) -> None:
    store = open_engine(live)
    store.learn_epoch(2)
    store.put(1, BLOCKS, stamp=2)
    assert checkpoint != "before" or store.checkpoint()
    store.has(1, IDS[:4], stamp=5)
    assert checkpoint != "between" or store.checkpoint()
    store.put(1, BLOCKS[2:6], stamp=6)
    store.delete(1, [IDS[0]], cutoff=6)
    store.delete(1, [IDS[11]], cutoff=6)
    store.put(1, [BLOCKS[11]], stamp=3)
    assert checkpoint != "after" or store.checkpoint()
    expected = {IDS[1]: 5, **dict.fromkeys(IDS[2:6], 6), **dict.fromkeys(IDS[6:11], 2), IDS[11]: 3}
    assert stamps(store) == expected
    crashed = crash(live)
    store.close()
    recorder = Recorder()
    for directory in (crashed, live):
        again = open_engine(directory, observer=recorder)
        assert stamps(again) == expected
        assert again.epoch == 2
        assert again.delete(1, list(expected), cutoff=2) == [Verdict.KEPT] * len(expected), (
            "a late delete takes nothing"
        )
        assert code_of_delete(again, cutoff=6) is None
        again.close()
    assert recorder.unknown == []


@pytest.mark.slow
def test_a_torn_tail_of_stamps_is_cut_at_every_offset(live: Path) -> None:
    store = open_engine(live)
    store.learn_epoch(1)
    store.put(1, BLOCKS[:3], stamp=1)
    store.has(1, IDS[:1], stamp=4)
    (segment,) = segment_paths(live)
    whole = segment.stat().st_size
    store.has(1, IDS[:3], stamp=5)
    crashed = crash(live)
    store.close()
    (segment,) = segment_paths(crashed)
    content = segment.read_bytes()
    assert len(content) == whole + RECORD_HEADER_BYTES + 3 * 32, "ids share one record"
    for length in range(whole + 1, len(content)):
        torn = crash(crashed, "torn")
        segment_paths(torn)[0].write_bytes(content[:length])
        recorder = Recorder()
        again = open_engine(torn, observer=recorder)
        assert recorder.tails == [(1, whole, length - whole)]
        assert recorder.unknown == []
        assert stamps(again) == {IDS[0]: 4, IDS[1]: 1, IDS[2]: 1}
        if length % 16 == 0:
            assert again.has(1, IDS[:3], stamp=5) == [Verdict.OK] * 3
            assert stamps(again) == dict.fromkeys(IDS[:3], 5)
        again.close()
        shutil.rmtree(torn)


def test_stamps_outlive_the_records_that_compaction_drops(live: Path) -> None:
    store = open_engine(live)
    store.learn_epoch(1)
    blocks = make_blocks(60)
    store.put(1, blocks, stamp=1)
    for epoch in range(2, 12):
        store.has(1, [block.id for block in blocks[::2]], stamp=epoch)
    store.delete(1, [block.id for block in blocks[1::2]], cutoff=2)
    used = store.status().used_bytes
    expected = {block.id: 11 for block in blocks[::2]}
    while store.compact(dead_fraction_min=0.01) > 200:
        assert stamps(store) == expected
    assert store.status().used_bytes < used - 10 * 30 * 32, "records of stamps are dead space"
    crashed = crash(live)
    store.close()
    for directory in (crashed, live):
        again = open_engine(directory)
        assert stamps(again) == expected
        assert again.delete(1, list(expected), cutoff=11) == [Verdict.KEPT] * 30
        again.close()


def lost_index(directory: Path) -> None:
    shutil.rmtree(directory / "index")


def older_index(directory: Path) -> None:
    """Make the index look like one of the version before stamps, which did not name its version."""
    with lmdb.open(str(directory / "index"), max_dbs=3) as environment:
        meta = environment.open_db(b"meta")
        with environment.begin(db=meta, write=True) as transaction:
            packed = transaction.get(b"checkpoint")
            assert packed is not None
            note = json.loads(bytes(packed))
            assert note.pop("version") == 2
            transaction.put(b"checkpoint", json.dumps(note).encode())


def lost_epochs(directory: Path) -> None:
    (directory / EPOCHS_NAME).unlink()


def damaged_epochs(directory: Path) -> None:
    file = directory / EPOCHS_NAME
    file.write_bytes(file.read_bytes().replace(b'"epoch": 7', b'"epoch": 6'))


def lost_segment(directory: Path) -> None:
    segment_paths(directory)[0].unlink()


@pytest.mark.slow
@pytest.mark.parametrize("loss", [lost_index, older_index, lost_epochs, damaged_epochs, lost_segment])
def test_what_lost_stamps_deletes_nothing_until_the_epoch_is_learnt(live: Path, loss: object) -> None:
    assert callable(loss)
    store = open_engine(live)
    store.learn_epoch(7)
    blocks = make_blocks(40)
    store.put(1, blocks, stamp=3)
    store.has(1, [blocks[30].id], stamp=7)
    store.close()
    loss(live)
    recorder = Recorder()
    again = open_engine(live, observer=recorder)
    assert len(recorder.unknown) == 1
    assert code_of_delete(again, cutoff=3) is ErrorCode.NOT_READY
    assert again.delete(1, [blocks[39].id]) == [Verdict.OK], "what names no cut-off asks no stamp"
    held = [block.id for block in blocks[:39] if again.has(1, [block.id]) == [Verdict.OK]]
    assert len(held) > 20
    again.close()
    # That it does not know survives a restart.
    third = open_engine(live)
    assert code_of_delete(third, cutoff=9) is ErrorCode.NOT_READY
    assert third.has(1, [blocks[29].id], stamp=9) == [Verdict.OK]
    third.learn_epoch(8)
    expected = {**dict.fromkeys(held, 8), blocks[29].id: 9}
    assert stamps(third) == expected
    third.put(1, [make_block(500)], stamp=2)
    assert stamps(third) == {**expected, make_block(500).id: 8}, "what comes later counts so, too"
    third.learn_epoch(12)
    assert third.delete(1, held, cutoff=8) == [Verdict.KEPT] * len(held), "the first epoch counts, not the newest"
    crashed = crash(live)
    third.close()
    for directory in (live, crashed):
        recorder = Recorder()
        last = open_engine(directory, observer=recorder)
        assert recorder.unknown == []
        assert last.epoch == 12
        assert stamps(last) == {**expected, make_block(500).id: 8}
        assert last.delete(1, held, cutoff=9) == [
            Verdict.KEPT if block_id == blocks[29].id else Verdict.OK for block_id in held
        ]
        last.close()


def test_a_memory_store_that_forgot_behaves_the_same() -> None:
    store = MemoryStore(partition_of)
    store.put(1, BLOCKS, stamp=3)
    store.forget_stamps()
    assert code_of_delete(store, cutoff=3) is ErrorCode.NOT_READY
    assert store.delete(1, [IDS[11]]) == [Verdict.OK]
    store.has(1, IDS[:1], stamp=9)
    store.learn_epoch(8)
    store.learn_epoch(12)
    assert stamps(store) == {IDS[0]: 9, **dict.fromkeys(IDS[1:11], 8)}
    assert store.delete(1, IDS[:2], cutoff=9) == [Verdict.KEPT, Verdict.OK]


def test_an_epoch_older_than_what_was_known_does_not_lower_the_floor(live: Path) -> None:
    store = open_engine(live)
    store.learn_epoch(7)
    store.put(1, BLOCKS[:1], stamp=2)
    store.close()
    lost_index(live)
    again = open_engine(live)
    again.learn_epoch(5)
    assert (again.epoch, stamps(again)) == (7, {IDS[0]: 7})
    again.close()


def test_a_new_directory_counts_from_the_first_epoch_that_it_learns(live: Path) -> None:
    """A disk that was replaced: copies that it gets back stand for ones that may have been stamped up to now."""
    store = open_engine(live)
    assert code_of_delete(store, cutoff=1) is ErrorCode.NOT_READY
    store.learn_epoch(6)
    store.put(1, BLOCKS[:1], stamp=2)
    assert stamps(store) == {IDS[0]: 6}
    store.close()


def test_floors_survive_crash_and_end(live: Path) -> None:
    store = open_engine(live)
    store.learn_epoch(1)
    store.put(1, BLOCKS, stamp=1)
    low = sorted({partition_of(block_id) for block_id in IDS})[:3]
    store.raise_floor(low, 4)
    store.raise_floor(low[:1], 9)
    expected = {i: 9 if partition_of(i) == low[0] else 4 if partition_of(i) in low else 1 for i in IDS}
    crashed = crash(live)
    store.close()
    for directory in (live, crashed):
        again = open_engine(directory)
        assert stamps(again) == expected
        again.close()


def test_damaged_stamps_behind_the_checkpoint_are_not_guessed(live: Path) -> None:
    store = open_engine(live)
    store.learn_epoch(3)
    store.put(1, BLOCKS, stamp=3)
    assert store.checkpoint()
    store.has(1, IDS[:2], stamp=5)
    store.put(1, [make_block(700)], stamp=5)
    crashed = crash(live)
    store.close()
    (segment,) = segment_paths(crashed)
    content = segment.read_bytes()
    packed = IDS[0] + IDS[1]
    assert content.count(packed) == 1
    header = content.index(packed) - RECORD_HEADER_BYTES
    for number, damaged in enumerate(
        (flip(content, packed, at=40), content[:header] + b"?" + content[header + 1 :]),
    ):
        directory = crash(crashed, f"damaged-{number}")
        segment_paths(directory)[0].write_bytes(damaged)
        recorder = Recorder()
        again = open_engine(directory, observer=recorder)
        assert len(recorder.unknown) == 1
        assert code_of_delete(again, cutoff=4) is ErrorCode.NOT_READY
        again.learn_epoch(6)
        assert set(stamps(again).values()) == {6}
        again.close()


def test_a_corrupt_copy_keeps_its_stamp_through_compaction_and_replay(live: Path) -> None:
    store = open_engine(live)
    store.learn_epoch(1)
    blocks = make_blocks(40)
    store.put(1, blocks, stamp=6)
    plant_rot(live, blocks[2].data)
    assert store.has(1, [blocks[2].id], verify=True) == [Verdict.CORRUPT]
    store.delete(1, [block.id for block in blocks[5:15]])
    assert store.compact(dead_fraction_min=0.3)
    crashed = crash(live)
    store.close()
    again = open_engine(crashed)
    assert again.quarantined(limit=9) == [(1, blocks[2].id)]
    assert again.put(1, [blocks[2]], stamp=2) == [Verdict.OK]
    assert stamps(again)[blocks[2].id] == 6
    assert again.quarantined(limit=9) == []
    again.close()


@pytest.mark.parametrize("lose_index", [False, True])
def test_a_corrupt_copy_that_is_garbage_goes_for_good_after_restarts_and_compaction(
    live: Path, lose_index: bool
) -> None:
    """Once it is deleted, neither its old record, nor the one that compaction made, brings it back."""
    store = open_engine(live)
    store.learn_epoch(1)
    blocks = make_blocks(40)
    store.put(1, blocks, stamp=6)
    for block in blocks[2:4]:
        plant_rot(live, block.data)
        assert store.has(1, [block.id], verify=True) == [Verdict.CORRUPT]
    store.delete(1, [block.id for block in blocks[5:15]])
    assert store.compact(dead_fraction_min=0.3)
    crashed = crash(live)
    store.close()
    if lose_index:
        shutil.rmtree(crashed / "index")
    again = open_engine(crashed)
    ids = [block.id for block in blocks[2:4]]
    if lose_index:
        assert code_of_delete(again, cutoff=9) is ErrorCode.NOT_READY
        again.learn_epoch(7)
    stamp = 7 if lose_index else 6
    listed = again.scan(1, partition=None, after=b"", limit=999, with_quarantined=True)
    assert {entry.block_id: entry.stamp for entry in listed if entry.quarantined} == dict.fromkeys(ids, stamp)
    assert again.delete(1, ids, cutoff=stamp) == [Verdict.KEPT] * 2
    assert again.delete(1, ids, cutoff=stamp + 1) == [Verdict.OK] * 2
    again.delete(1, [block.id for block in blocks[15:]])
    again.put(1, make_blocks(40, first=100), stamp=8)
    while again.compact(dead_fraction_min=0.1):
        pass
    twice = crash(crashed, "twice")
    again.close()
    shutil.rmtree(twice / "index")
    last = open_engine(twice)
    assert last.has(1, ids) == [Verdict.MISSING] * 2
    assert last.status().quarantined_count == 0
    last.close()


def test_the_bytes_of_stamps_are_fixed() -> None:
    record_format = RecordFormat(INCARNATION)
    packed = bytes(range(64))
    header = RecordHeader(RecordType.STAMP, 0x01020304, block_id(packed), length=64, stamp=0x0A0B0C0D)
    assert record_format.pack(header).hex() == GOLDEN_STAMP
    assert record_format.parse(record_format.pack(header)) == header
    born = RecordHeader(RecordType.BLOCK, 0x01020304, bytes(range(32)), kind=2, length=0x0A0B, stamp=0x0A0B0C0D)
    assert record_format.pack(born).hex() == GOLDEN_BORN
    assert record_format.parse(record_format.pack(born)) == born
    for bit in range(8 * RECORD_HEADER_BYTES):
        broken = bytearray(record_format.pack(born))
        broken[bit // 8] ^= 1 << bit % 8
        assert record_format.parse(bytes(broken)) is None
    ragged = header._replace(length=63)
    assert record_format.parse(record_format.pack(ragged)) is None, "ids take 32 bytes each"


GOLDEN_STAMP = (
    "484652310500000004030201400000000d0c0b0a000000004eed7141ea4a5cd4"
    "b788606bd23f46e212af9cacebacdc7d1f4c6dc7f2511b98495a3f2fe0261b3b"
)
GOLDEN_BORN = (
    "4846523101020000040302010b0a00000d0c0b0a000000000001020304050607"
    "08090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f108cb7089d91d238"
)
