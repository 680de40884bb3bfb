"""Files through a cluster: sets from directories and from recovery points, listed, read and retrieved."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from holdfast import (
    AsyncStateManager,
    ErrorCode,
    FileKind,
    ObjectForm,
    PointFiles,
    Progress,
    StateManager,
)
from holdfast.content import ContentReader
from holdfast.testing import MemoryCluster
from holdfast_proto.v1 import records_pb2
from tests.client.files.images import MIB, make_image, with_partitions
from tests.client.files.trees import likenesses, make_tree
from tests.client.rig import Vm, data_ids, error_of, noise, rot

_tasks = (f"files-{number}" for number in itertools.count())


@pytest.fixture
def task() -> str:
    """A task's name of the test's own."""
    return next(_tasks)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tree with one of everything."""
    return make_tree(tmp_path / "source")


def test_files_of_a_directory(manager: StateManager, task: str, source: Path, tmp_path: Path) -> None:
    told: list[Progress] = []
    storage_id = manager.persist_files(task, source, exclude=["/many/"])
    stored = manager.application_data(storage_id)
    assert stored.form is ObjectForm.FILES
    expected = {path: each for path, each in likenesses(source).items() if not path.startswith(b"many")}
    assert stored.origin is not None
    assert (stored.origin.file_count, stored.origin.vm_id) == (len(expected), "")
    result = manager.retrieve_files(storage_id, tmp_path / "target", durable=True, progress=told.append)
    assert likenesses(tmp_path / "target") == expected
    assert result.file_count == len(expected)
    assert told[-1].bytes_done == result.data_bytes
    assert error_of(lambda: manager.retrieve_files(storage_id, tmp_path / "target")).code is ErrorCode.TARGET_EXISTS


def test_listing_and_reading_a_set(manager: StateManager, task: str, source: Path) -> None:
    storage_id = manager.persist_files(task, source)
    top = manager.list_files(storage_id)
    assert [each.path for each in top] == sorted(os.listdir(source), key=os.fsencode)
    by_path = {each.path: each for each in manager.list_files(storage_id, recursive=True)}
    assert by_path.keys() == {os.fsdecode(path) for path in likenesses(source)}
    assert by_path["fast"].kind is FileKind.SYMBOLIC_LINK
    assert by_path["fast"].target == "dir/sub"
    assert by_path["dir/run.sh"].mtime_ns == 1_234_567_890_987_654_321
    assert by_path["dir/run.sh"].mode == 0o750
    assert [each.path for each in manager.list_files(storage_id, "/dir/")] == ["dir/run.sh", "dir/sub"]
    assert [each.path for each in manager.list_files(storage_id, "big.bin")] == ["big.bin"]
    assert manager.read_file(storage_id, "zweiter name") == b"small\n"
    assert manager.read_file(storage_id, "/sparse") == (source / "sparse").read_bytes()
    for path, code in (
        ("nothing", ErrorCode.NOT_FOUND),
        ("dir/nothing", ErrorCode.NOT_FOUND),
        ("fast/small.txt", ErrorCode.NOT_FOUND),
        ("fast", ErrorCode.INVALID_ARGUMENT),
        ("", ErrorCode.INVALID_ARGUMENT),
    ):
        assert error_of(lambda path=path: manager.read_file(storage_id, path)).code is code  # type: ignore[misc]
    assert error_of(lambda: manager.list_files(storage_id, "nothing")).code is ErrorCode.NOT_FOUND


def test_some_files_of_a_set(manager: StateManager, task: str, source: Path, tmp_path: Path) -> None:
    storage_id = manager.persist_files(task, source)
    manager.retrieve_files(storage_id, tmp_path / "some", paths=["dir", "/big.bin"], include=["file-0007*"])
    assert {path for path in likenesses(tmp_path / "some") if b"/" not in path} == {b"dir", b"big.bin", b"many"}
    manager.retrieve_files(storage_id, tmp_path / "all", paths=["/"])
    assert likenesses(tmp_path / "all") == likenesses(source)
    for call in (
        lambda: manager.retrieve_files(storage_id, tmp_path / "no", paths=["dir", "nothing"]),
        lambda: manager.retrieve_files(storage_id, tmp_path / "no", include=["*.safetensors"]),
    ):
        assert error_of(call).code is ErrorCode.NOT_FOUND
        assert not (tmp_path / "no").exists()


def test_what_cannot_be_kept(manager: StateManager, task: str, source: Path, tmp_path: Path) -> None:
    for call, code in (
        (lambda: manager.persist_files(task, tmp_path / "nothing"), ErrorCode.SOURCE_UNREADABLE),
        (lambda: manager.persist_files(task, source, include=["*.safetensors"]), ErrorCode.NOT_FOUND),
        (lambda: manager.persist_files(task, source, include=["!x"]), ErrorCode.INVALID_ARGUMENT),
        (lambda: manager.persist_files(task, source, include=["[x"]), ErrorCode.INVALID_ARGUMENT),
        (lambda: manager.persist_files(task, source, include="*.txt"), ErrorCode.INVALID_ARGUMENT),
        (lambda: manager.persist_files(task, PointFiles("snap-none")), ErrorCode.NOT_FOUND),
        (lambda: manager.persist_files("a/b", source), ErrorCode.INVALID_ARGUMENT),
    ):
        assert error_of(call).code is code
    assert manager.list_application_data(task) == []


def test_secrets_are_left_out(manager: StateManager, task: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for name in (".env", "work/.env.local", ".ssh/id_ed25519", "tls/server.key", ".aws/credentials", "work/result.csv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    storage_id = manager.persist_files(task, folder, exclude_secrets=True)
    paths = [each.path for each in manager.list_files(storage_id, recursive=True) if each.kind is FileKind.REGULAR]
    assert paths == ["work/result.csv"]


def test_application_data_is_no_set(manager: StateManager, task: str, tmp_path: Path) -> None:
    storage_id = manager.persist_application_data(task, b"x" * 100)
    for call in (
        lambda: manager.list_files(storage_id),
        lambda: manager.retrieve_files(storage_id, tmp_path / "target"),
        lambda: manager.list_files(storage_id, volume="root"),
    ):
        assert error_of(call).code is ErrorCode.INVALID_ARGUMENT
    assert error_of(lambda: manager.list_files("app-none")).code is ErrorCode.NOT_FOUND


class Fetched:
    """What images fetch from the nodes."""

    def __init__(self) -> None:
        self.plain_bytes = 0


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fetched]:
    """Count the content that crosses the wire while images are read."""
    fetched = Fetched()
    original = ContentReader.read

    async def read(self, entries, sink, *, block_bytes):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        fetched.plain_bytes += sum(entry.length for entry in entries)
        return await original(self, entries, sink, block_bytes=block_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(ContentReader, "read", read)
        yield fetched


@pytest.fixture
def ml_point(vm: Vm, tmp_path: Path) -> tuple[str, bytes]:
    """A snapshot of the disk of a task that trained a model, and the model's weights."""
    folder = tmp_path / "disk"
    weights = noise(MIB, 77)
    for name, data in {
        "data/train.bin": noise(20 * MIB, 1),
        "root/.cache/wheels.bin": noise(9 * MIB, 2),
        "work/checkpoints/step-1.pt": noise(MIB, 3),
        "work/out/model.safetensors": weights,
        "work/out/.env": b"TOKEN=secret",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    image = make_image(tmp_path / "ml.ext4", folder, "-b", "4096", size=48 * MIB)
    with_partitions(vm.path(), [image])
    vm.register()
    return vm.snapshot(), weights


@pytest.mark.slow
def test_files_of_a_point_are_kept_without_reading_the_rest(
    manager: StateManager, ml_point: tuple[str, bytes], task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_id, weights = ml_point
    with counted(monkeypatch) as fetched:
        storage_id = manager.persist_files(
            task, PointFiles(point_id, partition=1), include=["**/*.safetensors"], exclude_secrets=True
        )
    assert len(weights) <= fetched.plain_bytes < len(weights) + 2 * MIB
    stored = manager.application_data(storage_id)
    assert stored.origin is not None
    assert (stored.origin.point_id, stored.origin.volume) == (point_id, "root")
    assert [each.path for each in manager.list_files(storage_id, recursive=True)] == [
        "work",
        "work/out",
        "work/out/model.safetensors",
    ]
    assert manager.read_file(storage_id, "work/out/model.safetensors") == weights
    # Selective persistence: at least 95 % of what is on the disk need not be kept.
    disk = manager.point(point_id).stats.changed_bytes
    assert 1 - stored.size_bytes / disk >= 0.95
    manager.forget(point_id)
    manager.retrieve_files(storage_id, tmp_path / "after")
    assert (tmp_path / "after" / "work" / "out" / "model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_files_of_a_point_are_listed_and_fetched(
    manager: StateManager, ml_point: tuple[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_id, weights = ml_point
    with counted(monkeypatch) as fetched:
        assert [each.path for each in manager.list_files(point_id)] == ["data", "lost+found", "root", "work"]
        (found,) = [each for each in manager.list_files(point_id, "work/out") if each.path.endswith(".safetensors")]
        assert manager.read_file(point_id, "work/out/.env") == b"TOKEN=secret"
    assert found.size_bytes == len(weights)
    assert fetched.plain_bytes < 2 * MIB
    result = manager.retrieve_files(point_id, tmp_path / "target", include=["*.safetensors", ".env"])
    assert result.data_bytes == len(weights) + len(b"TOKEN=secret")
    assert (tmp_path / "target" / "work" / "out" / "model.safetensors").read_bytes() == weights
    for call, code in (
        (lambda: manager.list_files(point_id, volume="other"), ErrorCode.NOT_FOUND),
        (lambda: manager.list_files(point_id, partition=7), ErrorCode.NOT_FOUND),
        (lambda: manager.list_files(point_id, "nothing"), ErrorCode.NOT_FOUND),
        (lambda: manager.retrieve_files(point_id, tmp_path / "no", paths=["nothing"]), ErrorCode.NOT_FOUND),
    ):
        assert error_of(call).code is code


def test_a_volume_without_a_file_system(manager: StateManager, vm: Vm) -> None:
    vm.volume(MIB, [(0, noise(100_000))])
    vm.register()
    point_id = vm.snapshot()
    error = error_of(lambda: manager.list_files(point_id))
    assert error.code is ErrorCode.SOURCE_UNREADABLE
    assert "ext4" in str(error)


@pytest.mark.slow
def test_a_keep_rule_is_fulfilled_and_verified(manager: StateManager, ml_point: tuple[str, bytes], task: str) -> None:
    point_id, _ = ml_point
    vm_id = manager.point(point_id).vm_id
    core, loop = manager._core, manager._loop
    rule = records_pb2.KeepRule(name="weights", task_id=task, volume="root", include=["*.safetensors"])
    storage_id = loop.run(core._persist_rule(vm_id, point_id, rule))
    assert loop.run(core._verify_files(storage_id)) == 3
    origin = manager.application_data(storage_id).origin
    assert origin is not None
    assert (origin.vm_id, origin.point_id, origin.keep_rule) == (vm_id, point_id, "weights")
    nothing = records_pb2.KeepRule(name="none", task_id=task, volume="root", include=["*.nothing"])
    assert error_of(lambda: loop.run(core._persist_rule(vm_id, point_id, nothing))).code is ErrorCode.NOT_FOUND


@pytest.mark.slow
def test_verifying_finds_damage(cluster: MemoryCluster, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(noise(4 * MIB))
    manager = cluster.state_manager()
    storage_id = manager.persist_files("task", tmp_path / "folder")
    lost = data_ids(cluster, 0, kind=1)[1]
    for number in range(3):
        rot(cluster, number, lost)
    for call in (
        lambda: manager._loop.run(manager._core._verify_files(storage_id)),
        lambda: manager.retrieve_files(storage_id, tmp_path / "target"),
        lambda: manager.read_file(storage_id, "file"),
    ):
        error = error_of(call)
        assert error.code is ErrorCode.CORRUPT
        assert error.block_ids == (lost,)
    assert not (tmp_path / "target").exists()


@pytest.mark.slow
async def test_giving_up_leaves_nothing(shared_cluster: MemoryCluster, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(noise(12 * MIB))
    async with AsyncStateManager(shared_cluster.coordinator_address, token=shared_cluster.token) as manager:
        storage_id = await manager.persist_files("given-up", tmp_path / "folder")
        begun = asyncio.Event()
        retrieving = asyncio.create_task(
            manager.retrieve_files(storage_id, tmp_path / "target", progress=lambda _: begun.set())
        )
        await begun.wait()
        retrieving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await retrieving
        assert not (tmp_path / "target").exists()
        begun.clear()
        persisting = asyncio.create_task(
            manager.persist_files("given-up", tmp_path / "folder", progress=lambda _: begun.set())
        )
        await begun.wait()
        persisting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await persisting
        assert len(await manager.list_application_data("given-up")) == 1
