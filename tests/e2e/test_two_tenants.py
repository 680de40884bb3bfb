"""Two tenants on one cluster: to each the other's ids are as absent as ids that never were, at every service."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from holdfast.aio import AsyncStateManager
from holdfast.results import VolumeSpec
from holdfast_core.model.access.permissions import ADMIN_PERMISSIONS, TENANT_PERMISSIONS
from holdfast_core.model.block import SealedBlock
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.names import BACKUP_PREFIX, OBJECT_PREFIX, SNAPSHOT_PREFIX, make_id
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.capability import CAPABILITY_METADATA_KEY
from holdfast_core.runtime.clock import SystemClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_proto.v1 import access_pb2, state_pb2, tenants_pb2
from holdfast_proto.v1.blocks_pb2 import VERDICT_MISSING, VERDICT_OK, GetBlocksRequest, HasBlocksRequest
from holdfast_proto.v1.blocks_pb2_grpc import BlockServiceStub
from holdfast_proto.v1.common_pb2 import Grant
from tests.coordinator.content import Cluster, cluster, put, random_blocks, seal_object, seal_volume
from tests.coordinator.rig import Client, point_commit, records, refused, ring_of, zero_volume

NEVER: Final = {
    "snapshot": make_id(SNAPSHOT_PREFIX, b"never was there."),
    "session": make_id(SNAPSHOT_PREFIX, b"nor was this one"),
    "backup session": make_id(BACKUP_PREFIX, b"nor was this one"),
    "object session": make_id(OBJECT_PREFIX, b"nor was this one"),
    "object": make_id(OBJECT_PREFIX, b"never was there."),
    "vm": "vm-never",
    "task": "task-never",
}
"""Ids of which nobody has ever heard, by what they would be of."""

MAC: Final = bytes(32)


@dataclass
class Owner:
    """Who has every right of a tenant and none elsewhere, and what is in that tenant."""

    client: Client
    token: str
    ids: dict[str, str]
    grant: Grant
    blocks: list[SealedBlock]


@dataclass
class World:
    """Two tenants on one cluster."""

    cluster: Cluster
    ann: Owner
    bob: Owner


async def populate(client: Client, token: str, name: str) -> Owner:
    """Make a snapshot, an object and three open sessions."""
    vm, other, task = f"vm-{name}", f"vm-open-{name}", f"task-{name}"
    await client.register_vm(vm)
    await client.register_vm(other)
    begun = await client.begin(vm)
    volume, sealed = seal_volume(ring_of(begun.grant.keys), random_blocks(1, range(20)), total=30)
    await put(begun.grant, sealed.everything)
    snapshot = (await client.commit(point_commit(begun, [volume]))).point_id
    nonce = random.randbytes(16)
    writing = await client.state("BeginObject", state_pb2.BeginObjectRequest(task_id=task, nonce=nonce))
    commit, cuts = seal_object(writing, task, [bytes([n]) * 100 for n in range(5)])
    await put(writing.grant, cuts.everything)
    await client.state("CommitObject", commit)
    open_object = state_pb2.BeginObjectRequest(task_id=task, nonce=random.randbytes(16))
    ids = {
        "snapshot": snapshot,
        "session": (await client.begin(other)).session_id,
        "backup session": (await client.begin(vm, incremental=True, snapshot_id=snapshot)).session_id,
        "object session": (await client.state("BeginObject", open_object)).session_id,
        "object": writing.session_id,
        "vm": vm,
        "task": task,
    }
    return Owner(client, token, ids, begun.grant, sealed.everything)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """Both tenants, populated alike."""
    store = await SqliteStore.open(":memory:", SystemClock())
    async with cluster(store) as made:
        admin = made.client
        bindings = []
        for name in ("ann", "bob"):
            await admin.tenants("CreateTenant", tenants_pb2.CreateTenantRequest(name=f"of-{name}"))
            bindings.append({"principal": name, "role": "owner", "tenant": f"of-{name}", "resource": "*"})
        await set_policy(admin, bindings)
        clients = {}
        for name in ("ann", "bob"):
            token = await admin.new_token(name)
            clients[name] = (Client(admin.address, token=token), token)
        try:
            yield World(made, *[await populate(*clients[name], name) for name in ("ann", "bob")])
        finally:
            for client, _ in clients.values():
                await client.close()
    await store.close()


async def set_policy(admin: Client, bindings: list[dict[str, str]]) -> None:
    """Give each principal its own tenant, whole."""
    document = json.dumps(
        {"format": 1, "roles": {"owner": sorted(TENANT_PERMISSIONS - ADMIN_PERMISSIONS)}, "bindings": bindings}
    )
    await admin.access("SetPolicy", access_pb2.SetPolicyRequest(document=document))


Request = Callable[[str], tuple[str, Any]]

# What an id is of, the call, and how the call names it.
CALLS: Final[dict[str, tuple[str, Request]]] = {
    "GetVm": ("vm", lambda x: ("GetVm", state_pb2.GetVmRequest(vm_id=x))),
    "BeginPoint": ("vm", lambda x: ("BeginPoint", state_pb2.BeginPointRequest(vm_id=x, nonce=bytes(16)))),
    "ListPoints": ("vm", lambda x: ("ListPoints", state_pb2.ListPointsRequest(vm_id=x))),
    "GetStats": ("vm", lambda x: ("GetStats", state_pb2.GetStatsRequest(vm_id=x))),
    "GetPoint": ("snapshot", lambda x: ("GetPoint", state_pb2.GetPointRequest(point_id=x))),
    "ForgetPoint": ("snapshot", lambda x: ("ForgetPoint", state_pb2.ForgetPointRequest(point_id=x))),
    "ResolvePoint": ("snapshot", lambda x: ("ResolvePoint", state_pb2.ResolvePointRequest(snapshot_id=x))),
    "ResolveBackup": (
        "snapshot",
        lambda x: ("ResolvePoint", state_pb2.ResolvePointRequest(snapshot_id=OWN, backup_id=x)),
    ),
    "Refresh": ("snapshot", lambda x: ("RefreshGrant", state_pb2.RefreshGrantRequest(resource_id=x))),
    "RefreshObject": ("object", lambda x: ("RefreshGrant", state_pb2.RefreshGrantRequest(resource_id=x))),
    "Damage": (
        "snapshot",
        lambda x: ("ReportDamage", state_pb2.ReportDamageRequest(resource_id=x, block_ids=bytes(32))),
    ),
    "Base": (
        "snapshot",
        lambda x: ("BeginPoint", state_pb2.BeginPointRequest(vm_id="vm-free", nonce=bytes(16), base_id=x)),
    ),
    "Backup": (
        "snapshot",
        lambda x: (
            "BeginPoint",
            state_pb2.BeginPointRequest(vm_id="vm-free", nonce=bytes(16), incremental=True, snapshot_id=x),
        ),
    ),
    "ResolveObject": ("object", lambda x: ("ResolveObject", state_pb2.ResolveObjectRequest(storage_id=x))),
    "ForgetObject": ("object", lambda x: ("ForgetObject", state_pb2.ForgetObjectRequest(storage_id=x))),
    "ListObjects": ("task", lambda x: ("ListObjects", state_pb2.ListObjectsRequest(task_id=x))),
    "KeepAlive": ("session", lambda x: ("KeepAlive", state_pb2.KeepAliveRequest(session_id=x))),
    "KeepBackup": ("backup session", lambda x: ("KeepAlive", state_pb2.KeepAliveRequest(session_id=x))),
    "KeepObject": ("object session", lambda x: ("KeepAlive", state_pb2.KeepAliveRequest(session_id=x))),
    "RefreshSession": ("session", lambda x: ("RefreshGrant", state_pb2.RefreshGrantRequest(session_id=x))),
    "CommitPoint": (
        "session",
        lambda x: ("CommitPoint", state_pb2.CommitPointRequest(session_id=x, mac=MAC, volumes=[zero_volume()])),
    ),
    "CommitObject": (
        "object session",
        lambda x: ("CommitObject", state_pb2.CommitObjectRequest(session_id=x, mac=MAC)),
    ),
    "CommitMade": ("object", lambda x: ("CommitObject", state_pb2.CommitObjectRequest(session_id=x, mac=MAC))),
    "AbortSession": ("session", lambda x: ("AbortSession", state_pb2.AbortSessionRequest(session_id=x))),
    "AbortMade": ("snapshot", lambda x: ("AbortSession", state_pb2.AbortSessionRequest(session_id=x))),
}
OWN: Final = "snap-own"
"""Stands for a snapshot of the caller's own."""

ANSWERED: Final = {"ListObjects", "AbortSession", "AbortMade"}
"""Calls that answer for an unknown id as for a known one that has nothing left."""


async def outcome(client: Client, method: str, request: Any) -> tuple[ErrorCode | None, str, dict[str, str]]:
    """What a caller can tell of how a call ended."""
    try:
        answer = await client.state(method, request)
    except HoldfastError as error:
        return error.code, error.message, {**error.facts}
    return None, str(answer), {}


def without(text: str, given: str) -> str:
    """A text with the id that the caller gave taken out."""
    return text.replace(given, "ID")


async def test_an_id_of_another_tenant_is_one_that_never_was(world: World) -> None:
    await world.bob.client.register_vm("vm-free")
    own = world.bob.ids["snapshot"]
    for name, (kind, call) in CALLS.items():
        told = []
        for given in (world.ann.ids[kind], NEVER[kind]):
            method, request = call(given)
            if name == "ResolveBackup":
                request.snapshot_id = own
            code, message, facts = await outcome(world.bob.client, method, request)
            told.append((code, without(message, given), {key: without(fact, given) for key, fact in facts.items()}))
        assert told[0] == told[1], name
        code = told[0][0]
        if name in ANSWERED:
            assert code is None, name
        elif "session" in kind or name == "CommitMade":
            assert code is ErrorCode.SESSION_LAPSED, name
        else:
            assert code is ErrorCode.NOT_FOUND, name
    # None of it did anything: Ann's sessions are open, her point and object are there, and nothing of hers is listed.
    for kind in ("session", "backup session", "object session"):
        await world.ann.client.state("KeepAlive", state_pb2.KeepAliveRequest(session_id=world.ann.ids[kind]))
    assert len(await world.ann.client.points("vm-ann")) == 1
    listed = await world.bob.client.state("ListVms", state_pb2.ListVmsRequest())
    assert {vm.vm_id for vm in listed.vms} == {"vm-bob", "vm-open-bob", "vm-free"}
    made = {record.resource for record in await records(world.cluster.store) if record.tenant == "of-ann"}
    assert not {resource for resource in made if "bob" in resource or "free" in resource}


async def test_nobody_is_let_into_another_tenant_whether_there_is_one_or_not(world: World) -> None:
    told = []
    for tenant in ("of-ann", "of-nobody"):
        client = Client(world.cluster.client.address, token=world.bob.token, tenant=tenant)
        try:
            error = await refused(ErrorCode.DENIED, client.state("ListVms", state_pb2.ListVmsRequest()))
        finally:
            await client.close()
        told.append(without(error.message, tenant))
    assert told[0] == told[1]


async def ask_nodes(grant: Grant, ids: list[bytes]) -> set[int]:
    """Verdicts of all nodes on blocks, from asking for their presence, their bytes verified, and their content."""
    verdicts: set[int] = set()
    async with NodePool() as pool:
        pool.update(grant.nodes)
        metadata = ((CAPABILITY_METADATA_KEY, grant.capability),)
        joined = b"".join(ids)
        for node_id in pool.known():
            stub = BlockServiceStub(pool.channel(node_id))
            for verify in (False, True):
                request = HasBlocksRequest(block_ids=joined, verify=verify)
                verdicts.update((await stub.HasBlocks(request, metadata=metadata)).verdicts)
            async for part in stub.GetBlocks(GetBlocksRequest(block_ids=joined), metadata=metadata):
                verdicts.update(part.verdicts)
                assert VERDICT_OK in part.verdicts or not part.blocks
    return verdicts


async def test_nodes_know_nothing_of_another_tenants_blocks(world: World) -> None:
    ids = [block.id for block in world.ann.blocks]
    assert await ask_nodes(world.ann.grant, ids) == {VERDICT_OK}
    assert await ask_nodes(world.bob.grant, ids) == {VERDICT_MISSING}
    never = [random.Random(n).randbytes(32) for n in range(len(ids))]
    assert await ask_nodes(world.bob.grant, never) == {VERDICT_MISSING}


def ids_of(world: World, tenant: int) -> set[bytes]:
    """Ids of all blocks of a tenant on any node, behind the services' backs."""
    found: set[bytes] = set()
    for node in world.cluster.nodes.values():
        assert node._memory is not None
        assert node._memory._store is not None
        entries = node._memory._store.scan(tenant, partition=None, after=b"", limit=1_000_000)
        found.update(entry.block_id for entry in entries)
    return found


async def test_the_same_content_shares_no_block_and_is_restored_by_its_owner_alone(
    world: World, tmp_path: Path
) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(random.Random(4).randbytes(3 << 20))
    made = {}
    for name, owner in (("ann", world.ann), ("bob", world.bob)):
        async with AsyncStateManager(world.cluster.client.address, token=owner.token) as manager:
            await manager.register_vm("disk", {"root": VolumeSpec(disk)})
            snapshot = await manager.create_snapshot("disk")
            # Not one block is taken for known because the other tenant has it.
            point = await manager.point(snapshot)
            assert point.stats.deduplicated_bytes == 0
            target = await manager.restore_vm(snapshot, "", target=tmp_path / name)
            assert (target / "root.raw").read_bytes() == disk.read_bytes()
            made[name] = snapshot
    async with AsyncStateManager(world.cluster.client.address, token=world.bob.token) as manager:
        await refused(ErrorCode.NOT_FOUND, manager.restore_vm(made["ann"], "", target=tmp_path / "stolen"))
    # Tenant 0 is the cluster's own, 1 is `default`.
    ann, bob = ids_of(world, 2), ids_of(world, 3)
    assert len(ann) == len(bob) > 3 * 16
    assert ann.isdisjoint(bob)
    assert not ids_of(world, 1)
