"""Differences whose holes mean "as in the parent": memory diffs, and what else is laid over a point."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast import ErrorCode, Extent, StateManager, VolumeSpec
from holdfast.results import Reading
from holdfast.sources import DifferenceSource, MemoryDiffSource
from holdfast.sources.layered import LayeredSource
from tests.client.rig import BLOCK, Vm, error_of, make_sparse, noise

MIB = 1 << 20
PAGE = 4096
_names = (f"memory-{number}" for number in itertools.count())


def apply_pages(memory: bytearray, pages: Sequence[tuple[int, int, int]]) -> list[tuple[int, bytes]]:
    """Dirty runs of pages; returns the pieces of the diff. Seed 0 dirties them with zeros."""
    pieces = []
    for first, count, seed in pages:
        start = first * PAGE
        data = bytes(min(count * PAGE, max(0, len(memory) - start))) if seed == 0 else noise(count * PAGE, seed)
        data = data[: max(0, len(memory) - start)]
        memory[start : start + len(data)] = data
        pieces.append((start, data))
    return pieces


dirty = st.lists(st.tuples(st.integers(0, 700), st.integers(1, 40), st.integers(0, 3)), max_size=6)


@pytest.mark.slow
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.lists(dirty, min_size=1, max_size=3),
    st.sampled_from([16 * 1024, BLOCK, MIB]),
    st.sampled_from([3 * MIB, 2 * MIB + PAGE, 3 * MIB - 1]),
)
def test_memory_diffs_add_up(
    manager: StateManager, tmp_path: Path, rounds: list[list[tuple[int, int, int]]], block_bytes: int, size: int
) -> None:
    vm = Vm(manager, next(_names), tmp_path)
    memory = bytearray(size)
    apply_pages(memory, [(0, 100, 7), (300, 50, 8)])
    vm.path("memory").write_bytes(memory)
    vm.register("memory", block_bytes=block_bytes)
    parent = snapshot = vm.snapshot()
    for pages in rounds:
        diff = make_sparse(tmp_path / "diff", size, apply_pages(memory, pages))
        manager.register_vm(
            vm.name, {"memory": VolumeSpec(f"memdiff:{diff}?since={parent}", block_bytes=block_bytes)}, replace=True
        )
        parent = manager.incremental_backup(vm.name, snapshot)
        point = manager.point(parent)
        assert point.volumes[0].reading is Reading.CHANGED
        assert point.stats.sampled_bytes == 0
        assert (vm.restored(snapshot, parent) / "memory.raw").read_bytes() == memory
        assert manager.verify(parent).blocks == point.volumes[0].block_count


@pytest.mark.slow
def test_a_diff_costs_what_it_holds(vm: Vm) -> None:
    memory = bytearray(noise(64 * MIB, 1))
    vm.path("memory").write_bytes(memory)
    vm.register("memory")
    snapshot = vm.snapshot()
    diff = make_sparse(vm.folder / "diff", 64 * MIB, apply_pages(memory, [(5, 1, 2), (10_000, 16, 3)]))
    backup = vm.manager.incremental_backup(
        vm.name, snapshot, sources={"memory": MemoryDiffSource(diff, since=snapshot)}
    )
    point = vm.manager.point(backup)
    assert point.stats.read_bytes == 2 * BLOCK
    assert point.stats.changed_blocks == 2
    assert (vm.restored(snapshot, backup) / "memory.raw").read_bytes() == memory


def test_a_diff_fits_its_parent_alone(vm: Vm) -> None:
    vm.path("memory").write_bytes(noise(MIB))
    vm.register("memory")
    snapshot = vm.snapshot()
    diff = make_sparse(vm.folder / "diff", MIB, [(0, noise(PAGE, 1))])

    def attempt(since: str, *, names: Sequence[str] = ("memory",)) -> ErrorCode:
        sources = {name: MemoryDiffSource(diff, since=since) for name in names}
        return error_of(lambda: vm.manager.incremental_backup(vm.name, snapshot, sources=sources)).code

    newer = vm.manager.incremental_backup(vm.name, snapshot)
    assert attempt(snapshot) is ErrorCode.MISMATCH
    error = error_of(
        lambda: vm.manager.create_snapshot(vm.name, sources={"memory": MemoryDiffSource(diff, since=newer)})
    )
    assert error.code is ErrorCode.INVALID_ARGUMENT
    vm.volume(MIB, name="other")
    vm.register("memory", "other")
    assert attempt(newer, names=("other",)) is ErrorCode.MISMATCH
    assert len(vm.manager.points(vm.name)) == 2
    assert error_of(lambda: MemoryDiffSource(diff, since="../x")).code is ErrorCode.INVALID_ARGUMENT


def test_a_diff_may_be_larger_or_smaller_than_its_parent(vm: Vm) -> None:
    memory = bytearray(noise(MIB))
    vm.path("memory").write_bytes(memory)
    vm.register("memory")
    parent = snapshot = vm.snapshot()
    for size in (3 * MIB, 2 * MIB + 100):
        memory = memory[:size].ljust(size, b"\0")
        diff = make_sparse(vm.folder / "diff", size, apply_pages(memory, [(3, 2, size)]))
        source = MemoryDiffSource(diff, since=parent)
        parent = vm.manager.incremental_backup(vm.name, snapshot, sources={"memory": source})
        assert (vm.restored(snapshot, parent) / "memory.raw").read_bytes() == memory


def test_a_file_system_that_hides_holes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diff = make_sparse(tmp_path / "diff", MIB, [(0, noise(PAGE))])
    seek = os.lseek

    def no_holes(descriptor: int, offset: int, whence: int) -> int:
        if whence == os.SEEK_DATA:
            return offset
        return MIB if whence == os.SEEK_HOLE else seek(descriptor, offset, whence)

    monkeypatch.setattr(os, "lseek", no_holes)
    error = error_of(lambda: MemoryDiffSource(diff, since="snap-x"))
    assert error.code is ErrorCode.SOURCE_UNREADABLE
    assert "holes" in error.message


class _Below:
    """A point's volume in memory."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        assert offset + len(buffer) <= len(self.data)
        buffer[:] = self.data[offset : offset + len(buffer)]

    def extents(self, start: int, end: int) -> Sequence[Extent]:
        assert 0 <= start <= end <= len(self.data)
        return [Extent(start, end)] if any(self.data[start:end]) else []


def test_layers_read_as_one(tmp_path: Path) -> None:
    diff = make_sparse(tmp_path / "diff", 10 * PAGE, [(2 * PAGE, b"u" * PAGE), (7 * PAGE, b"v" * PAGE)])
    upper = MemoryDiffSource(diff, since="snap-x")
    layered = LayeredSource(upper, _Below(b"l" * (4 * PAGE + 10)))
    assert isinstance(layered, DifferenceSource)
    expected = b"l" * 2 * PAGE + b"u" * PAGE + b"l" * (PAGE + 10)
    expected = expected.ljust(7 * PAGE, b"\0") + b"v" * PAGE + bytes(2 * PAGE)
    for start, end in itertools.combinations(range(0, 10 * PAGE + 1, 1000), 2):
        buffer = bytearray(b"?" * (end - start))
        layered.read_into(start, memoryview(buffer))
        assert buffer == expected[start:end]
    assert layered.allocated(0, 10 * PAGE) == [Extent(0, 4 * PAGE + 10), Extent(7 * PAGE, 8 * PAGE)]
    assert layered.changed_since("snap-x") == [Extent(2 * PAGE, 3 * PAGE), Extent(7 * PAGE, 8 * PAGE)]
    assert layered.changed_since("snap-y") is None
    upper.close()
