"""The tenants of the cluster: their records, kept fresh by a watch, and for each the parts that serve it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from types import MappingProxyType

from holdfast_coordinator import keyspace
from holdfast_coordinator.keys.chain import KeyChain
from holdfast_coordinator.records import parse
from holdfast_coordinator.tenant import Tenant
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.keys import TenantSecrets
from holdfast_core.runtime.metadata.store import KeyValue, MetadataStore
from holdfast_proto.v1.tenants_pb2 import TenantRecord

OpenTenant = Callable[[TenantRecord, TenantSecrets], Tenant]


@dataclass(slots=True)
class _Copy:
    """Records by number, as the store held them at `revision`."""

    revision: int = 0
    records: dict[int, TenantRecord] = field(default_factory=dict)


class Tenants:
    """All tenants. Belongs to one event loop."""

    def __init__(self, store: MetadataStore, chain: KeyChain, open_tenant: OpenTenant) -> None:
        """Bind to the store; `open_tenant` puts the parts of one tenant together."""
        self._store = store
        self._chain = chain
        self._open_tenant = open_tenant
        self._copy = _Copy()
        self._by_name: Mapping[str, TenantRecord] = MappingProxyType({})
        self._open: dict[int, Tenant] = {}

    async def named(self, name: str) -> Tenant:
        """Return the parts of a tenant.

        Raises:
            HoldfastError: NOT_FOUND; what unwrapping its keys raises.
        """
        if not name:
            raise _unknown(name)
        if name not in self._by_name:
            # Made a moment ago by another coordinator, perhaps.
            await self.fresh()
        record = self._by_name.get(name)
        if record is None:
            raise _unknown(name)
        return await self.numbered(record.tenant)

    async def numbered(self, tenant: int) -> Tenant:
        """Return the parts of a tenant; 0 is the cluster's own.

        Raises:
            HoldfastError: NOT_FOUND; what unwrapping its keys raises.
        """
        record = self._copy.records.get(tenant)
        if record is None:
            await self.fresh()
            record = self._copy.records.get(tenant)
            if record is None:
                raise _unknown(str(tenant))
        found = self._open.get(tenant)
        if found is None or found.record != record:
            found = self._open_tenant(record, await self._chain.secrets(tenant))
            self._open[tenant] = found
        return found

    def names(self) -> Mapping[str, TenantRecord]:
        """Return the records by name, without the cluster's own."""
        return self._by_name

    async def fresh(self) -> None:
        """Read all records at one revision."""
        snapshot = await self._store.snapshot([keyspace.TENANTS_PREFIX])
        self._take(snapshot.revision, {item.key: item for item in snapshot.items}, relisted=True)

    async def run(self) -> None:
        """Follow changes until cancelled or until the store is closed."""
        async with aclosing(self._store.watch(keyspace.TENANTS_PREFIX)) as batches:
            async for batch in batches:
                self._take(batch.revision, {item.key: item for item in batch.puts}, relisted=batch.relisted)

    def _take(self, revision: int, items: Mapping[str, KeyValue], *, relisted: bool) -> None:
        if revision < self._copy.revision:
            return
        taken = {record.tenant: record for record in (parse(item, TenantRecord).message for item in items.values())}
        records = taken if relisted else self._copy.records | taken
        self._copy = _Copy(revision, records)
        self._by_name = MappingProxyType({record.name: record for record in records.values() if record.name})


def _unknown(name: str) -> HoldfastError:
    return HoldfastError(ErrorCode.NOT_FOUND, f"there is no tenant {name}")
