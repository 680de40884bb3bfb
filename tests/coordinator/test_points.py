"""VMs, points and objects over gRPC: registration, lineage, listing, forgetting, sums."""

from __future__ import annotations

import random
from typing import Any

import pytest

from holdfast_core.model.errors import ErrorCode
from holdfast_core.runtime.clock import ManualClock
from holdfast_proto.v1 import cluster_pb2, state_pb2
from holdfast_proto.v1.records_pb2 import CODEC_CHOICE_LZ4, TransferStats, VmRecord, VolumeSpec
from tests.coordinator.rig import VOLUME_BYTES, Client, empty_object_commit, refused, zero_commit


async def resolve(client: Client, snapshot_id: str, backup_id: str = "") -> Any:
    """Resolve a point."""
    request = state_pb2.ResolvePointRequest(snapshot_id=snapshot_id, backup_id=backup_id)
    return await client.state("ResolvePoint", request)


async def forget(client: Client, point_id: str) -> None:
    """Forget a point."""
    await client.state("ForgetPoint", state_pb2.ForgetPointRequest(point_id=point_id))


async def put_empty(client: Client, task_id: str, number: int) -> Any:
    """Store an object without bytes."""
    request = state_pb2.BeginObjectRequest(task_id=task_id, nonce=random.Random(number).randbytes(16))
    begun = await client.state("BeginObject", request)
    return (await client.state("CommitObject", empty_object_commit(begun, task_id))).object


async def test_registration_is_idempotent_and_replaced_only_explicitly(client: Client) -> None:
    first = (await client.register_vm("vm-9", volumes=["b", "a"])).vm
    assert [volume.name for volume in first.volumes] == ["a", "b"]
    assert {volume.block_bytes for volume in first.volumes} == {64 * 1024}
    assert (await client.register_vm("vm-9", volumes=["a", "b"])).vm == first
    await refused(ErrorCode.ALREADY_EXISTS, client.register_vm("vm-9", volumes=["a"]))
    replaced = (await client.register_vm("vm-9", volumes=["a"], replace=True)).vm
    assert [volume.name for volume in replaced.volumes] == ["a"]
    assert replaced.created_unix_ms == first.created_unix_ms
    assert (await client.state("GetVm", state_pb2.GetVmRequest(vm_id="vm-9"))).vm == replaced


@pytest.mark.parametrize(
    "vm",
    [
        VmRecord(vm_id=""),
        VmRecord(vm_id="a/b", volumes=[VolumeSpec(name="root", uri="/x")]),
        VmRecord(vm_id="vm"),
        VmRecord(vm_id="vm", volumes=[VolumeSpec(name="", uri="/x")]),
        VmRecord(vm_id="vm", volumes=[VolumeSpec(name="root", uri="")]),
        VmRecord(vm_id="vm", volumes=[VolumeSpec(name="root", uri="nbds://host/x")]),
        VmRecord(vm_id="vm", volumes=[VolumeSpec(name="root", uri="/x"), VolumeSpec(name="root", uri="/y")]),
        VmRecord(vm_id="vm", volumes=[VolumeSpec(name="root", uri="/x", block_bytes=65_537)]),
        VmRecord(vm_id="vm", volumes=[VolumeSpec(name="root", uri="/x", block_bytes=8192)]),
    ],
)
async def test_what_a_registration_may_not_say(client: Client, vm: VmRecord) -> None:
    await refused(ErrorCode.INVALID_ARGUMENT, client.state("RegisterVm", state_pb2.RegisterVmRequest(vm=vm)))
    assert [each.vm_id for each in (await client.state("ListVms", state_pb2.ListVmsRequest())).vms] == ["vm-1"]


async def test_a_registration_keeps_what_it_says(client: Client) -> None:
    volume = VolumeSpec(name="data", uri="file:///d", block_bytes=1 << 20, live=True, codec=CODEC_CHOICE_LZ4)
    vm = VmRecord(vm_id="vm-9", volumes=[volume])
    kept = (await client.state("RegisterVm", state_pb2.RegisterVmRequest(vm=vm))).vm
    assert list(kept.volumes) == [volume]


async def test_vms_are_listed_in_pages(client: Client) -> None:
    for number in range(2, 6):
        await client.register_vm(f"vm-{number}")
    first = await client.state("ListVms", state_pb2.ListVmsRequest(limit=3))
    assert [vm.vm_id for vm in first.vms] == ["vm-1", "vm-2", "vm-3"]
    assert first.more
    rest = await client.state("ListVms", state_pb2.ListVmsRequest(after="vm-3"))
    assert [vm.vm_id for vm in rest.vms] == ["vm-4", "vm-5"]
    assert not rest.more


async def test_the_parent_is_the_newest_living_point_of_the_line(client: Client) -> None:
    snapshot = await client.save()
    first = await client.save(incremental=True, snapshot_id=snapshot.point_id)
    second = await client.save(incremental=True, snapshot_id=snapshot.point_id)
    assert (first.parent_id, second.parent_id) == (snapshot.point_id, first.point_id)
    assert [first.number, second.number] == [2, 3]
    branch = await client.save(incremental=True, snapshot_id=snapshot.point_id, parent_id=first.point_id)
    assert branch.parent_id == first.point_id
    await forget(client, branch.point_id)
    third = await client.save(incremental=True, snapshot_id=snapshot.point_id)
    assert third.parent_id == second.point_id


async def test_other_snapshots_begin_lines_of_their_own(client: Client) -> None:
    one, other = await client.save(), await client.save()
    backup = await client.save(incremental=True, snapshot_id=one.point_id)
    assert backup.parent_id == one.point_id
    await refused(ErrorCode.MISMATCH, resolve(client, other.point_id, backup.point_id))
    wrong = client.begin(incremental=True, snapshot_id=other.point_id, parent_id=backup.point_id)
    await refused(ErrorCode.MISMATCH, wrong)


async def test_a_forgotten_snapshot_still_begins_its_line(client: Client) -> None:
    snapshot = await client.save()
    backup = await client.save(incremental=True, snapshot_id=snapshot.point_id)
    await forget(client, snapshot.point_id)
    await forget(client, snapshot.point_id)
    await refused(ErrorCode.NOT_FOUND, resolve(client, snapshot.point_id))
    assert (await resolve(client, snapshot.point_id, backup.point_id)).point == backup
    next_one = await client.save(incremental=True, snapshot_id=snapshot.point_id)
    assert next_one.parent_id == backup.point_id
    for point in (backup, next_one):
        await forget(client, point.point_id)
    await refused(ErrorCode.NO_PARENT, client.begin(incremental=True, snapshot_id=snapshot.point_id))
    explicit = client.begin(incremental=True, snapshot_id=snapshot.point_id, parent_id=backup.point_id)
    await refused(ErrorCode.NO_PARENT, explicit)
    assert await client.points() == []
    stubs = await client.points(include_forgotten=True)
    assert [(stub.point_id, stub.forgotten, len(stub.volumes)) for stub in stubs] == [
        (point.point_id, True, 0) for point in (snapshot, backup, next_one)
    ]


async def test_forgetting_the_parent_does_not_disturb_the_session_on_it(client: Client) -> None:
    snapshot = await client.save()
    begun = await client.begin(incremental=True, snapshot_id=snapshot.point_id)
    await forget(client, snapshot.point_id)
    made = await client.commit(zero_commit(begun))
    assert made.parent_id == snapshot.point_id
    assert await client.points() == [made]


async def test_what_resolve_refuses(client: Client) -> None:
    snapshot = await client.save()
    await client.register_vm("vm-2")
    other = await client.save("vm-2")
    await refused(ErrorCode.NOT_FOUND, resolve(client, "snap-none"))
    await refused(ErrorCode.NOT_FOUND, resolve(client, snapshot.point_id, "bkp-none"))
    await refused(ErrorCode.MISMATCH, resolve(client, snapshot.point_id, other.point_id))
    await refused(ErrorCode.INVALID_ARGUMENT, resolve(client, ""))
    await refused(ErrorCode.INVALID_ARGUMENT, resolve(client, "../etc"))
    await refused(ErrorCode.NOT_FOUND, client.points("nobody"))
    await refused(ErrorCode.NOT_FOUND, forget(client, "snap-none"))


async def test_resolve_grants_reading(client: Client) -> None:
    snapshot = await client.save()
    resolved = await resolve(client, snapshot.point_id, snapshot.point_id)
    assert resolved.point == snapshot
    assert resolved.vm.vm_id == "vm-1"
    assert resolved.grant.capability
    assert resolved.grant.layouts[0].epoch == 1


async def test_grants_are_refreshed_for_sessions_and_readers(client: Client) -> None:
    snapshot = await client.save()
    begun = await client.begin()
    for request in (
        state_pb2.RefreshGrantRequest(session_id=begun.session_id),
        state_pb2.RefreshGrantRequest(resource_id=snapshot.point_id),
    ):
        assert (await client.state("RefreshGrant", request)).grant.capability
    await refused(ErrorCode.INVALID_ARGUMENT, client.state("RefreshGrant", state_pb2.RefreshGrantRequest()))
    gone = state_pb2.RefreshGrantRequest(session_id="snap-gone")
    await refused(ErrorCode.SESSION_LAPSED, client.state("RefreshGrant", gone))
    unknown = state_pb2.RefreshGrantRequest(resource_id="app-unknown")
    await refused(ErrorCode.NOT_FOUND, client.state("RefreshGrant", unknown))


async def test_objects_are_listed_by_task_oldest_first_and_forgotten(client: Client, clock: ManualClock) -> None:
    made = []
    for number in range(3):
        made.append(await put_empty(client, "task-1", number))
        clock.advance(1)
    await put_empty(client, "task-10", 9)
    listed = (await client.state("ListObjects", state_pb2.ListObjectsRequest(task_id="task-1"))).objects
    assert list(listed) == made
    storage_id = made[1].storage_id
    resolved = await client.state("ResolveObject", state_pb2.ResolveObjectRequest(storage_id=storage_id))
    assert resolved.object == made[1]
    assert resolved.grant.capability
    await client.state("ForgetObject", state_pb2.ForgetObjectRequest(storage_id=storage_id))
    gone = state_pb2.ResolveObjectRequest(storage_id=storage_id)
    await refused(ErrorCode.NOT_FOUND, client.state("ResolveObject", gone))
    again = state_pb2.ForgetObjectRequest(storage_id=storage_id)
    await refused(ErrorCode.NOT_FOUND, client.state("ForgetObject", again))
    listed = (await client.state("ListObjects", state_pb2.ListObjectsRequest(task_id="task-1"))).objects
    assert list(listed) == [made[0], made[2]]


async def test_sums_cover_what_is_visible(client: Client) -> None:
    begun = await client.begin()
    commit = zero_commit(begun)
    commit.stats.CopyFrom(TransferStats(logical_bytes=VOLUME_BYTES, read_bytes=10, stored_bytes=5, sent_bytes=15))
    snapshot = await client.commit(commit)
    await client.save(incremental=True, snapshot_id=snapshot.point_id)
    await client.register_vm("vm-2")
    await client.save("vm-2")
    await put_empty(client, "task-1", 1)
    one = await client.state("GetStats", state_pb2.GetStatsRequest(vm_id="vm-1"))
    assert (one.vm_count, one.point_count, one.object_count) == (1, 2, 0)
    assert (one.logical_bytes, one.stored_bytes, one.transfer.sent_bytes) == (2 * VOLUME_BYTES, 5, 15)
    all_of_it = await client.state("GetStats", state_pb2.GetStatsRequest())
    assert (all_of_it.vm_count, all_of_it.point_count, all_of_it.object_count) == (2, 3, 1)
    assert all_of_it.logical_bytes == 3 * VOLUME_BYTES
    await forget(client, snapshot.point_id)
    assert (await client.state("GetStats", state_pb2.GetStatsRequest(vm_id="vm-1"))).point_count == 1
    status = await client.cluster("GetClusterStatus", cluster_pb2.GetClusterStatusRequest())
    assert (status.vm_count, status.point_count, status.object_count, status.session_count) == (2, 2, 1, 0)
    await refused(ErrorCode.NOT_FOUND, client.state("GetStats", state_pb2.GetStatsRequest(vm_id="nobody")))
