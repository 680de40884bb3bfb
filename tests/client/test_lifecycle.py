"""The life of a VM through the SDK: what it carries, the template it comes from, and its end."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from holdfast import AsyncStateManager, ErrorCode, HoldfastError, KeepRule, VolumeSpec
from holdfast.testing import MemoryCluster
from holdfast_core.model.limits import MIB
from tests.client.rig import Vm, noise, write_at

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
    # The template may go; what its children have is whole.
    vm.manager.discard_vm(vm.name)
    child.assert_restores(snapshot)
    child.assert_restores(child.snapshot())


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


async def test_asyncio(shared_cluster: MemoryCluster, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(noise(MIB))
    name = f"async-{random.randrange(1 << 30)}"
    async with AsyncStateManager(shared_cluster.coordinator_address, token=shared_cluster.token) as manager:
        await manager.register_vm(name, {"root": tmp_path / "disk"}, labels={"a": ""})
        snapshot = await manager.create_snapshot(name)
        assert (await manager.discard_vm(name)).newest_point_id == snapshot
