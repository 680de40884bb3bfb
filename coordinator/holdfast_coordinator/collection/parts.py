"""The parts of collection, put together for one coordinator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.bootstrap import RandomBytes
from holdfast_coordinator.collection.collector import Bounds, MarkedTenant
from holdfast_coordinator.collection.running import Collections
from holdfast_coordinator.collection.scanner import GrpcScanner
from holdfast_coordinator.grants import Grants
from holdfast_coordinator.healing.duties import Duty
from holdfast_coordinator.tenants import Tenants
from holdfast_coordinator.view import ClusterView
from holdfast_core.model.block import SealedBlock
from holdfast_core.model.limits import COLLECTION_INTERVAL_S
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.blocks.reader import BlockReader
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.metadata.store import MetadataStore

CLUSTERS_OWN = "the cluster's own"


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectionSettings:
    """How a coordinator collects.

    Attributes:
        every_s: time between collections that begin by themselves; 0 for none.
        scratch: directory for what does not fit into memory; None for where temporary files go.
    """

    every_s: float = COLLECTION_INTERVAL_S
    scratch: Path | None = None


def collections_of(
    store: MetadataStore,
    ledger: Ledger,
    view: ClusterView,
    pool: NodePool,
    tenants: Tenants,
    *,
    clock: Clock,
    random_bytes: RandomBytes,
    settings: CollectionSettings,
) -> Collections:
    """Put the parts together."""

    def refresh() -> None:
        pool.update(view.state.nodes)

    async def grants(tenant: int) -> Grants:
        return (await tenants.numbered(tenant)).grants

    async def opened(number: int, entry_of: Callable[[str], Entry]) -> MarkedTenant:
        tenant = await tenants.numbered(number)
        reader = BlockReader(pool, lambda: view.state.layout_set.layouts, tenant.grants.index_reader)

        async def fetch(node_ids: Sequence[bytes]) -> Mapping[bytes, SealedBlock]:
            refresh()
            return await reader.fetch(node_ids, what="the index")

        async def confirm(block_ids: Sequence[bytes]) -> int:
            entry = entry_of("collection.damage")
            entry.tenant = tenant.record.name
            return await tenant.damage.confirm(block_ids, entry)

        return MarkedTenant(tenant.record.name or CLUSTERS_OWN, tenant.space, fetch, tenant.ring.opener(), confirm)

    return Collections(
        store,
        ledger,
        view,
        GrpcScanner(pool, grants, refresh),
        opened,
        clock=clock,
        random_bytes=random_bytes,
        bounds=Bounds(scratch=settings.scratch),
    )


def collection_duties(collections: Collections, settings: CollectionSettings) -> tuple[Duty, ...]:
    """Return what the steward has to see to."""
    if not settings.every_s:
        return ()
    return (Duty("collection", settings.every_s, collections.begin_due),)
