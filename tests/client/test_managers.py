"""Both managers: one surface, asyncio and threads."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

import holdfast
from holdfast import AsyncStateManager, ErrorCode, StateManager
from holdfast.testing import MemoryCluster
from tests.client.rig import MemorySource, Vm, digest, error_of, make_sparse, noise, write_at

MIB = 1 << 20
MISSION = {
    "create_snapshot": ["vm_id"],
    "incremental_backup": ["vm_id", "snapshot_id"],
    "restore_vm": ["snapshot_id", "backup_id"],
    "persist_application_data": ["task_id", "data"],
    "retrieve_application_data": ["storage_id"],
}


@pytest.mark.parametrize("kind", [StateManager, AsyncStateManager])
def test_the_missions_signatures(kind: type) -> None:
    for name, wanted in MISSION.items():
        parameters = list(inspect.signature(getattr(kind, name)).parameters.values())[1:]
        plain = [each for each in parameters if each.kind is not inspect.Parameter.KEYWORD_ONLY]
        assert [each.name for each in plain] == wanted
        extra = [each for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]
        assert all(each.default is not inspect.Parameter.empty for each in extra)


def test_both_managers_have_the_same_calls() -> None:
    def surface(kind: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(member).parameters)
            for name, member in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_")
        }

    blocking, asynchronous = surface(StateManager), surface(AsyncStateManager)
    assert blocking.pop("open_application_data") == ["self", "storage_id"]
    assert list(blocking.pop("open_volume"))[:3] == list(asynchronous.pop("open_image"))[:3]
    assert blocking == asynchronous


def test_public_names_load_and_are_listed() -> None:
    for name in holdfast.__all__:
        assert getattr(holdfast, name) is not None
    assert set(holdfast.__all__) == set(dir(holdfast))
    with pytest.raises(AttributeError):
        _ = holdfast.nothing_of_this_name


async def test_asyncio_from_end_to_end(shared_cluster: MemoryCluster, tmp_path: Path) -> None:
    path = make_sparse(tmp_path / "disk", 6 * MIB, [(0, noise(5 * MIB, 50))])
    async with AsyncStateManager(shared_cluster.coordinator_address, token=shared_cluster.token) as manager:
        await manager.register_vm("async-vm", {"root": path})
        snapshot = await manager.create_snapshot("async-vm")
        write_at(path, MIB, b"later")
        backup, storage_id = await asyncio.gather(
            manager.incremental_backup("async-vm", snapshot),
            manager.persist_application_data("async-task", noise(3 * MIB, 51)),
        )
        targets = await asyncio.gather(
            *[manager.restore_vm(snapshot, backup, target=tmp_path / f"out-{number}") for number in range(3)]
        )
        assert all(digest(target / "root.raw") == digest(path) for target in targets)
        assert b"".join([piece async for piece in manager.retrieve_stream(storage_id)]) == noise(3 * MIB, 51)

        async def pieces() -> object:
            for number in range(3):
                yield noise(MIB, number)

        streamed = await manager.persist_stream("async-task", pieces())  # type: ignore[arg-type]
        assert await manager.retrieve_application_data(streamed) == b"".join(noise(MIB, each) for each in range(3))
        assert len(await manager.list_application_data("async-task")) == 2
    with pytest.raises(holdfast.HoldfastError):
        await manager.list_vms()


async def test_a_cancelled_snapshot_ends_its_session(shared_cluster: MemoryCluster, tmp_path: Path) -> None:
    async with AsyncStateManager(shared_cluster.coordinator_address, token=shared_cluster.token) as manager:
        await manager.register_vm("cancelled", {"root": tmp_path / "nothing"})
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()

        def tell(offset: int) -> None:
            loop.call_soon_threadsafe(begun.set)

        source = MemorySource(noise(64 * MIB, 52), at_read=tell)
        work = asyncio.create_task(manager.create_snapshot("cancelled", sources={"root": source}))
        await begun.wait()
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        assert source.closed
        assert await manager.points("cancelled") == []
        again = await manager.create_snapshot("cancelled", sources={"root": MemorySource(b"x" * 100)})
        assert [point.point_id for point in await manager.points("cancelled")] == [again]


@pytest.mark.slow
def test_threads_share_a_manager(manager: StateManager, tmp_path: Path) -> None:
    def live(number: int) -> bool:
        vm = Vm(manager, f"threaded-{number}", tmp_path)
        vm.volume(4 * MIB, [(0, noise(3 * MIB, 600 + number))])
        vm.register()
        snapshot = vm.snapshot()
        write_at(vm.path(), number, b"changed")
        backup = manager.incremental_backup(vm.name, snapshot)
        storage_id = manager.persist_application_data(vm.name, noise(MIB, number))
        target = vm.restored(snapshot, backup)
        return (
            digest(target / "root.raw") == digest(vm.path())
            and manager.retrieve_application_data(storage_id) == noise(MIB, number)
            and len(manager.points(vm.name)) == 2
        )

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(live, range(6)))


_MANY_MANAGERS = """
import os, sys
from pathlib import Path
from holdfast import StateManager

def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def use():
    with StateManager(sys.argv[1], token=sys.argv[2]) as manager:
        manager.list_vms()

use()
use()
before = resident_bytes()
for _ in range(6):
    use()
print(resident_bytes() - before)
"""


def test_managers_one_after_another_take_no_more_memory(shared_cluster: MemoryCluster) -> None:
    """Each used to leave 32 MiB behind, with the thread that it had run in."""
    command = [sys.executable, "-c", _MANY_MANAGERS, shared_cluster.coordinator_address, shared_cluster.token]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) < 24 * MIB


def test_a_closed_manager_says_so(shared_cluster: MemoryCluster) -> None:
    manager = StateManager(shared_cluster.coordinator_address)
    manager.close()
    manager.close()
    assert error_of(manager.list_vms).code is ErrorCode.INVALID_ARGUMENT
    with StateManager(shared_cluster.coordinator_address):
        pass


def test_a_callback_may_not_call_its_manager(vm: Vm) -> None:
    vm.volume(MIB, [(0, b"x")])
    vm.register()

    def call_back(progress: object) -> None:
        vm.manager.list_vms()

    error = error_of(lambda: vm.manager.create_snapshot(vm.name, progress=call_back))
    assert error.code is ErrorCode.INVALID_ARGUMENT


def test_registrations(manager: StateManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    registered = manager.register_vm("reg", {"root": "disk.raw", "data": "file:" + str(tmp_path / "a b")})
    assert registered.volumes["root"].uri == str(tmp_path / "disk.raw")
    assert registered.volumes["data"].uri == str(tmp_path / "a b")
    assert manager.register_vm("reg", {"root": tmp_path / "disk.raw", "data": tmp_path / "a b"}) == registered
    error = error_of(lambda: manager.register_vm("reg", {"root": "other.raw"}))
    assert error.code is ErrorCode.ALREADY_EXISTS
    changed = manager.register_vm("reg", {"root": "other.raw"}, replace=True)
    assert manager.vm("reg") == changed
    assert changed in manager.list_vms()
    for uri in ("qmp:socket", "nbds://host/x", "file://elsewhere/x", ""):
        error = error_of(partial(manager.register_vm, "bad", {"root": uri}))
        assert error.code is ErrorCode.INVALID_ARGUMENT


def test_the_cluster_as_the_manager_sees_it(manager: StateManager) -> None:
    status = manager.cluster_status()
    assert (status.state, status.writable, status.replicas) == ("ready", True, 3)
    assert [node.node_id for node in manager.nodes()] == ["node-1", "node-2", "node-3"]
    layout = manager.layout().layouts[0]
    assert layout.epoch == status.layout_epoch
    assert set(layout.slots.values()) == {layout.partitions}
    plan = manager.plan_layout()
    assert plan.previous_epoch == layout.epoch
    assert plan.slots_moved == 0
    assert plan.slots_total == 3 * layout.partitions
    assert manager.stats().vm_count == status.vm_count
