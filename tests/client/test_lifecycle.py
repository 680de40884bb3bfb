"""The life of a VM through the SDK: what it carries, the template it comes from, and its end."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from holdfast import AsyncStateManager, ErrorCode, HoldfastError, KeepRule, ObjectForm, StateManager, VolumeSpec
from holdfast.testing import MemoryCluster
from holdfast_core.model.block import Kind
from holdfast_core.model.limits import MIB
from tests.client.files.images import make_image
from tests.client.rig import Vm, data_ids, noise, rot, write_at
from tests.coordinator.rig import Client
from tests.meta.documents import fenced
from tests.meta.tree import text_of

DOCUMENT = Path("docs/lifecycle.md")

DEFINITION = (b"<domain type='kvm'/>\n", "domain.xml")


def refused(code: ErrorCode, call: Any, *arguments: Any, **options: Any) -> HoldfastError:
    """Make a call that must be refused with `code`; return the error."""
    with pytest.raises(HoldfastError) as caught:
        call(*arguments, **options)
    assert caught.value.code is code, caught.value
    return caught.value


def test_a_vm_is_what_it_was_registered_as(vm: Vm) -> None:
    vm.volume(MIB)
    rules = (
        KeepRule(task_id="train", include=("**/*.safetensors",), exclude=("/tmp/**",), exclude_secrets=True),
        KeepRule(name="logs", task_id="logs", include=["/var/log/**"], volume="root", partition=2),
    )
    volumes = {"root": VolumeSpec(vm.path(), delta=False)}
    labels = {"task": "train", "owner": "Zoë"}
    made = vm.manager.register_vm(vm.name, volumes, labels=labels, definition=DEFINITION, keep=rules)
    assert (made.labels, made.definition, made.definition_name) == (labels, *DEFINITION)
    assert [(rule.name, rule.volume, rule.partition) for rule in made.keep] == [
        ("keep", "root", 0),
        ("logs", "root", 2),
    ]
    assert made.keep[0].exclude_secrets
    assert not made.volumes["root"].delta
    assert vm.manager.vm(vm.name) == made
    [listed] = [each for each in vm.manager.list_vms() if each.vm_id == vm.name]
    assert (listed.definition, listed.definition_name, listed.labels) == (b"", "domain.xml", labels)
    # What was asked of it is what registers it again, from what the cluster says.
    again = vm.manager.register_vm(
        vm.name, made.volumes, labels=made.labels, definition=(made.definition, made.definition_name), keep=made.keep
    )
    assert again == made


def test_a_points_labels_and_definition_come_back_with_it(vm: Vm) -> None:
    vm.volume(MIB, [(0, noise(1000))])
    vm.manager.register_vm(vm.name, {"root": vm.path()}, labels={"a": "1"}, definition=DEFINITION)
    snapshot = vm.snapshot()
    vm.manager.register_vm(vm.name, {"root": vm.path()}, replace=True)
    point = vm.manager.point(snapshot)
    assert (point.labels, point.definition, point.definition_name) == ({"a": "1"}, *DEFINITION)
    assert [each.definition for each in vm.manager.points(vm.name)] == [b""]
    assert (vm.restored(snapshot) / "domain.xml").read_bytes() == DEFINITION[0]


@pytest.mark.parametrize(
    ("code", "options"),
    [
        (ErrorCode.INVALID_ARGUMENT, {"labels": {"a b": "x"}}),
        (ErrorCode.INVALID_ARGUMENT, {"definition": (b"", "domain.xml")}),
        (ErrorCode.INVALID_ARGUMENT, {"definition": (b"x", "root.raw")}),
        (ErrorCode.LIMIT_EXCEEDED, {"definition": (bytes(65_537), "domain.xml")}),
        (ErrorCode.INVALID_ARGUMENT, {"template": "a/b"}),
        (ErrorCode.NOT_FOUND, {"template": "snap-unknown"}),
        (ErrorCode.INVALID_ARGUMENT, {"keep": [KeepRule(task_id="t", include=[])]}),
        (ErrorCode.INVALID_ARGUMENT, {"keep": [KeepRule(task_id="t", include="**")]}),
        (ErrorCode.INVALID_ARGUMENT, {"keep": [KeepRule(task_id="t", include=["a[b"])]}),
        (ErrorCode.INVALID_ARGUMENT, {"keep": [KeepRule(task_id="t", include=["caf\udce9"])]}),
        (ErrorCode.INVALID_ARGUMENT, {"labels": {"a": "caf\udce9"}}),
        (ErrorCode.INVALID_ARGUMENT, {"keep": [KeepRule(task_id="t", include=["**"], volume="data")]}),
    ],
)
def test_registrations_that_are_refused(vm: Vm, code: ErrorCode, options: dict[str, Any]) -> None:
    refused(code, vm.manager.register_vm, vm.name, {"root": vm.path()}, **options)
    refused(ErrorCode.NOT_FOUND, vm.manager.vm, vm.name)


def test_a_rule_without_a_volume_takes_the_only_one(vm: Vm) -> None:
    rule = KeepRule(task_id="t", include=["**"])
    volumes = {"root": vm.path(), "data": vm.path("data")}
    refused(ErrorCode.INVALID_ARGUMENT, vm.manager.register_vm, vm.name, volumes, keep=[rule])


def test_vms_of_a_template_store_what_is_their_own(vm: Vm) -> None:
    vm.volume(8 * MIB, [(0, noise(6 * MIB, 5))])
    vm.register()
    template = vm.snapshot()
    for number in range(2):
        child = Vm(vm.manager, f"{vm.name}-child-{number}", vm.folder)
        child.volume(8 * MIB, [(0, noise(6 * MIB, 5))])
        write_at(child.path(), 5 * MIB, noise(100_000, number))
        vm.manager.register_vm(child.name, {"root": child.path()}, template=template)
        snapshot = child.snapshot()
        stats = vm.manager.point(snapshot).stats
        # Two blocks of 64 KiB at most, and the index above them.
        assert stats.stored_plain_bytes < 4 * 65_536
        child.assert_restores(snapshot)
    assert notices_of(vm.manager) == ()
    # The template may go; what its children have is whole.
    vm.manager.discard_vm(vm.name)
    child.assert_restores(snapshot)
    child.assert_restores(child.snapshot())
    [notice] = notices_of(vm.manager)
    assert f"the template {template} is gone" in notice
    child.manager.incremental_backup(child.name, snapshot)
    assert notices_of(vm.manager) == ()


def notices_of(manager: StateManager) -> tuple[str, ...]:
    """What the last write gave notice of."""
    assert manager.last_transfer is not None
    return manager.last_transfer.notices


def test_discarding_without_rules(vm: Vm) -> None:
    vm.volume(2 * MIB, [(0, noise(MIB))])
    vm.register()
    data = vm.manager.persist_application_data("task-d", b"what the task made")
    snapshot = vm.snapshot()
    write_at(vm.path(), 100_000, noise(5000, 3))
    backup = vm.manager.incremental_backup(vm.name, snapshot)
    receipt = vm.manager.discard_vm(vm.name)
    assert (receipt.vm_id, receipt.point_count, receipt.newest_point_id) == (vm.name, 2, backup)
    assert receipt.released_bytes > MIB
    assert receipt.kept == ()
    assert vm.manager.discard_vm(vm.name) == receipt
    refused(ErrorCode.NOT_FOUND, vm.manager.vm, vm.name)
    refused(ErrorCode.NOT_FOUND, vm.manager.restore_vm, backup, target=vm.folder / "gone")
    assert vm.manager.retrieve_application_data(data) == b"what the task made"
    # The name is free again, and has nothing of the old VM.
    vm.register()
    assert vm.manager.points(vm.name) == []
    vm.assert_restores(vm.snapshot())
    refused(ErrorCode.NOT_FOUND, vm.manager.discard_vm, "nobody")


@pytest.fixture(scope="module")
def task_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ext4 image of what a task leaves: weights, a checkpoint of the optimizer, a secret, and the system."""
    source = tmp_path_factory.mktemp("task") / "source"
    for name, size in (
        ("out/run/model.safetensors", 300_000),
        ("out/run/optimizer.safetensors", 200_000),
        ("out/config.json", 500),
        ("out/.ssh/id_ed25519", 400),
        ("usr/lib/libbig.so", 2_000_000),
    ):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(noise(size, size))
    return make_image(source.parent / "disk.raw", source, size=16 * MIB)


KEEP = KeepRule(task_id="train", include=["/out/**"], exclude=["**/optimizer*"], exclude_secrets=True)


def running_vm(vm: Vm, disk: Path, *rules: KeepRule) -> str:
    """Register a VM with a copy of the disk and keep rules; return its snapshot."""
    shutil.copy(disk, vm.path())
    vm.manager.register_vm(vm.name, {"root": vm.path()}, keep=rules)
    return vm.snapshot()


def files_of(manager: StateManager, storage_id: str) -> list[str]:
    """The paths of the files of a set."""
    found = manager.list_files(storage_id, recursive=True)
    return sorted(os.fsdecode(each.path) for each in found if each.kind.value == "file")


def test_what_a_vm_must_keep_outlives_it(vm: Vm, task_disk: Path) -> None:
    logs = KeepRule(name="libs", task_id="libs", include=["**/*.so"])
    snapshot = running_vm(vm, task_disk, KEEP, logs)
    receipt = vm.manager.discard_vm(vm.name)
    assert [(kept.keep_rule, kept.task_id, kept.point_id) for kept in receipt.kept] == [
        ("keep", "train", snapshot),
        ("libs", "libs", snapshot),
    ]
    train, libs = (kept.storage_id for kept in receipt.kept)
    assert files_of(vm.manager, train) == ["out/config.json", "out/run/model.safetensors"]
    assert files_of(vm.manager, libs) == ["usr/lib/libbig.so"]
    assert vm.manager.read_file(train, "/out/run/model.safetensors") == noise(300_000, 300_000)
    for kept in receipt.kept:
        assert kept.durable_blocks
        info = vm.manager.application_data(kept.storage_id)
        assert (info.size_bytes, info.form) == (kept.size_bytes, ObjectForm.FILES)
        assert info.origin is not None
        assert info.origin.file_count == kept.file_count
    refused(ErrorCode.NOT_FOUND, vm.manager.vm, vm.name)


def test_only_the_newest_point_counts_and_what_was_stored_is_taken_again(vm: Vm, task_disk: Path) -> None:
    snapshot = running_vm(vm, task_disk, KEEP)
    with vm.path().open("r+b") as disk:
        at = task_disk.read_bytes().index(noise(500, 500))
        disk.seek(at)
        disk.write(b"{}" * 250)
    newest = vm.manager.incremental_backup(vm.name, snapshot)
    stored = vm.manager.list_application_data("train")
    calls = interrupted_discard(vm.manager, vm.name)
    first = [each for each in vm.manager.list_application_data("train") if each not in stored]
    assert len(first) == len(calls) == 1
    receipt = vm.manager.discard_vm(vm.name)
    assert [kept.storage_id for kept in receipt.kept] == [first[0].storage_id]
    assert receipt.newest_point_id == newest
    assert vm.manager.read_file(first[0].storage_id, "out/config.json") == b"{}" * 250


def interrupted_discard(manager: StateManager, vm_id: str) -> list[str]:
    """Discard a VM, but lose the coordinator at the last call; return the newest points that were named to it."""
    named: list[str] = []

    async def lost(vm_id: str, storage_ids: Any, *, newest_point_id: str) -> Any:
        named.append(newest_point_id)
        raise HoldfastError(ErrorCode.UNREACHABLE, "the coordinator is gone")

    calls = manager._core._remote
    whole, calls.discard_vm = calls.discard_vm, lost  # type: ignore[method-assign]
    try:
        refused(ErrorCode.UNREACHABLE, manager.discard_vm, vm_id)
    finally:
        calls.discard_vm = whole  # type: ignore[method-assign]
    return named


@pytest.mark.parametrize(
    "rule",
    [
        KeepRule(task_id="train", include=["**/*.safetensor"]),
        KeepRule(task_id="train", include=["/out/**"], partition=3),
    ],
    ids=["a pattern that matches nothing", "a partition that there is not"],
)
def test_a_vm_stays_whole_while_a_rule_cannot_be_fulfilled(vm: Vm, task_disk: Path, rule: KeepRule) -> None:
    snapshot = running_vm(vm, task_disk, rule)
    error = refused(ErrorCode.NOT_FOUND, vm.manager.discard_vm, vm.name)
    assert f"the keep rule keep of {vm.name} cannot be fulfilled" in error.message
    assert not vm.manager.vm(vm.name).discarding_unix_ms
    vm.assert_restores(snapshot)


@pytest.mark.slow
def test_the_role_that_the_document_shows_is_enough_for_a_whole_life(
    cluster: MemoryCluster, tmp_path: Path, task_disk: Path
) -> None:
    (document,) = fenced(text_of(DOCUMENT), "json")
    roles = json.loads(document)["roles"]

    async def bind(*bindings: tuple[str, str, str]) -> str:
        admin = Client(cluster.coordinator_address, token=cluster.token)
        try:
            await admin.bind(*bindings, roles=roles)
            return await admin.new_token("owner")
        finally:
            await admin.close()

    token = asyncio.run(bind(("owner", "vm-owner", "vm/web-*"), ("owner", "vm-owner", "task/train")))
    with StateManager(cluster.coordinator_address, token=token) as manager:
        vm = Vm(manager, "web-1", tmp_path)
        running_vm(vm, task_disk, KEEP)
        assert len(manager.discard_vm("web-1").kept) == 1
        running_vm(vm, task_disk, KEEP)
        asyncio.run(bind(("owner", "vm-owner", "vm/web-*")))
        refused(ErrorCode.DENIED, manager.discard_vm, "web-1")
        asyncio.run(bind(("owner", "backup-writer", "*"), ("owner", "app-writer", "*"), ("owner", "app-reader", "*")))
        refused(ErrorCode.DENIED, manager.discard_vm, "web-1")


@pytest.mark.slow
def test_a_set_that_was_damaged_is_stored_again(cluster: MemoryCluster, tmp_path: Path, task_disk: Path) -> None:
    with cluster.state_manager() as manager:
        vm = Vm(manager, "vm", tmp_path)
        running_vm(vm, task_disk, KEEP)
        interrupted_discard(manager, vm.name)
        [damaged] = data_ids(cluster, 0, int(Kind.APPLICATION))[:1]
        for number in range(3):
            rot(cluster, number, damaged)
        receipt = manager.discard_vm(vm.name)
        stored = manager.list_application_data("train")
        assert len(stored) == 2
        assert receipt.kept[0].storage_id == stored[-1].storage_id
        assert manager.read_file(stored[-1].storage_id, "out/run/model.safetensors") == noise(300_000, 300_000)


async def test_asyncio(shared_cluster: MemoryCluster, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(noise(MIB))
    name = f"async-{random.randrange(1 << 30)}"
    async with AsyncStateManager(shared_cluster.coordinator_address, token=shared_cluster.token) as manager:
        await manager.register_vm(name, {"root": tmp_path / "disk"}, labels={"a": ""})
        snapshot = await manager.create_snapshot(name)
        assert (await manager.discard_vm(name)).newest_point_id == snapshot
