"""VMs with all that they carry, and stored sets of files that say that they fulfil keep rules."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from holdfast_core.model.lifecycle import keep_digest
from holdfast_core.runtime.metadata.store import MetadataStore
from holdfast_proto.v1 import state_pb2
from holdfast_proto.v1.records_pb2 import OBJECT_FORM_FILES, KeepRule, ObjectOrigin, VmRecord, VolumeSpec
from tests.coordinator.rig import Client, empty_object_commit


def vm_of(vm_id: str = "vm-1", **fields: Any) -> VmRecord:
    """Return a registration with one volume and these fields."""
    return VmRecord(vm_id=vm_id, volumes=[VolumeSpec(name="root", uri="/disks/root")], **fields)


def rule_of(name: str = "weights", **fields: Any) -> KeepRule:
    """Return a keep rule about the volume `root`."""
    return KeepRule(**({"name": name, "task_id": "task-1", "volume": "root", "include": ["**/*.bin"]} | fields))


def origin_of(rule: KeepRule, point_id: str, vm_id: str = "vm-1", **fields: Any) -> ObjectOrigin:
    """Return the origin of files that fulfil a rule."""
    known: dict[str, Any] = {
        "vm_id": vm_id,
        "point_id": point_id,
        "volume": rule.volume,
        "keep_rule": rule.name,
        "keep_digest": keep_digest(rule),
        "file_count": 3,
    }
    return ObjectOrigin(**(known | fields))


async def register(client: Client, vm: VmRecord, *, replace: bool = False) -> VmRecord:
    """Register a VM and return its record."""
    answer = await client.state("RegisterVm", state_pb2.RegisterVmRequest(vm=vm, replace=replace))
    registered: VmRecord = answer.vm
    return registered


async def store_files(client: Client, origin: ObjectOrigin | None, task_id: str = "task-1", **fields: Any) -> str:
    """Store an object without bytes that says this of itself; return its id."""
    request = state_pb2.BeginObjectRequest(task_id=task_id, nonce=random.randbytes(16))
    begun = await client.state("BeginObject", request)
    commit = empty_object_commit(begun, task_id)
    commit.form = fields.get("form", OBJECT_FORM_FILES)
    if origin is not None:
        commit.origin.CopyFrom(origin)
    stored = (await client.state("CommitObject", commit)).object
    return str(stored.storage_id)


async def discard(client: Client, newest: str, storage_ids: Sequence[str] = (), vm_id: str = "vm-1") -> Any:
    """Discard a VM and return the receipt."""
    request = state_pb2.DiscardVmRequest(vm_id=vm_id, newest_point_id=newest, storage_ids=storage_ids)
    return await client.state("DiscardVm", request)


async def keys_about(store: MetadataStore, vm_id: str, point_ids: Sequence[str] = ()) -> list[str]:
    """Return all keys that are named after a VM or one of its points, its receipt left out."""
    wanted = {vm_id, *point_ids}
    return [
        item.key
        for item in (await store.snapshot(["holdfast/v1/t/"])).items
        if wanted.intersection(item.key.split("/")) and "/discards/" not in item.key
    ]
