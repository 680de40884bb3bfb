"""The audit log and the calls: one record for each, in the transaction that makes the change, and before any answer."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from holdfast_coordinator import keyspace
from holdfast_core.model.audit.record import AuditRecord
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.clock import ManualClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.rules import all_rules
from holdfast_proto.v1 import cluster_pb2, state_pb2
from holdfast_proto.v1.records_pb2 import RetentionRules, VmRecord, VolumeSpec
from tests.coordinator.faults import Fault, FaultyStore
from tests.coordinator.rig import (
    Client,
    add_stopped_node,
    coordinator,
    empty_object_commit,
    eventually,
    records,
    refused,
    zero_commit,
)

NONCE = bytes(range(16))


@dataclass
class World:
    """A coordinator over a store that can be made to refuse records, with a snapshot, an object and open sessions."""

    client: Client
    faults: FaultyStore
    store: SqliteStore
    requests: dict[str, Any]

    async def call(self, name: str, request: Any = None) -> Any:
        """Make a call by its name, with the request that the world has for it."""
        request = self.requests[name] if request is None else request
        if hasattr(state_pb2, f"{name}Request"):
            return await self.client.state(name, request)
        return await self.client.cluster(name, request)

    async def state(self) -> dict[str, bytes]:
        """Return every key that a call may change, and its value."""
        tenant = keyspace.TenantKeyspace(1).keys.removesuffix("keys")
        nodes = [keyspace.NODE_RECORDS_PREFIX, keyspace.NODE_STATES_PREFIX]
        prefixes = [tenant, keyspace.LAYOUT_PREFIX, keyspace.LAYOUT_HISTORY_PREFIX, keyspace.AUDIT_HEAD, *nodes]
        return {item.key: item.value for item in (await self.store.snapshot(prefixes)).items}


@pytest.fixture
async def world(store: SqliteStore, clock: ManualClock) -> AsyncIterator[World]:
    faults = FaultyStore(store)
    async with coordinator(faults, clock=clock) as client:
        await client.form_layout()
        for vm_id in ("vm-1", "vm-2", "vm-3"):
            await client.register_vm(vm_id)
        point = await client.save()
        begun = await client.begin("vm-2")
        other = await client.begin("vm-3")
        begin = state_pb2.BeginObjectRequest(task_id="task-1", nonce=NONCE)
        first, second = await client.state("BeginObject", begin), None
        await client.state("CommitObject", empty_object_commit(first, "task-1"))
        begin.nonce = NONCE[::-1]
        second = await client.state("BeginObject", begin)
        vm = VmRecord(vm_id="vm-9", volumes=[VolumeSpec(name="root", uri="/disks/root")])
        requests = {
            "RegisterVm": state_pb2.RegisterVmRequest(vm=vm),
            "GetVm": state_pb2.GetVmRequest(vm_id="vm-1"),
            "ListVms": state_pb2.ListVmsRequest(),
            "BeginPoint": state_pb2.BeginPointRequest(vm_id="vm-1", nonce=NONCE),
            "CommitPoint": zero_commit(begun),
            "AbortSession": state_pb2.AbortSessionRequest(session_id=other.session_id),
            "GetPoint": state_pb2.GetPointRequest(point_id=point.point_id),
            "ListPoints": state_pb2.ListPointsRequest(vm_id="vm-1"),
            "ResolvePoint": state_pb2.ResolvePointRequest(snapshot_id=point.point_id),
            "ForgetPoint": state_pb2.ForgetPointRequest(point_id=point.point_id),
            "BeginObject": state_pb2.BeginObjectRequest(task_id="task-2", nonce=NONCE[1:] + NONCE[:1]),
            "CommitObject": empty_object_commit(second, "task-1"),
            "ResolveObject": state_pb2.ResolveObjectRequest(storage_id=first.session_id),
            "ListObjects": state_pb2.ListObjectsRequest(task_id="task-1"),
            "ForgetObject": state_pb2.ForgetObjectRequest(storage_id=first.session_id),
            "RefreshGrant": state_pb2.RefreshGrantRequest(resource_id=point.point_id),
            "ReportDamage": state_pb2.ReportDamageRequest(resource_id=point.point_id),
            "GetStats": state_pb2.GetStatsRequest(),
            "DiscardVm": state_pb2.DiscardVmRequest(vm_id="vm-1", newest_point_id=point.point_id),
            "LockPoint": state_pb2.LockPointRequest(
                point_id=point.point_id, until_unix_ms=clock.now_unix_ms() + 86_400_000
            ),
            "UnlockPoint": state_pb2.UnlockPointRequest(point_id=point.point_id),
            "SetRetention": state_pb2.SetRetentionRequest(vm_id="vm-1", rules=RetentionRules(keep_last=1)),
            "ApplyRetention": state_pb2.ApplyRetentionRequest(vm_id="vm-1"),
            "ApplyLayout": cluster_pb2.ApplyLayoutRequest(previous_epoch=1),
            "SetNode": cluster_pb2.SetNodeRequest(node_id="node-1", weight_bytes=1 << 39),
            "RemoveNode": cluster_pb2.RemoveNodeRequest(node_id="node-9"),
        }
        await client.beat(4)
        await add_stopped_node(store, "node-9")
        yield World(client, faults, store, requests)


RECORDED = sorted(
    path.rpartition("/")[2]
    for path, rule in all_rules().items()
    if rule is not None and rule.recorded and path.startswith(("/holdfast.v1.StateService/", "/holdfast.v1.Cluster"))
)


@pytest.mark.parametrize("name", RECORDED)
async def test_a_call_leaves_one_record_before_its_answer_and_none_without_it(world: World, name: str) -> None:
    if name == "UnlockPoint":
        await world.call("LockPoint")
    before, known = await world.state(), await records(world.store)
    world.faults.refuse_log(True)
    await refused(ErrorCode.UNREACHABLE, world.call(name))
    assert await world.state() == before
    world.faults.refuse_log(False)
    await world.call(name)
    (made,) = (await records(world.store))[len(known) :]
    assert (made.outcome, made.principal) == ("OK", "admin")
    assert made.resource


async def outcomes(world: World, *calls: tuple[str, Any]) -> list[str]:
    """Make the calls one after another, whatever they answer; return the outcomes that the log has of them."""
    known = len(await records(world.store))
    for name, request in calls:
        with contextlib.suppress(HoldfastError):
            await world.call(name, request)
    return [record.outcome for record in (await records(world.store))[known:]]


@pytest.mark.parametrize(
    ("name", "again"),
    [
        ("RegisterVm", "REPEATED"),
        ("BeginPoint", "REPEATED"),
        ("CommitPoint", "REPEATED"),
        ("AbortSession", "REPEATED"),
        ("ForgetPoint", "REPEATED"),
        ("BeginObject", "REPEATED"),
        ("CommitObject", "REPEATED"),
        ("ForgetObject", "NOT_FOUND"),
        ("DiscardVm", "REPEATED"),
        ("LockPoint", "REPEATED"),
        ("SetRetention", "REPEATED"),
        ("ApplyRetention", "OK"),
        ("ApplyLayout", "CONFLICT"),
        ("SetNode", "REPEATED"),
        ("RemoveNode", "NOT_FOUND"),
    ],
)
async def test_what_is_asked_for_again_is_made_once_and_the_log_says_so(world: World, name: str, again: str) -> None:
    assert await outcomes(world, (name, None), (name, None)) == ["OK", again]


async def test_a_refusal_is_recorded_as_what_it_is(world: World) -> None:
    begin = state_pb2.BeginPointRequest(vm_id="vm-2", nonce=NONCE)
    missing = state_pb2.GetVmRequest(vm_id="vm-8")
    lapsed = state_pb2.CommitPointRequest(session_id="snap-unknown", mac=bytes(32), volumes=[])
    lapsed.volumes.extend(world.requests["CommitPoint"].volumes)
    assert await outcomes(world, ("BeginPoint", begin), ("GetVm", missing), ("CommitPoint", lapsed)) == [
        "BUSY",
        "NOT_FOUND",
        "SESSION_LAPSED",
    ]
    busy, unknown, _ = (await records(world.store))[-3:]
    assert (busy.action, busy.resource) == ("snapshot.create", "vm/vm-2")
    assert (unknown.action, unknown.resource) == ("vm.list", "vm/vm-8")


def tell(record: AuditRecord) -> tuple[str, str, dict[str, str]]:
    """Return what a record says of what was done."""
    return record.action, record.resource, dict(record.details)


async def test_a_backup_can_be_followed_through_the_log(world: World) -> None:
    snapshot_id = world.requests["GetPoint"].point_id
    known = len(await records(world.store))
    first = await world.client.begin(incremental=True, snapshot_id=snapshot_id)
    begun = await world.client.begin(incremental=True, snapshot_id=snapshot_id, takeover=True)
    await world.client.commit(zero_commit(begun))
    await world.client.state("AbortSession", state_pb2.AbortSessionRequest(session_id=first.session_id))
    await world.client.state("ForgetPoint", state_pb2.ForgetPointRequest(point_id=begun.session_id))
    point = {"point": begun.session_id}
    assert [tell(record) for record in (await records(world.store))[known:]] == [
        ("backup.create", "vm/vm-1", {"step": "begin", "point": first.session_id, "parent": snapshot_id}),
        (
            "backup.create",
            "vm/vm-1",
            {"step": "begin", **point, "parent": snapshot_id, "takeover_of": first.session_id},
        ),
        ("backup.create", "vm/vm-1", {"step": "commit", **point}),
        ("backup.create", "", {"step": "abort", "point": first.session_id}),
        ("point.forget", "vm/vm-1", point),
    ]


async def test_nodes_and_the_first_layout_are_recorded_once(store: SqliteStore, clock: ManualClock) -> None:
    async with coordinator(store, clock=clock) as client:
        for _ in range(2):
            await client.form_layout()
        await client.beat(2, capacity_bytes=1 << 41)
        await refused(ErrorCode.ALREADY_EXISTS, client.beat(1, incarnation=bytes(16)))
    assert [(record.principal, *tell(record)) for record in await records(store)] == [
        *(("admin", "cluster.join", f"node/node-{n}", {"step": "register"}) for n in (1, 2, 3)),
        ("coordinator", "layout.form", "cluster", {"epoch": "1"}),
        ("admin", "cluster.join", "node/node-2", {"step": "change"}),
    ]


async def test_a_lost_answer_leaves_one_record_of_what_was_made(world: World) -> None:
    for at in range(40):
        world.faults.arm(Fault.LOST_AFTER, at=at)
        request = state_pb2.RegisterVmRequest(
            vm=VmRecord(vm_id=f"vm-lost-{at}", volumes=[VolumeSpec(name="root", uri="/disks/root")])
        )
        with contextlib.suppress(HoldfastError):
            await world.call("RegisterVm", request)
        struck = world.faults.struck
        world.faults.arm(None)
        await world.call("RegisterVm", request)
        seen = [record.outcome for record in await records(world.store) if record.resource == f"vm/vm-lost-{at}"]
        assert seen.count("OK") == 1
        assert set(seen) <= {"OK", "REPEATED", "UNREACHABLE"}
        if not struck:
            break
    assert 1 < at < 39


async def test_of_watching_and_keeping_alive_nothing_is_recorded(world: World) -> None:
    session_id = world.requests["CommitPoint"].session_id
    known = await records(world.store)

    async def seen() -> bool:
        return bool((await world.client.first_state()).nodes)

    await eventually(seen, "the nodes are known")
    await world.call("KeepAlive", state_pb2.KeepAliveRequest(session_id=session_id))
    for name in ("ListNodes", "GetLayout", "GetClusterStatus"):
        await world.call(name, getattr(cluster_pb2, f"{name}Request")())
    assert await records(world.store) == known
