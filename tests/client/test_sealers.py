"""Backups through threads and through processes: the same points and sums, and what happens where processes fail."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path

import pytest

from holdfast import (
    AsyncStateManager,
    Codec,
    Consistency,
    ErrorCode,
    Progress,
    RawFileSource,
    StateManager,
    VolumeSpec,
    sealing_messages,
)
from holdfast import sealers as sealers_module
from holdfast.sealing import SealingPool
from holdfast.spans import SealedSpan
from holdfast.testing import MemoryCluster
from holdfast_core.model.block import SealedBlock, sealed_beside
from tests.client.rig import BLOCK, MemorySource, Vm, error_of, make_sparse, noise, write_at
from tests.support.waiting import wait_until

MIB = 1 << 20
WAIT_S = 30.0
BOTH = ("threads", "processes")


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[SealingPool]:
    """Every pool that a test starts."""
    made: list[SealingPool] = []
    original = SealingPool.__init__

    def remember(self: SealingPool, processes: int) -> None:
        original(self, processes)
        made.append(self)

    monkeypatch.setattr(SealingPool, "__init__", remember)
    return made


@pytest.fixture
def processes(shared_cluster: MemoryCluster) -> Iterator[StateManager]:
    """A manager of the shared cluster that seals in processes."""
    with shared_cluster.state_manager(sealing="processes", workers=2) as manager:
        yield manager


def disk(path: Path, seed: int) -> Path:
    """40 MiB with text, noise, holes and much that comes again in other leaves."""
    chooser = random.Random(seed)
    pieces = [(at * BLOCK + chooser.randrange(100), noise(BLOCK, chooser.randrange(60))) for at in range(0, 640, 3)]
    pieces += [(at * MIB, b"a line of text\n" * 9_000) for at in range(3, 40, 7)]
    return make_sparse(path, 40 * MIB + 4097, sorted(pieces))


def are_gone(pools: list[SealingPool]) -> bool:
    """Whether no process of any pool is there any more, not even as a zombie."""
    return not any(Path(f"/proc/{pid}").exists() for pool in pools for pid in pool.pids)


def sums_of(folder: Path, sealing: str) -> list[dict[str, int]]:
    """The sums of a snapshot and a backup in a cluster of their own, as far as they do not depend on its keys."""
    found = []
    with MemoryCluster() as cluster, cluster.state_manager(sealing=sealing, workers=2) as manager:
        volumes = {"a": disk(folder / "a", 1), "b": disk(folder / "b", 2)}
        manager.register_vm("vm", {"a": volumes["a"], "b": VolumeSpec(volumes["b"], codec=Codec.LZ4)})
        snapshot = manager.create_snapshot("vm")
        for at in range(0, 40, 4):
            write_at(volumes["a"], at * MIB, noise(3 * BLOCK, at % 3 + 7))
        backup = manager.incremental_backup("vm", snapshot)
        for point_id in (snapshot, backup):
            sums = asdict(manager.point(point_id).stats)
            # Index nodes hold ids, and how well those compress is up to the keys.
            sums["stored_bytes"] -= sums["index_bytes"]
            sums["sent_bytes"] -= 3 * sums.pop("index_bytes")
            found.append(sums)
    return found


@pytest.mark.slow
def test_sums_are_the_same_both_ways(tmp_path: Path, pools: list[SealingPool]) -> None:
    threads = sums_of(tmp_path, "threads")
    assert not pools
    assert sums_of(tmp_path, "processes") == threads
    assert len(pools) == 2
    assert threads[0]["deduplicated_bytes"] > 0
    assert threads[1]["changed_blocks"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("block_bytes", [16 * 1024, BLOCK, MIB])
def test_points_are_the_same_both_ways(
    shared_cluster: MemoryCluster, tmp_path: Path, pools: list[SealingPool], block_bytes: int
) -> None:
    path = disk(tmp_path / "disk", 3)
    points = []
    for number, sealing in enumerate(BOTH * 2):
        with shared_cluster.state_manager(sealing=sealing, workers=2) as manager:
            vm_id = f"both-{block_bytes}-{number}"
            manager.register_vm(vm_id, {"disk": VolumeSpec(path, block_bytes=block_bytes)})
            points.append(manager.point(manager.create_snapshot(vm_id)))
    assert len(pools) == 2
    assert len({point.volumes for point in points}) == 1
    read = {(point.stats.read_bytes, point.stats.changed_bytes, point.stats.changed_blocks) for point in points}
    assert len(read) == 1


@pytest.mark.slow
def test_backups_by_processes_restore(processes: StateManager, tmp_path: Path, pools: list[SealingPool]) -> None:
    vm = Vm(processes, "by-processes", tmp_path)
    path = disk(vm.path(), 4)
    vm.register()
    snapshot = vm.snapshot()
    vm.assert_restores(snapshot)
    write_at(path, 11 * MIB, noise(MIB, 5))
    write_at(path, 21 * MIB, bytes(MIB))
    vm.assert_restores(snapshot, processes.incremental_backup(vm.name, snapshot))
    assert len(pools) == 2
    assert are_gone(pools)


def test_a_commit_does_not_wait_for_the_processes_to_end_and_the_call_does(
    processes: StateManager, tmp_path: Path, pools: list[SealingPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    committing, was_committing = threading.Event(), []
    close = SealingPool.close

    def close_late(self: SealingPool) -> None:
        was_committing.append(committing.wait(WAIT_S))
        close(self)

    def tell(progress: Progress) -> None:
        if progress.phase == "commit":
            committing.set()

    monkeypatch.setattr(SealingPool, "close", close_late)
    vm = Vm(processes, "ending", tmp_path)
    disk(vm.path(), 8)
    vm.register()
    snapshot = processes.create_snapshot(vm.name, progress=tell)
    assert are_gone(pools)
    assert was_committing == [True]
    vm.assert_restores(snapshot)


@pytest.mark.slow
def test_a_process_that_is_killed_fails_its_backup_alone(
    processes: StateManager, tmp_path: Path, pools: list[SealingPool]
) -> None:
    vm = Vm(processes, "killed", tmp_path)
    make_sparse(vm.path(), 160 * MIB, [(at * 8 * MIB, noise(4 * MIB, at)) for at in range(20)])
    vm.register()

    def kill(progress: Progress) -> None:
        if progress.phase == "send" and pools[-1].failure is None:
            os.kill(pools[-1].pids[0], signal.SIGKILL)
            wait_until(lambda: pools[-1].failure is not None, "the failure of the pool", timeout_s=WAIT_S)

    error = error_of(lambda: processes.create_snapshot(vm.name, progress=kill))
    assert error.code is ErrorCode.INTERNAL
    assert "SIGKILL" in error.message
    assert are_gone(pools)
    assert processes.points(vm.name) == []
    # The session is ended, so nobody has to take over, and the next backup has processes of its own.
    vm.assert_restores(vm.snapshot())
    assert len(pools) == 2


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("sealing", BOTH)
def test_a_file_that_changes_is_told_the_same_way(
    shared_cluster: MemoryCluster, tmp_path: Path, sealing: str, live: bool, pools: list[SealingPool]
) -> None:
    def shrink(progress: Progress) -> None:
        os.truncate(path, 4096)

    with shared_cluster.state_manager(sealing=sealing, workers=2) as manager:
        vm = Vm(manager, f"shrinks-{sealing}-{live}".lower(), tmp_path)
        path = make_sparse(vm.path(), 160 * MIB, [(at * 8 * MIB, noise(MIB, at)) for at in range(20)])
        vm.register(live=live)
        if live:
            point = manager.point(manager.create_snapshot(vm.name, progress=shrink))
            assert point.volumes[0].consistency is Consistency.FUZZY
        else:
            error = error_of(lambda: manager.create_snapshot(vm.name, progress=shrink))
            assert error.code is ErrorCode.VOLUME_CHANGED
    assert are_gone(pools)


def test_what_is_small_or_given_stays_in_threads(
    shared_cluster: MemoryCluster, processes: StateManager, tmp_path: Path, pools: list[SealingPool]
) -> None:
    path = make_sparse(tmp_path / "disk", 512 * MIB, [(0, noise(MIB))])
    with shared_cluster.state_manager(sealing="auto") as manager:
        manager.register_vm("small", {"disk": path})
        manager.create_snapshot("small")
    processes.register_vm("given", {"disk": path})
    processes.create_snapshot("given", sources={"disk": MemorySource(noise(MIB))})
    processes.create_snapshot("given", sources={"disk": RawFileSource(path)})
    assert not pools


@pytest.fixture
def threads_asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each leaf that threads seal, how many spans it has."""
    asked: list[int] = []
    original = sealers_module.ThreadSealer.submit

    def noted(self: sealers_module.ThreadSealer, leaf: sealers_module.LeafSpans) -> list[Future[SealedSpan]]:
        asked.append(len(leaf.spans))
        return original(self, leaf)

    monkeypatch.setattr(sealers_module.ThreadSealer, "submit", noted)
    return asked


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Have processes that seal started with an interpreter that never comes to their program."""
    hanging = tmp_path / "python"
    hanging.write_text("#!/bin/sh\nexec sleep 600\n")
    hanging.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hanging))


def save_and_restore(cluster: MemoryCluster, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save a disk that counts as large enough for processes, and restore it."""
    monkeypatch.setattr(sealers_module, "PROCESS_BYTES_MIN", MIB)
    with cluster.state_manager(sealing="auto", workers=2) as manager:
        vm = Vm(manager, name, folder)
        disk(vm.path(), 6)
        vm.register()
        vm.assert_restores(vm.snapshot())


def test_spans_wait_for_processes_that_load(
    shared_cluster: MemoryCluster,
    tmp_path: Path,
    pools: list[SealingPool],
    threads_asked: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sealers_module, "LOADING_S", WAIT_S)
    save_and_restore(shared_cluster, tmp_path, "waiting", monkeypatch)
    assert len(pools) == 1
    assert are_gone(pools)
    assert not threads_asked


@pytest.mark.usefixtures("hanging")
def test_threads_take_over_from_processes_that_do_not_come(
    shared_cluster: MemoryCluster,
    tmp_path: Path,
    pools: list[SealingPool],
    threads_asked: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sealers_module, "LOADING_S", 0.1)
    save_and_restore(shared_cluster, tmp_path, "hanging", monkeypatch)
    assert sum(threads_asked) >= 5
    assert are_gone(pools)


@pytest.mark.usefixtures("hanging")
def test_a_backup_that_ends_while_processes_load_seals_nothing(
    shared_cluster: MemoryCluster,
    tmp_path: Path,
    pools: list[SealingPool],
    threads_asked: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sealers_module, "PROCESS_BYTES_MIN", MIB)
    original = sealers_module.ProcessSealer.submit

    async def cancelled() -> None:
        waits = asyncio.Event()

        def noted(self: sealers_module.ProcessSealer, leaf: sealers_module.LeafSpans) -> list[Future[SealedSpan]]:
            waits.set()
            return original(self, leaf)

        monkeypatch.setattr(sealers_module.ProcessSealer, "submit", noted)
        address, token = shared_cluster.coordinator_address, shared_cluster.token
        async with AsyncStateManager(address, token=token, sealing="auto", workers=2) as manager:
            await manager.register_vm("given-up", {"disk": disk(tmp_path / "given-up", 6)})
            saving = asyncio.create_task(manager.create_snapshot("given-up"))
            await asyncio.wait_for(waits.wait(), WAIT_S)
            saving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await saving

    asyncio.run(cancelled())
    assert are_gone(pools)
    assert not threads_asked


async def test_sessions_at_once_share_the_processes(
    shared_cluster: MemoryCluster, tmp_path: Path, pools: list[SealingPool]
) -> None:
    address, token = shared_cluster.coordinator_address, shared_cluster.token
    async with AsyncStateManager(address, token=token, sealing="processes", workers=2) as manager:
        names = [f"at-once-{number}" for number in range(3)]
        for number, name in enumerate(names):
            await manager.register_vm(name, {"disk": disk(tmp_path / name, 7 if number < 2 else 9)})
        points = [
            await manager.point(point_id) for point_id in await asyncio.gather(*map(manager.create_snapshot, names))
        ]
        assert points[0].volumes == points[1].volumes != points[2].volumes
    assert are_gone(pools)
    assert len(pools) == 1


@pytest.mark.slow
def test_without_an_interpreter_threads_do_it_and_it_is_said_once(
    shared_cluster: MemoryCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sealers_module, "PROCESS_BYTES_MIN", MIB)
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    for number, executable in enumerate(("", str(tmp_path / "python-not-there"), str(broken))):
        monkeypatch.setattr(sys, "executable", executable)
        caplog.clear()
        with shared_cluster.state_manager(sealing="auto") as manager, caplog.at_level(logging.WARNING, "holdfast"):
            vm = Vm(manager, f"fallback-{number}", tmp_path)
            disk(vm.path(), 8)
            vm.register()
            vm.assert_restores(vm.snapshot())
            vm.snapshot()
        assert [record.name for record in caplog.records] == ["holdfast.sealers"]
        with shared_cluster.state_manager(sealing="processes") as manager:
            error = error_of(lambda: manager.create_snapshot(vm.name))  # noqa: B023
            assert error.code in (ErrorCode.INVALID_ARGUMENT, ErrorCode.INTERNAL)


def test_a_setting_that_is_none_is_refused(
    shared_cluster: MemoryCluster, monkeypatch: pytest.MonkeyPatch, pools: list[SealingPool], tmp_path: Path
) -> None:
    address = shared_cluster.coordinator_address
    assert error_of(lambda: StateManager(address, sealing="often")).code is ErrorCode.INVALID_ARGUMENT  # type: ignore[arg-type]
    monkeypatch.setenv("HOLDFAST_SEALING", "often")
    assert error_of(lambda: StateManager(address)).code is ErrorCode.INVALID_ARGUMENT
    monkeypatch.setenv("HOLDFAST_SEALING", "processes")
    with shared_cluster.state_manager() as manager:
        vm = Vm(manager, "by-variable", tmp_path)
        vm.volume(MIB, [(0, noise(BLOCK))])
        vm.register()
        vm.snapshot()
    assert len(pools) == 1


@pytest.mark.slow
def test_a_block_that_was_damaged_on_its_way_here_is_refused_by_the_nodes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    damaged: list[bytes] = []

    def flip(block_id: bytes, data: memoryview, seam_there: bytes) -> SealedBlock:
        if not damaged:
            damaged.append(block_id)
            data[len(data) // 2] ^= 1
        return sealed_beside(block_id, data, seam_there)

    monkeypatch.setattr(sealing_messages, "sealed_beside", flip)
    with MemoryCluster() as cluster, cluster.state_manager(sealing="processes", workers=2) as manager:
        manager.register_vm("damaged-on-its-way", {"a": disk(tmp_path / "a", 5)})
        error = error_of(lambda: manager.create_snapshot("damaged-on-its-way"))
        assert damaged[0].hex() in error.message
        assert manager.points("damaged-on-its-way") == []
