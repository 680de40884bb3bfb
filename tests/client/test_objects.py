"""Application data: any size, as bytes, files and streams; cut by content; read from the middle; flat in memory."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast import ErrorCode, StateManager
from holdfast.testing import MemoryCluster
from tests.client.rig import data_ids, error_of, noise, rot, store_of

MIB = 1 << 20
_tasks = (f"task-{number}" for number in itertools.count())


@pytest.fixture
def task() -> str:
    """A task's name of the test's own."""
    return next(_tasks)


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 1 << 20, (1 << 20) + 1, 9_000_001])
def test_bytes_of_every_size(manager: StateManager, task: str, size: int) -> None:
    data = noise(size, size)
    storage_id = manager.persist_application_data(task, data)
    assert storage_id.startswith("app-")
    assert manager.retrieve_application_data(storage_id) == data
    stored = manager.application_data(storage_id)
    assert (stored.size_bytes, stored.task_id) == (size, task)
    assert manager.list_application_data(task) == [stored]


def test_objects_are_many_and_forgotten_one_by_one(manager: StateManager, task: str) -> None:
    first = manager.persist_application_data(task, b"same")
    second = manager.persist_application_data(task, b"same")
    assert first != second
    assert [stored.storage_id for stored in manager.list_application_data(task)] == [first, second]
    manager.forget_application_data(first)
    assert error_of(lambda: manager.retrieve_application_data(first)).code is ErrorCode.NOT_FOUND
    assert manager.retrieve_application_data(second) == b"same"


def test_files_and_streams(manager: StateManager, task: str, tmp_path: Path) -> None:
    data = noise(6 * MIB + 17, 2) + b"tail" * 1000
    source = tmp_path / "source"
    source.write_bytes(data)
    with source.open("rb") as stream:
        from_file = manager.persist_stream(task, stream)
    from_pieces = manager.persist_stream(task, (data[at : at + 12_345] for at in range(0, len(data), 12_345)))
    from_memory = manager.persist_stream(task, io.BytesIO(data))
    for storage_id in (from_file, from_pieces, from_memory):
        assert b"".join(manager.retrieve_stream(storage_id)) == data
    stats = manager.application_data(from_pieces).stats
    assert stats.stored_bytes == stats.sent_bytes == 0
    assert stats.deduplicated_bytes == len(data)
    target = tmp_path / "target"
    assert manager.retrieve_to_file(from_file, target) == target
    assert target.read_bytes() == data
    error = error_of(lambda: manager.retrieve_to_file(from_file, target))
    assert error.code is ErrorCode.TARGET_EXISTS
    assert error_of(lambda: manager.retrieve_to_file("app-nothing", tmp_path / "x")).code is ErrorCode.NOT_FOUND
    assert (
        error_of(lambda: manager.retrieve_to_file(from_file, tmp_path / "no" / "x")).code is ErrorCode.TARGET_UNWRITABLE
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_a_stream_that_is_left_early(manager: StateManager, task: str) -> None:
    data = noise(20 * MIB, 3)
    storage_id = manager.persist_application_data(task, data)
    pieces = manager.retrieve_stream(storage_id)
    first = next(pieces)
    assert data.startswith(first)
    pieces.close()  # type: ignore[attr-defined]
    assert manager.retrieve_application_data(storage_id, length=10) == data[:10]


@pytest.mark.slow
def test_a_file_object_reads_and_seeks(manager: StateManager, task: str) -> None:
    data = noise(3 * MIB + 5, 4)
    storage_id = manager.persist_application_data(task, data)
    with manager.open_application_data(storage_id) as stream:
        assert stream.seekable()
        assert not stream.writable()
        stream.seek(-5, os.SEEK_END)
        assert stream.read() == data[-5:]
        stream.seek(MIB + 3)
        assert stream.read(100) == data[MIB + 3 : MIB + 103]
        assert stream.tell() == MIB + 103
        stream.seek(0)
        assert stream.read() == data
        stream.seek(10 * MIB)
        assert stream.read(1) == b""


@pytest.fixture(scope="module")
def long_object(shared_cluster: MemoryCluster) -> Iterator[tuple[StateManager, str, bytes]]:
    """An object of several leaves."""
    data = noise(45 * MIB, 5)
    with shared_cluster.state_manager() as manager:
        yield manager, manager.persist_application_data("long", data), data


@pytest.mark.slow
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 46 * MIB), st.none() | st.integers(0, 200_000))
def test_any_range(long_object: tuple[StateManager, str, bytes], offset: int, length: int | None) -> None:
    manager, storage_id, data = long_object
    if length is None:
        offset = max(offset, 40 * MIB)
    wanted = data[offset:] if length is None else data[offset : offset + length]
    assert manager.retrieve_application_data(storage_id, offset=offset, length=length) == wanted


def test_ranges_that_are_none(long_object: tuple[StateManager, str, bytes]) -> None:
    manager, storage_id, _ = long_object
    for offset, length in ((-1, None), (0, -1)):
        error = error_of(partial(manager.retrieve_application_data, storage_id, offset=offset, length=length))
        assert error.code is ErrorCode.INVALID_ARGUMENT


@pytest.mark.slow
def test_an_insertion_in_the_middle_sends_little(manager: StateManager, task: str) -> None:
    data = noise(24 * MIB, 6)
    manager.persist_application_data(task, data)
    edited = data[: 11 * MIB] + b"a few bytes more" + data[11 * MIB :]
    storage_id = manager.persist_application_data(task, edited)
    stats = manager.application_data(storage_id).stats
    assert stats.stored_bytes < 2 * MIB
    assert manager.retrieve_application_data(storage_id) == edited


def test_an_error_of_the_stream_passes_through_and_stores_nothing(manager: StateManager, task: str) -> None:
    class Broken(Exception):
        pass

    def pieces() -> Iterator[bytes]:
        yield noise(MIB)
        raise Broken

    with pytest.raises(Broken):
        manager.persist_stream(task, pieces())
    assert manager.list_application_data(task) == []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["corrupt", "missing"])
def test_a_cut_lost_everywhere_is_named(cluster: MemoryCluster, how: str, tmp_path: Path) -> None:
    manager = cluster.state_manager()
    storage_id = manager.persist_application_data("task", noise(8 * MIB, 7))
    lost = data_ids(cluster, 0, kind=1)[3]
    rot(cluster, 2, data_ids(cluster, 2, kind=1)[5])
    for number in range(3):
        if how == "corrupt":
            rot(cluster, number, lost)
        else:
            store_of(cluster, number).delete(1, [lost])
    for call in (
        lambda: manager.retrieve_application_data(storage_id),
        lambda: manager.retrieve_to_file(storage_id, tmp_path / "out"),
    ):
        error = error_of(call)
        assert error.code is (ErrorCode.CORRUPT if how == "corrupt" else ErrorCode.MISSING)
        assert error.block_ids == (lost,)
        assert "-" in error.facts["ranges"]
    assert list(tmp_path.iterdir()) == []
    manager.persist_application_data("task", noise(8 * MIB, 7))
    assert manager.retrieve_application_data(storage_id) == noise(8 * MIB, 7)


@pytest.mark.slow
def test_a_long_stream_takes_flat_memory(tmp_path: Path) -> None:
    # The cluster keeps its blocks in this process, so they go to disk, and one node suffices.
    with MemoryCluster(nodes=1, replicas=1, data_dir=tmp_path) as cluster:
        manager = cluster.state_manager()
        piece = noise(MIB, 8)
        process = psutil.Process()
        peak = 0

        def pieces(count: int) -> Iterator[bytes]:
            nonlocal peak
            for number in range(count):
                peak = max(peak, process.memory_info().rss)
                yield number.to_bytes(8, "little") + piece

        manager.persist_stream("warm", pieces(100))
        before, peak = process.memory_info().rss, 0
        storage_id = manager.persist_stream("long", pieces(400))
        for part in manager.retrieve_stream(storage_id):
            assert part
            peak = max(peak, process.memory_info().rss)
        assert manager.application_data(storage_id).size_bytes == 400 * (MIB + 8)
        assert peak - before < 128 * MIB
