"""TenantService: making tenants, their quotas, and what they have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

import grpc.aio

from holdfast_coordinator import keyspace
from holdfast_coordinator.access.call import current_call
from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.bootstrap import DEFAULT_TENANT
from holdfast_coordinator.keys.chain import tenant_purpose
from holdfast_coordinator.keys.master import MasterKeys
from holdfast_coordinator.records import Stored, load, parse_number, still
from holdfast_coordinator.tenants import Tenants
from holdfast_coordinator.transactions import ATTEMPTS_MAX, Outcome, contention
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.keys import generate_secrets
from holdfast_core.model.limits import TENANTS_MAX
from holdfast_core.model.names import check_name
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.metadata.store import Absent, MetadataStore, Put
from holdfast_proto.v1 import tenants_pb2 as pb
from holdfast_proto.v1.tenants_pb2_grpc import TenantServiceServicer

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

# Reads of the store under way at a time while thousands of tenants are listed.
_USAGES_AT_ONCE: Final = 64


class TenantService(TenantServiceServicer):
    """Makes tenants and bounds what they may have."""

    def __init__(
        self,
        store: MetadataStore,
        ledger: Ledger,
        tenants: Tenants,
        master: MasterKeys,
        *,
        clock: Clock,
        random_bytes: Callable[[int], bytes],
    ) -> None:
        """Bind to where tenants are kept; new tenants' secrets are wrapped by `master`."""
        self._store = store
        self._ledger = ledger
        self._tenants = tenants
        self._master = master
        self._clock = clock
        self._random_bytes = random_bytes

    async def CreateTenant(self, request: pb.CreateTenantRequest, context: Context) -> pb.CreateTenantResponse:
        """Make a tenant with secrets of its own; idempotent if identical."""
        check_name(request.name, "tenant name")
        entry = _entry(request.name)
        for _ in range(ATTEMPTS_MAX):
            record = await self._named(request.name)
            if record is not None:
                if (record.quota, record.own_data_key) != (request.quota, request.own_data_key):
                    raise HoldfastError(
                        ErrorCode.ALREADY_EXISTS,
                        f"there is a tenant {request.name} with another quota or another way with its data key",
                    )
                entry.repeated()
                return pb.CreateTenantResponse(tenant=record)
            record = await self._make(request, entry)
            if record is not None:
                await self._tenants.fresh()
                return pb.CreateTenantResponse(tenant=record)
        raise contention("the making of the tenant")

    async def ListTenants(self, request: pb.ListTenantsRequest, context: Context) -> pb.ListTenantsResponse:
        """List tenants by name, with what they have."""
        current_call().require("tenant/*")
        await self._tenants.fresh()
        records = [record for _, record in sorted(self._tenants.names().items())]
        response = pb.ListTenantsResponse()
        for at in range(0, len(records), _USAGES_AT_ONCE):
            portion = records[at : at + _USAGES_AT_ONCE]
            async with plain_task_group() as group:
                usages = [group.create_task(self._ledger.usage(record.tenant)) for record in portion]
            for record, usage in zip(portion, usages, strict=True):
                response.tenants.append(pb.ListTenantsResponse.Entry(tenant=record, usage=usage.result()))
        return response

    async def SetQuota(self, request: pb.SetQuotaRequest, context: Context) -> pb.SetQuotaResponse:
        """Change a tenant's quota; what it has already stays."""
        check_name(request.name, "tenant name")
        entry = _entry(request.name)
        for _ in range(ATTEMPTS_MAX):
            stored = await self._stored(request.name)
            if stored is None:
                raise HoldfastError(ErrorCode.NOT_FOUND, f"there is no tenant {request.name}")
            record = stored.message
            if record.quota == request.quota:
                entry.repeated()
                return pb.SetQuotaResponse(tenant=record)
            record.quota.CopyFrom(request.quota)
            put = Put(stored.key, record.SerializeToString())
            if await self._ledger.apply(entry, [stored.unchanged], [put]) is Outcome.APPLIED:
                await self._tenants.fresh()
                return pb.SetQuotaResponse(tenant=record)
        raise contention("the quota")

    async def _make(self, request: pb.CreateTenantRequest, entry: Entry) -> pb.TenantRecord | None:
        """Write a new tenant; None if somebody wrote one in between."""
        numbers = await self._store.get(keyspace.TENANT_NUMBERS)
        number = max(parse_number(numbers), DEFAULT_TENANT) + 1
        if number > TENANTS_MAX:
            raise HoldfastError(ErrorCode.LIMIT_EXCEEDED, f"a cluster takes at most {TENANTS_MAX} tenants")
        secrets = generate_secrets(number, self._random_bytes)
        if request.own_data_key:
            secrets = secrets.without_data()
        wrapped = await self._master.wrap(secrets.to_message().SerializeToString(), tenant_purpose(number))
        record = pb.TenantRecord(
            tenant=number,
            name=request.name,
            quota=request.quota,
            own_data_key=request.own_data_key,
            created_unix_ms=self._clock.now_unix_ms(),
        )
        name_key, keys_key = keyspace.tenant_name(request.name), keyspace.TenantKeyspace(number).keys
        operations = [
            Put(keyspace.TENANT_NUMBERS, str(number).encode()),
            Put(name_key, str(number).encode()),
            Put(keyspace.tenant_record(number), record.SerializeToString()),
            Put(keys_key, wrapped.SerializeToString()),
        ]
        conditions = [still(keyspace.TENANT_NUMBERS, numbers), Absent(name_key), Absent(keys_key)]
        entry.details["number"] = str(number)
        outcome = await self._ledger.apply(entry, conditions, operations)
        return record if outcome is Outcome.APPLIED else None

    async def _named(self, name: str) -> pb.TenantRecord | None:
        stored = await self._stored(name)
        return None if stored is None else stored.message

    async def _stored(self, name: str) -> Stored[pb.TenantRecord] | None:
        number = await self._store.get(keyspace.tenant_name(name))
        if number is None:
            return None
        return await load(self._store, keyspace.tenant_record(parse_number(number)), pb.TenantRecord)


def _entry(name: str) -> Entry:
    call = current_call()
    call.require(f"tenant/{name}")
    return call.entry
