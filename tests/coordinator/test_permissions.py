"""Every call about state and cluster: what it takes, what is refused without it, and what the log says of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final

import grpc.aio
import jwt
import pytest

from holdfast_coordinator.grants import confined
from holdfast_coordinator.keyspace import TenantKeyspace
from holdfast_core.model.access.permissions import ADMIN_PERMISSIONS, CLUSTER_PERMISSIONS, TENANT_PERMISSIONS
from holdfast_core.model.audit.record import AuditRecord
from holdfast_core.model.block import Kind
from holdfast_core.model.errors import ErrorCode
from holdfast_core.model.keys import TenantSecrets
from holdfast_core.runtime.clock import ManualClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import Put
from holdfast_core.runtime.rules import all_rules
from holdfast_core.runtime.status import error_from_rpc
from holdfast_proto.v1 import cluster_pb2, state_pb2
from holdfast_proto.v1.common_pb2 import NodeHealing, NodeStatus
from holdfast_proto.v1.records_pb2 import SessionRecord, VmRecord, VolumeSpec
from tests.coordinator.rig import Client, add_stopped_node, empty_object_commit, records, refused, zero_commit

ALL: Final = TENANT_PERMISSIONS | CLUSTER_PERMISSIONS
NONCE: Final = bytes(range(16))


@dataclass
class World:
    """A cluster with something of everything, and a principal `agent` that holds nothing yet."""

    admin: Client
    agent: Client
    store: SqliteStore
    point_id: str
    storage_id: str

    async def agent_records(self) -> list[AuditRecord]:
        """Return what the log has of the agent."""
        return [record for record in await records(self.store) if record.principal == "agent"]


@pytest.fixture
async def world(client: Client, store: SqliteStore) -> AsyncIterator[World]:
    point = await client.save()
    request = state_pb2.BeginObjectRequest(task_id="task-1", nonce=NONCE)
    begun = await client.state("BeginObject", request)
    await client.state("CommitObject", empty_object_commit(begun, "task-1"))
    agent = Client(client.address, token=await client.new_token("agent"))
    yield World(client, agent, store, point.point_id, begun.session_id)
    await agent.close()


@dataclass(frozen=True)
class Case:
    """One call, the permission that it takes and the resource that the permission is asked on."""

    method: str
    permission: str
    resource: str
    request: Callable[[World], Any]
    filtered: bool = False

    @property
    def recorded(self) -> bool:
        """Whether its rule says that it is recorded."""
        rule = all_rules()[self.path]
        return rule is not None and rule.recorded

    @property
    def path(self) -> str:
        """Its name as gRPC has it."""
        service = "StateService" if hasattr(state_pb2, f"{self.method}Request") else "ClusterService"
        return f"/holdfast.v1.{service}/{self.method}"

    async def call(self, world: World) -> Any:
        """Make the call as the agent."""
        request = self.request(world)
        if self.method == "WatchCluster":
            return await world.agent.first_state()
        if "StateService" in self.path:
            return await world.agent.state(self.method, request)
        return await world.agent.cluster(self.method, request)


def begin_point(world: World, *, incremental: bool) -> state_pb2.BeginPointRequest:
    """Return a request for a session on vm-1."""
    snapshot_id = world.point_id if incremental else ""
    return state_pb2.BeginPointRequest(vm_id="vm-1", nonce=NONCE, incremental=incremental, snapshot_id=snapshot_id)


def discard_vm(world: World) -> state_pb2.DiscardVmRequest:
    """Return the request that ends vm-1."""
    return state_pb2.DiscardVmRequest(vm_id="vm-1", newest_point_id=world.point_id)


VM: Final = VmRecord(vm_id="vm-1", volumes=[VolumeSpec(name="root", uri="/disks/root")])
STATUS: Final = NodeStatus(node_id="node-1", address="127.0.0.1:1025", zone="zone-1", capacity_bytes=1 << 40)
HEARTBEAT: Final = cluster_pb2.HeartbeatRequest(status=STATUS, incarnation=bytes([1]) * 16)
SET_NODE: Final = cluster_pb2.SetNodeRequest(node_id="node-1", weight_bytes=1 << 39)
HISTORY: Final = cluster_pb2.GetLayoutHistoryRequest()
BEGIN_OBJECT: Final = state_pb2.BeginObjectRequest(task_id="task-1", nonce=NONCE[::-1])
CASES: Final = [
    Case("RegisterVm", "vm.register", "vm/vm-1", lambda w: state_pb2.RegisterVmRequest(vm=VM)),
    Case("GetVm", "vm.list", "vm/vm-1", lambda w: state_pb2.GetVmRequest(vm_id="vm-1")),
    Case("ListVms", "vm.list", "vm/*", lambda w: state_pb2.ListVmsRequest(), filtered=True),
    Case("BeginPoint", "snapshot.create", "vm/vm-1", lambda w: begin_point(w, incremental=False)),
    Case("BeginPoint", "backup.create", "vm/vm-1", lambda w: begin_point(w, incremental=True)),
    Case("GetPoint", "point.list", "vm/vm-1", lambda w: state_pb2.GetPointRequest(point_id=w.point_id)),
    Case("ListPoints", "point.list", "vm/vm-1", lambda w: state_pb2.ListPointsRequest(vm_id="vm-1")),
    Case("ResolvePoint", "point.restore", "vm/vm-1", lambda w: state_pb2.ResolvePointRequest(snapshot_id=w.point_id)),
    Case("ForgetPoint", "point.forget", "vm/vm-1", lambda w: state_pb2.ForgetPointRequest(point_id=w.point_id)),
    Case(
        "LockPoint",
        "point.lock",
        "vm/vm-1",
        lambda w: state_pb2.LockPointRequest(point_id=w.point_id, until_unix_ms=1 << 41),
    ),
    Case("UnlockPoint", "point.unlock", "vm/vm-1", lambda w: state_pb2.UnlockPointRequest(point_id=w.point_id)),
    Case("SetRetention", "point.forget", "vm/vm-1", lambda w: state_pb2.SetRetentionRequest(vm_id="vm-1")),
    Case("ApplyRetention", "point.forget", "vm/vm-1", lambda w: state_pb2.ApplyRetentionRequest(vm_id="vm-1")),
    Case("DiscardVm", "vm.discard", "vm/vm-1", discard_vm),
    Case("BeginObject", "app.write", "task/task-1", lambda w: BEGIN_OBJECT),
    Case("ResolveObject", "app.read", "task/task-1", lambda w: state_pb2.ResolveObjectRequest(storage_id=w.storage_id)),
    Case("ListObjects", "app.list", "task/task-1", lambda w: state_pb2.ListObjectsRequest(task_id="task-1")),
    Case("ForgetObject", "app.forget", "task/task-1", lambda w: state_pb2.ForgetObjectRequest(storage_id=w.storage_id)),
    Case("RefreshGrant", "point.restore", "vm/vm-1", lambda w: state_pb2.RefreshGrantRequest(resource_id=w.point_id)),
    Case("RefreshGrant", "app.read", "task/task-1", lambda w: state_pb2.RefreshGrantRequest(resource_id=w.storage_id)),
    Case("ReportDamage", "damage.report", "vm/vm-1", lambda w: state_pb2.ReportDamageRequest(resource_id=w.point_id)),
    Case(
        "ReportDamage",
        "damage.report",
        "task/task-1",
        lambda w: state_pb2.ReportDamageRequest(resource_id=w.storage_id),
    ),
    Case("GetStats", "stats.read", "vm/vm-1", lambda w: state_pb2.GetStatsRequest(vm_id="vm-1")),
    Case("GetStats", "stats.read", "tenant/default", lambda w: state_pb2.GetStatsRequest()),
    Case("Heartbeat", "cluster.join", "node/node-1", lambda w: HEARTBEAT),
    Case("ListNodes", "cluster.read", "cluster", lambda w: cluster_pb2.ListNodesRequest(), filtered=True),
    Case("GetLayout", "cluster.read", "cluster", lambda w: cluster_pb2.GetLayoutRequest(), filtered=True),
    Case("GetClusterStatus", "cluster.read", "cluster", lambda w: cluster_pb2.GetClusterStatusRequest(), filtered=True),
    Case("Locate", "cluster.read", "cluster", lambda w: cluster_pb2.LocateRequest(block_ids=bytes(32)), filtered=True),
    Case("WatchCluster", "cluster.read", "cluster", lambda w: None, filtered=True),
    Case("PlanLayout", "cluster.admin", "cluster", lambda w: cluster_pb2.PlanLayoutRequest()),
    Case("ApplyLayout", "cluster.admin", "cluster", lambda w: cluster_pb2.ApplyLayoutRequest(previous_epoch=1)),
    Case("SetNode", "cluster.admin", "node/node-1", lambda w: SET_NODE),
    Case("RemoveNode", "cluster.admin", "node/node-9", lambda w: cluster_pb2.RemoveNodeRequest(node_id="node-9")),
    Case("GetLayoutHistory", "cluster.read", "cluster", lambda w: HISTORY, filtered=True),
]
# Calls about a session take what began it; they have tests of their own below.
OWN: Final = frozenset({"KeepAlive", "CommitPoint", "CommitObject", "AbortSession"})


def test_the_table_has_every_call_of_both_services() -> None:
    services = ("/holdfast.v1.StateService/", "/holdfast.v1.ClusterService/")
    every = {path for path in all_rules() if path.startswith(services)}
    assert {case.path for case in CASES} | {f"{services[0]}{name}" for name in OWN} == every
    for case in CASES:
        rule = all_rules()[case.path]
        assert rule is not None
        assert case.permission in (rule.permission, rule.permission_otherwise)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.method}-{case.permission}-{case.resource}")
async def test_a_call_takes_its_permission_on_its_resource_and_nothing_else(world: World, case: Case) -> None:
    await add_stopped_node(world.store, "node-9")
    roles = {"one": {case.permission}, "rest": ALL - {case.permission}, "all": ALL}
    roles = {name: held - ADMIN_PERMISSIONS for name, held in roles.items()}

    async def hold(role: str, pattern: str) -> None:
        if case.permission in ADMIN_PERMISSIONS and role != "rest":
            role = "admin"
        await world.admin.bind(("agent", role, pattern), tenant="*", roles=roles)

    await hold("rest", "*")
    denied = await refused_with_one_record(world, case)
    assert denied.action in (case.permission, all_rules()[case.path].permission)  # type: ignore[union-attr]
    if not case.filtered:
        await hold("all", f"{case.resource}-of-another")
        denied = await refused_with_one_record(world, case)
        assert (denied.action, denied.resource) == (case.permission, case.resource)

    await hold("one", case.resource)
    before = len(await world.agent_records())
    await case.call(world)
    made = (await world.agent_records())[before:]
    assert [(r.action, r.resource, r.tenant) for r in made] == [
        (case.permission, case.resource, "" if case.permission in CLUSTER_PERMISSIONS else "default")
    ] * case.recorded
    assert all(record.outcome in ("OK", "REPEATED") for record in made)


async def refused_with_one_record(world: World, case: Case) -> AuditRecord:
    """Make the call, which must be denied and leave one record that says so; return that."""
    before = len(await world.agent_records())
    await refused(ErrorCode.DENIED, case.call(world))
    (record,) = (await world.agent_records())[before:]
    assert record.outcome == "DENIED"
    return record


WRITERS: Final = (("agent", "backup-writer", "*"), ("agent", "app-writer", "*"))
BEGINS: Final = [
    ("snapshot.create", lambda world: ("BeginPoint", begin_point(world, incremental=False))),
    ("backup.create", lambda world: ("BeginPoint", begin_point(world, incremental=True))),
    ("app.write", lambda world: ("BeginObject", BEGIN_OBJECT)),
]


def session_calls(begun: Any) -> list[tuple[str, Any]]:
    """Return the calls that only a session's owner may make, the commit last but one and the abort last."""
    session_id = begun.session_id
    commit: tuple[str, Any] = (
        ("CommitPoint", zero_commit(begun))
        if isinstance(begun, state_pb2.BeginPointResponse)
        else ("CommitObject", empty_object_commit(begun, "task-1"))
    )
    return [
        ("KeepAlive", state_pb2.KeepAliveRequest(session_id=session_id)),
        ("RefreshGrant", state_pb2.RefreshGrantRequest(session_id=session_id)),
        commit,
        ("AbortSession", state_pb2.AbortSessionRequest(session_id=session_id)),
    ]


@pytest.mark.parametrize(("permission", "begin"), BEGINS, ids=[permission for permission, _ in BEGINS])
async def test_a_session_is_its_owners_alone(world: World, permission: str, begin: Callable[[World], Any]) -> None:
    other = Client(world.admin.address, token=await world.admin.new_token("other"))
    await world.admin.bind(*WRITERS, *(("other", role, on) for _, role, on in WRITERS))
    name, request = begin(world)
    begun = await world.agent.state(name, request)
    await refused(ErrorCode.ALREADY_EXISTS, other.state(name, request))
    for call, its_request in session_calls(begun):
        await refused(ErrorCode.SESSION_LAPSED, other.state(call, its_request))
    seen = [(r.action, r.outcome) for r in await records(world.store) if r.principal == "other"]
    # KeepAlive is not recorded; that the session was another's is seen in the log, though not by who asked.
    assert seen == [(permission, "ALREADY_EXISTS")] + [(permission, "SESSION_LAPSED")] * 3
    for call, its_request in session_calls(begun):
        await world.agent.state(call, its_request)
    await other.close()


@pytest.mark.parametrize(("permission", "begin"), BEGINS, ids=[permission for permission, _ in BEGINS])
async def test_a_session_ends_with_the_permission_that_began_it(
    world: World, permission: str, begin: Callable[[World], Any]
) -> None:
    await world.admin.bind(*WRITERS)
    begun = await world.agent.state(*begin(world))
    # Something else that begins sessions is left to it, so that it is the handler that refuses.
    roles = {"less": {"snapshot.create", "backup.create", "app.write", "point.restore", "app.read"} - {permission}}
    await world.admin.bind(("agent", "less", "*"), roles=roles)
    before = len(await world.agent_records())
    for call, request in session_calls(begun):
        await refused(ErrorCode.DENIED, world.agent.state(call, request))
    denied = (await world.agent_records())[before:]
    assert [(record.action, record.outcome) for record in denied] == [(permission, "DENIED")] * 4
    listed = await world.admin.points(include_forgotten=True)
    assert [point.point_id for point in listed] == [world.point_id]
    objects = (await world.admin.state("ListObjects", state_pb2.ListObjectsRequest(task_id="task-1"))).objects
    assert [stored.storage_id for stored in objects] == [world.storage_id]
    # Given back, the session is as it was.
    await world.admin.bind(*WRITERS)
    await world.agent.state(*session_calls(begun)[-2])


async def test_a_commit_that_is_asked_for_again_tells_its_record_to_who_may_write_there(world: World) -> None:
    await world.admin.bind(("agent", "backup-writer", "vm/vm-1"))
    begun = await world.agent.begin()
    made = await world.agent.commit(zero_commit(begun))
    assert await world.agent.commit(zero_commit(begun)) == made
    await world.admin.bind(("agent", "backup-writer", "vm/vm-2"))
    await refused(ErrorCode.DENIED, world.agent.commit(zero_commit(begun)))
    assert [r.outcome for r in await world.agent_records()] == ["OK", "OK", "REPEATED", "DENIED"]


async def test_a_session_of_before_there_were_principals_goes_on(world: World) -> None:
    await world.admin.bind(("agent", "backup-writer", "*"))
    begun = await world.admin.begin()
    key = TenantKeyspace(1).session(begun.session_id)
    item = await world.store.get(key)
    assert item is not None
    record = SessionRecord.FromString(item.value)
    record.ClearField("principal")
    await world.store.txn([], [Put(key, record.SerializeToString(), record.lease_id)])
    assert (await world.agent.commit(zero_commit(begun))).point_id == begun.session_id


async def test_who_may_list_some_vms_sees_those_page_by_page(world: World) -> None:
    for number in range(6):
        await world.admin.register_vm(f"db-{number}")
        await world.admin.register_vm(f"web-{number}")
    await world.admin.bind(("agent", "restorer", "vm/web-*"))
    seen, after, more = [], "", True
    while more:
        answer = await world.agent.state("ListVms", state_pb2.ListVmsRequest(after=after, limit=2))
        seen += [vm.vm_id for vm in answer.vms]
        assert len(answer.vms) <= 2
        after, more = (answer.vms[-1].vm_id if answer.vms else ""), answer.more
    assert seen == [f"web-{number}" for number in range(6)]


async def test_a_base_takes_being_allowed_to_list_its_points(world: World) -> None:
    await world.admin.register_vm("vm-2")
    await world.admin.bind(("agent", "backup-writer", "vm/vm-2"))
    request = state_pb2.BeginPointRequest(vm_id="vm-2", nonce=NONCE, base_id=world.point_id)
    error = await refused(ErrorCode.DENIED, world.agent.state("BeginPoint", request))
    assert "point.list on vm/vm-1" in error.message
    (record,) = await world.agent_records()
    assert (record.action, record.resource, record.outcome) == ("snapshot.create", "vm/vm-2", "DENIED")
    await world.admin.bind(("agent", "backup-writer", "vm/vm-2"), ("agent", "auditor", "vm/vm-1"))
    assert (await world.agent.state("BeginPoint", request)).base.point_id == world.point_id


@pytest.mark.parametrize("begin", [begin for _, begin in BEGINS], ids=[permission for permission, _ in BEGINS])
async def test_a_writer_reads_the_index_alone_until_it_may_restore(
    world: World, clock: ManualClock, begin: Callable[[World], Any]
) -> None:
    await world.admin.bind(*WRITERS)
    begun = await world.agent.state(*begin(world))
    refresh = state_pb2.RefreshGrantRequest(session_id=begun.session_id)
    clock.advance(25)
    again = (await world.agent.state("RefreshGrant", refresh)).grant
    for grant in (begun.grant, again):
        assert not grant.may_read_data
        assert [epoch.epoch for epoch in grant.keys.data_epochs] == [begun.key_epoch]
        assert claims_of(grant.capability)["rkn"] == [int(Kind.INDEX)]
        assert set(claims_of(grant.capability)["vrb"]) == {"put", "get", "has"}
    await world.admin.bind(*WRITERS, ("agent", "restorer", "vm/vm-1"), ("agent", "app-reader", "task/task-1"))
    grant = (await world.agent.state("RefreshGrant", refresh)).grant
    assert grant.may_read_data
    assert "rkn" not in claims_of(grant.capability)


async def test_the_capability_of_a_keep_alive_is_confined_as_that_of_the_begin(
    world: World, clock: ManualClock
) -> None:
    await world.admin.bind(*WRITERS)
    begun = await world.agent.begin()
    keep = state_pb2.KeepAliveRequest(session_id=begun.session_id)
    capability = ""
    while not capability:
        clock.advance(20)
        capability = (await world.agent.state("KeepAlive", keep)).capability
    assert claims_of(capability)["rkn"] == [int(Kind.INDEX)]
    assert claims_of(capability)["sid"] == begun.session_id


def test_of_several_data_epochs_a_writer_gets_the_one_that_it_seals_with() -> None:
    secrets = TenantSecrets(
        1, bytes(32), {n: bytes([n]) * 32 for n in (1, 2, 3)}, bytes(32), {1: bytes(32), 2: bytes(32)}
    )
    keys = TenantSecrets.from_message(confined(secrets, 2))
    assert dict(keys.data_epochs) == {2: bytes([2]) * 32}
    assert (keys.data_root, keys.structure_epochs) == (secrets.data_root, secrets.structure_epochs)
    own = TenantSecrets.from_message(confined(secrets.without_data(), 0))
    assert (own.data_root, dict(own.data_epochs)) == (None, {})


async def test_what_nodes_hold_is_told_to_who_may_read_of_all_tenants(world: World) -> None:
    await world.admin.beat(1, used_bytes=7, free_bytes=8, block_count=9, healing=NodeHealing(repaired_blocks=3))
    looks: list[Callable[[Client], Any]] = [
        lambda client: client.cluster("ListNodes", cluster_pb2.ListNodesRequest()),
        lambda client: client.cluster("GetClusterStatus", cluster_pb2.GetClusterStatusRequest()),
        lambda client: client.first_state(),
    ]
    await world.admin.bind(("agent", "admin", "*"))
    for look in looks:
        assert sum(node.used_bytes for node in (await look(world.admin)).nodes) == 7
        for node in (await look(world.agent)).nodes:
            assert not any((node.used_bytes, node.free_bytes, node.block_count, node.capacity_bytes))
            assert all((node.node_id, node.address, node.zone, node.up))
            assert not node.HasField("healing")
            assert not node.HasField("state")
    stats = state_pb2.GetStatsRequest()
    assert (await world.admin.state("GetStats", stats)).cluster_used_bytes == 7
    assert (await world.agent.state("GetStats", stats)).cluster_used_bytes == 0
    grant = (await world.admin.begin()).grant
    assert [(node.used_bytes, node.up) for node in grant.nodes] == [(0, True)] * 3


async def test_a_watch_ends_with_the_right_to_watch(world: World) -> None:
    await world.admin.bind(("agent", "auditor", "*"))
    watch = world.agent.watch()
    await watch.read()
    await world.admin.bind()
    await world.admin.beat(4)

    async def read_on() -> None:
        while await watch.read():
            pass

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(read_on(), 20)
    assert error_from_rpc(caught.value, peer="coordinator").code is ErrorCode.DENIED


async def test_a_node_speaks_for_itself_alone(world: World) -> None:
    token = await world.admin.new_token("spiffe://holdfast/node/node-1")
    node = Client(world.admin.address, token=token)
    await world.admin.bind(("spiffe://holdfast/node/*", "node", "node/*"), tenant="*")
    await node.beat(1)
    error = await refused(ErrorCode.DENIED, node.beat(2))
    assert "node-1" in error.message
    await refused(ErrorCode.DENIED, node.cluster("PlanLayout", cluster_pb2.PlanLayoutRequest()))
    await refused(ErrorCode.DENIED, node.state("ListVms", state_pb2.ListVmsRequest()))
    await node.close()


def claims_of(capability: str) -> Any:
    """Return what a capability says, its signature left alone."""
    return jwt.decode(capability, options={"verify_signature": False})
