"""The host agent: its calls over a Unix socket, who may call it, and which paths it touches."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from holdfast import AsyncStateManager, ErrorCode, HoldfastError, Progress, StateManager
from holdfast.agent.client import HostAgent
from holdfast.agent.paths import AllowedPaths
from holdfast.agent.service import CHUNK_BYTES_MAX, SERVICE_NAME, AgentService
from holdfast.agent.serving import check_listen, clear_stale_socket
from holdfast.agent.streams import with_progress
from holdfast.background import LoopThread
from holdfast.results import ProgressCallback
from holdfast.testing import MemoryCluster
from holdfast_core.runtime.options import TlsFiles
from holdfast_core.runtime.server import ServiceHost
from holdfast_proto.v1 import agent_pb2 as pb
from holdfast_proto.v1.agent_pb2_grpc import StateManagerStub, add_StateManagerServicer_to_server
from tests.client.rig import BLOCK, digest, error_of, make_sparse, noise, write_at

MIB = 1024 * 1024


@dataclass
class Running:
    """An agent that serves, confined to a folder."""

    address: str
    folder: Path
    manager: StateManager


@pytest.fixture
def running(shared_cluster: MemoryCluster, manager: StateManager, tmp_path: Path) -> Iterator[Running]:
    loop = LoopThread()
    address = f"unix:{tmp_path}/agent.sock"

    async def start() -> tuple[ServiceHost, AsyncStateManager]:
        core = AsyncStateManager(
            shared_cluster.coordinator_address, token=shared_cluster.token, restore_dir=tmp_path / "restored"
        )
        host = ServiceHost("agent", bind=address)
        service = AgentService(core, AllowedPaths([tmp_path]))
        host.add(add_StateManagerServicer_to_server, service, SERVICE_NAME)
        await host.start()
        return host, core

    host, core = loop.run(start())
    yield Running(address, tmp_path, manager)

    async def stop() -> None:
        await host.stop(2.0)
        await core.close()

    loop.close(stop())


@pytest.mark.slow
def test_the_five_calls_through_an_agent(running: Running) -> None:
    disk = make_sparse(running.folder / "disk.raw", 16 * MIB, [(0, noise(3 * MIB, 1))])
    name = f"by-agent-{os.urandom(4).hex()}"
    told: list[Progress] = []
    with HostAgent(running.address) as agent:
        agent.register_vm(name, {"root": str(disk)})
        snapshot_id = agent.create_snapshot(name, progress=told.append)
        write_at(disk, MIB, noise(BLOCK, 2))
        backup_id = agent.incremental_backup(name, snapshot_id, progress=told.append)
        where = agent.restore_vm(snapshot_id, backup_id, progress=told.append)
        storage_id = agent.persist_application_data("task", noise(3 * MIB, 3))
        assert agent.retrieve_application_data(storage_id) == noise(3 * MIB, 3)
    assert digest(Path(where) / "root.raw") == digest(disk)
    assert Path(where).is_relative_to(running.folder / "restored")
    assert [point.point_id for point in running.manager.points(name)] == [snapshot_id, backup_id]
    assert {progress.phase for progress in told} >= {"send", "commit", "restore"}
    assert all(progress.bytes_done <= progress.bytes_total for progress in told)


def test_what_an_orchestrator_tracks_itself(running: Running) -> None:
    disk = make_sparse(running.folder / "disk.raw", 16 * MIB, [(0, noise(3 * MIB, 1))])
    name = f"tracked-{os.urandom(4).hex()}"
    with HostAgent(running.address) as agent, grpc.insecure_channel(running.address) as channel:
        agent.register_vm(name, {"root": str(disk)})
        snapshot_id = agent.create_snapshot(name)
        write_at(disk, 2 * MIB, noise(BLOCK, 2))
        request = pb.IncrementalBackupRequest(
            vm_id=name,
            snapshot_id=snapshot_id,
            changed=[pb.ChangedExtent(volume="root", offset=2 * MIB, length=BLOCK)],
            since_point_id=snapshot_id,
        )
        answers = list(StateManagerStub(channel).IncrementalBackup(request))
        told = answers[-1]
        request.since_point_id = told.backup_id
        request.parent_id = snapshot_id
        again = list(StateManagerStub(channel).IncrementalBackup(request))[-1]
    assert list(told.notices) == []
    assert running.manager.point(told.backup_id).stats.read_bytes < MIB
    assert running.manager.point(again.backup_id).stats.read_bytes >= 3 * MIB
    assert again.notices, "a hint about another point is not used, and that is said"


def test_points_and_the_end_of_a_vm(running: Running) -> None:
    disk = make_sparse(running.folder / "disk.raw", MIB, [(0, b"x" * 5000)])
    name = f"ends-{os.urandom(4).hex()}"
    with HostAgent(running.address) as agent, grpc.insecure_channel(running.address) as channel:
        agent.register_vm(name, {"root": str(disk)})
        snapshot_id = agent.create_snapshot(name)
        listed = StateManagerStub(channel).ListPoints(pb.ListPointsRequest(vm_id=name)).points
        assert [(point.point_id, point.parent_id, point.size_bytes) for point in listed] == [(snapshot_id, "", MIB)]
        receipt = agent.discard_vm(name)
    assert (receipt.vm_id, receipt.point_count) == (name, 1)
    assert error_of(lambda: running.manager.vm(name)).code is ErrorCode.NOT_FOUND


def test_files_of_a_directory(running: Running) -> None:
    folder = running.folder / "output"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(noise(100_000, 4))
    (folder / "log.txt").write_bytes(b"dull")
    with grpc.insecure_channel(running.address) as channel:
        stub = StateManagerStub(channel)
        request = pb.PersistFilesRequest(task_id="task", directory=str(folder), include=["*.bin"])
        storage_id = list(stub.PersistFiles(request))[-1].storage_id
        with pytest.raises(grpc.RpcError, match="name one"):
            list(stub.PersistFiles(pb.PersistFilesRequest(task_id="task")))
    assert [Path(os.fsdecode(entry.path)).name for entry in running.manager.list_files(storage_id)] == ["weights.bin"]


@pytest.mark.parametrize(
    ("uri", "code"),
    [
        ("/etc/passwd", ErrorCode.DENIED),
        ("relative.raw", ErrorCode.INVALID_ARGUMENT),
        ("{folder}/link.raw", ErrorCode.DENIED),
        ("{folder}/../../etc/passwd", ErrorCode.DENIED),
        ("qcow2:/etc/passwd", ErrorCode.DENIED),
        ("nbd://127.0.0.1:10809/x", ErrorCode.DENIED),
        ("nbd+unix:///x?socket=/run/other.sock", ErrorCode.DENIED),
        ("gopher:x", ErrorCode.INVALID_ARGUMENT),
    ],
)
def test_paths_outside_its_directories_are_not_touched(running: Running, uri: str, code: ErrorCode) -> None:
    (running.folder / "link.raw").symlink_to("/etc/passwd")
    with HostAgent(running.address) as agent:
        error = error_of(lambda: agent.register_vm("outside", {"root": uri.format(folder=running.folder)}))
        assert error.code is code
        assert error_of(lambda: running.manager.vm("outside")).code is ErrorCode.NOT_FOUND


def test_restores_go_below_its_directories(running: Running) -> None:
    disk = make_sparse(running.folder / "disk.raw", MIB, [(0, b"x" * 5000)])
    name = f"below-{os.urandom(4).hex()}"
    with HostAgent(running.address) as agent:
        agent.register_vm(name, {"root": str(disk)})
        snapshot_id = agent.create_snapshot(name)
        assert error_of(lambda: agent.restore_vm(snapshot_id, target="/var/lib/elsewhere")).code is ErrorCode.DENIED
        assert not Path("/var/lib/elsewhere").exists()
        occupied = running.folder / "occupied"
        occupied.mkdir()
        (occupied / "file").write_bytes(b"mine")
        error = error_of(lambda: agent.restore_vm(snapshot_id, target=str(occupied)))
        assert error.code is ErrorCode.TARGET_EXISTS
        assert str(occupied) in error.message, "an error crosses the agent whole"


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([], "names the task"),
        ([pb.PersistApplicationDataRequest(data=b"x")], "names the task"),
        (
            [pb.PersistApplicationDataRequest(task_id="a"), pb.PersistApplicationDataRequest(task_id="b", data=b"x")],
            "only the first",
        ),
        ([pb.PersistApplicationDataRequest(task_id="a", data=bytes(CHUNK_BYTES_MAX + 1))], "at most"),
    ],
)
def test_data_in_the_wrong_messages(
    running: Running, messages: list[pb.PersistApplicationDataRequest], told: str
) -> None:
    options = (("grpc.max_send_message_length", 2 * CHUNK_BYTES_MAX),)
    with (
        grpc.insecure_channel(running.address, options=options) as channel,
        pytest.raises(grpc.RpcError, match=told),
    ):
        list(StateManagerStub(channel).PersistApplicationData(iter(messages)))
    assert running.manager.list_application_data("a") == []


def attempt(call: Callable[[], object]) -> ErrorCode | None:
    """Make a call; return how it failed, after a moment, or None."""
    try:
        call()
    except HoldfastError as error:
        threading.Event().wait(0.05)
        return error.code
    return None


def test_a_caller_who_leaves_ends_the_work(running: Running) -> None:
    """The session is given up: a second backup does not find the VM busy."""
    disk = make_sparse(running.folder / "disk.raw", 64 * MIB, [(0, noise(48 * MIB, 1))])
    name = f"left-{os.urandom(4).hex()}"
    with HostAgent(running.address) as agent:
        agent.register_vm(name, {"root": str(disk)})
        with grpc.insecure_channel(running.address) as channel:
            answers = StateManagerStub(channel).CreateSnapshot(pb.CreateSnapshotRequest(vm_id=name))
            next(iter(answers))
            answers.cancel()
        for _ in range(200):
            codes = attempt(lambda: agent.create_snapshot(name))
            if codes is None:
                break
            assert codes is ErrorCode.BUSY
    assert len(running.manager.points(name)) == 1


def test_progress_is_thinned_and_the_result_comes_last() -> None:
    async def call(progress: ProgressCallback) -> str:
        for done in range(0, 100_001):
            progress(Progress("send", done, 100_000))
            if done % 1000 == 0:
                await asyncio.sleep(0)
        progress(Progress("commit", 100_000, 100_000))
        return "id"

    async def collect() -> list[object]:
        return [event async for event in with_progress(call)]

    events = asyncio.run(collect())
    assert events[-1] == ("id",)
    assert 2 <= len(events) <= 203
    assert events[-2] == Progress("commit", 100_000, 100_000)


@pytest.mark.parametrize(
    ("listen", "with_tls", "allow", "below", "told"),
    [
        ("127.0.0.1:7500", False, ["x"], [Path("/srv")], "--agent-tls-ca"),
        ("127.0.0.1:7500", True, [], [Path("/srv")], "--allow"),
        ("127.0.0.1:7500", True, ["x"], [], "--below"),
        ("unix:/run/x.sock", False, ["x"], [], "--allow is for TLS"),
    ],
)
def test_an_agent_does_not_serve_whoever_comes(
    listen: str, with_tls: bool, allow: list[str], below: list[Path], told: str
) -> None:
    tls = TlsFiles(Path("ca"), Path("cert"), Path("key")) if with_tls else None
    error = error_of(lambda: check_listen(listen, tls=tls, allow=allow, below=below))
    assert error.code is ErrorCode.INVALID_ARGUMENT
    assert told in error.message


def test_sockets_that_others_left(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    clear_stale_socket(f"unix:{path}")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        error = error_of(lambda: clear_stale_socket(f"unix:{path}"))
        assert error.code is ErrorCode.CONFLICT
        assert stat.S_ISSOCK(path.stat().st_mode)
    clear_stale_socket(f"unix:{path}")
    assert not path.exists(), "who listened there is gone"
    path.write_bytes(b"a file")
    assert error_of(lambda: clear_stale_socket(f"unix:{path}")).code is ErrorCode.CONFLICT
    assert path.read_bytes() == b"a file"
