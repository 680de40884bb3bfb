"""Making, listing and bounding tenants: once each, whatever fails, with keys of their own, by administrators alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from holdfast_coordinator import keyspace
from holdfast_coordinator.keys.chain import KeyChain
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.keys import TenantSecrets
from holdfast_core.model.limits import TENANTS_MAX
from holdfast_core.runtime.clock import SystemClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import MetadataStore, Put
from holdfast_proto.v1 import state_pb2
from holdfast_proto.v1.tenants_pb2 import (
    CreateTenantRequest,
    ListTenantsRequest,
    ListTenantsResponse,
    Quota,
    SetQuotaRequest,
    TenantRecord,
    Usage,
)
from tests.coordinator.faults import Fault, FaultyStore
from tests.coordinator.rig import (
    Client,
    coordinator,
    empty_object_commit,
    eventually,
    master_keys,
    records,
    refused,
)

CALLS_MAX = 40


@pytest.fixture
async def store() -> AsyncIterator[SqliteStore]:
    """An empty store."""
    store = await SqliteStore.open(":memory:", SystemClock())
    try:
        yield store
    finally:
        await store.close()


async def create(client: Client, name: str, *, own_data_key: bool = False, **bounds: int) -> TenantRecord:
    """Make a tenant."""
    request = CreateTenantRequest(name=name, quota=Quota(**bounds), own_data_key=own_data_key)
    made: TenantRecord = (await client.tenants("CreateTenant", request)).tenant
    return made


async def listed(client: Client) -> dict[str, ListTenantsResponse.Entry]:
    """All tenants by name."""
    answer = await client.tenants("ListTenants", ListTenantsRequest())
    names = [entry.tenant.name for entry in answer.tenants]
    assert names == sorted(set(names))
    return {entry.tenant.name: entry for entry in answer.tenants}


async def secrets_of(store: MetadataStore, tenant: int) -> TenantSecrets:
    """A tenant's secrets as the store holds them."""
    return await KeyChain(store, master_keys(), "", SystemClock()).secrets(tenant)


async def test_a_tenant_is_made_once_with_keys_of_its_own(store: SqliteStore) -> None:
    async with coordinator(store) as client:
        made = await create(client, "acme", bytes=1000, vms=2)
        assert (made.tenant, made.name, made.own_data_key) == (2, "acme", False)
        assert await create(client, "acme", bytes=1000, vms=2) == made
        await refused(ErrorCode.ALREADY_EXISTS, create(client, "acme", bytes=1001, vms=2))
        await refused(ErrorCode.ALREADY_EXISTS, create(client, "acme", bytes=1000, vms=2, own_data_key=True))
        await refused(ErrorCode.ALREADY_EXISTS, create(client, "default", vms=1))
        sealed = await create(client, "sealed", own_data_key=True)
        assert (sealed.tenant, sealed.own_data_key) == (3, True)
        assert set(await listed(client)) == {"acme", "default", "sealed"}
        for name in ("", "a/b", "*", " "):
            await refused(ErrorCode.INVALID_ARGUMENT, create(client, name))
        outcomes = [(r.resource, r.outcome) for r in await records(store) if r.resource == "tenant/acme"]
        exists = ("tenant/acme", "ALREADY_EXISTS")
        assert outcomes == [("tenant/acme", "OK"), ("tenant/acme", "REPEATED"), exists, exists]
    secrets = [await secrets_of(store, number) for number in range(4)]
    roots = {each.structure_epochs[1] for each in secrets} | {
        each.data_epochs[1] for each in secrets if each.data_epochs
    }
    assert len(roots) == 7
    assert not secrets[3].data_epochs


async def test_two_coordinators_give_each_name_one_number(store: SqliteStore) -> None:
    async with coordinator(store) as one, coordinator(store, seed=2) as two:
        names = [f"t{number}" for number in range(6)]
        made = await asyncio.gather(*(create(client, name) for name in names for client in (one, two)))
        assert made[::2] == made[1::2]
        assert sorted(record.tenant for record in made[::2]) == list(range(2, 8))
        # A tenant is there on both at once: what one does not know yet it reads.
        for name in names:
            for client in (one, two):
                inside = Client(client.address, tenant=name)
                assert not (await inside.state("ListVms", state_pb2.ListVmsRequest())).vms
                await inside.close()


async def test_tenants_see_their_own_and_are_counted_apart(store: SqliteStore) -> None:
    async with coordinator(store) as client:
        await client.form_layout()
        for name in ("blue", "green"):
            await create(client, name, vms=1, objects=1)
            inside = Client(client.address, tenant=name)
            await inside.register_vm("vm-1")
            begin = state_pb2.BeginObjectRequest(task_id="task-1", nonce=bytes(16))
            begun = await inside.state("BeginObject", begin)
            await inside.state("CommitObject", empty_object_commit(begun, "task-1"))
            await refused(ErrorCode.QUOTA_EXCEEDED, inside.register_vm("vm-2"))
            await inside.close()
        usage = {name: entry.usage for name, entry in (await listed(client)).items()}
        assert usage == {"blue": Usage(vms=1, objects=1), "green": Usage(vms=1, objects=1), "default": Usage()}
        unknown = Client(client.address, tenant="red")
        await refused(ErrorCode.NOT_FOUND, unknown.state("ListVms", state_pb2.ListVmsRequest()))
        await unknown.close()


async def test_a_quota_is_changed_whole_and_reaches_every_coordinator(store: SqliteStore) -> None:
    async with coordinator(store) as one, coordinator(store, seed=2) as two:
        await create(one, "acme", vms=1)
        inside = Client(two.address, tenant="acme")
        await inside.register_vm("vm-1")
        await refused(ErrorCode.QUOTA_EXCEEDED, inside.register_vm("vm-2"))
        change = SetQuotaRequest(name="acme", quota=Quota(vms=2, bytes=5))
        for _ in range(2):
            assert (await one.tenants("SetQuota", change)).tenant.quota == change.quota

        async def may_register() -> bool:
            try:
                await inside.register_vm("vm-2")
            except HoldfastError as error:
                if error.code is not ErrorCode.QUOTA_EXCEEDED:
                    raise
                return False
            return True

        await eventually(may_register, "the other coordinator knows the new quota", within_s=5.0)
        await refused(ErrorCode.QUOTA_EXCEEDED, inside.register_vm("vm-3"))
        await refused(ErrorCode.NOT_FOUND, one.tenants("SetQuota", SetQuotaRequest(name="nobody")))
        await inside.close()


@pytest.mark.parametrize("fault", list(Fault))
async def test_a_making_that_is_interrupted_anywhere_makes_one_tenant(store: SqliteStore, fault: Fault) -> None:
    faults = FaultyStore(store)
    async with coordinator(faults) as failing, coordinator(store, seed=2) as healthy:
        for at in range(CALLS_MAX):
            faults.arm(fault, at=at)
            try:
                made = await create(failing, f"t{at}", objects=at)
            except HoldfastError as error:
                # A dead process answers nothing; here its last breath arrives as INTERNAL.
                if error.code not in (ErrorCode.INTERNAL, ErrorCode.UNREACHABLE):
                    raise
                made = await create(healthy, f"t{at}", objects=at)
            struck = faults.struck
            faults.arm(None)
            assert made.tenant == at + 2
            if not struck:
                break
        else:
            raise AssertionError("the fault always strikes")
        entries = await listed(healthy)
        assert sorted(entry.tenant.tenant for entry in entries.values()) == list(range(1, len(entries) + 1))
        for name, entry in entries.items():
            assert (await secrets_of(store, entry.tenant.tenant)).tenant == entry.tenant.tenant
            made_it = [r for r in await records(store) if r.resource == f"tenant/{name}" and r.outcome == "OK"]
            assert len(made_it) == (name != "default")


async def test_many_tenants_are_listed_each_with_its_own_usage(store: SqliteStore) -> None:
    async with coordinator(store) as client:
        for number in range(100):
            made = await create(client, f"t{number:03d}")
            usage = Usage(vms=made.tenant)
            await store.txn([], [Put(keyspace.TenantKeyspace(made.tenant).usage, usage.SerializeToString())])
        entries = await listed(client)
        assert len(entries) == 101
        assert all(entry.usage.vms == entry.tenant.tenant for name, entry in entries.items() if name != "default")


async def test_the_number_of_tenants_is_bounded(store: SqliteStore) -> None:
    async with coordinator(store) as client:
        await store.txn([], [Put(keyspace.TENANT_NUMBERS, str(TENANTS_MAX - 1).encode())])
        assert (await create(client, "last")).tenant == TENANTS_MAX
        await refused(ErrorCode.LIMIT_EXCEEDED, create(client, "one-more"))


async def test_who_has_all_rights_in_one_tenant_makes_and_lists_none(store: SqliteStore) -> None:
    async with coordinator(store) as client:
        await create(client, "acme")
        await client.bind(("ann", "admin", "*"), tenant="acme")
        ann = Client(client.address, token=await client.new_token("ann"), tenant="acme")
        assert not (await ann.state("ListVms", state_pb2.ListVmsRequest())).vms
        await refused(ErrorCode.DENIED, create(ann, "mine"))
        await refused(ErrorCode.DENIED, ann.tenants("ListTenants", ListTenantsRequest()))
        await refused(ErrorCode.DENIED, ann.tenants("SetQuota", SetQuotaRequest(name="acme")))
        await ann.close()
        denied = [record for record in await records(store) if record.principal == "ann" and record.outcome == "DENIED"]
        assert [record.action for record in denied] == ["tenant.admin"] * 3
