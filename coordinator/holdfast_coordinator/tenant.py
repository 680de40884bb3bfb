"""The parts that serve one tenant, put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.barrier import Barrier
from holdfast_coordinator.cautious_clock import CautiousClock
from holdfast_coordinator.commit import Commits
from holdfast_coordinator.damage import Damage
from holdfast_coordinator.damage_scope import DamageScope
from holdfast_coordinator.discard import Discards
from holdfast_coordinator.durability import Durability
from holdfast_coordinator.grants import Grants
from holdfast_coordinator.keys.chain import KeyChain
from holdfast_coordinator.keyspace import TenantKeyspace
from holdfast_coordinator.locks import Locking, Locks
from holdfast_coordinator.metrics import CoordinatorMetrics
from holdfast_coordinator.objects import Objects
from holdfast_coordinator.points import Points
from holdfast_coordinator.retention import Retention
from holdfast_coordinator.sessions import Sessions
from holdfast_coordinator.stats import Stats
from holdfast_coordinator.view import ClusterView, LayoutSet
from holdfast_coordinator.vms import Vms
from holdfast_core.model.keys import KeyRing, TenantSecrets
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.metadata.store import MetadataStore
from holdfast_proto.v1.tenants_pb2 import TenantRecord


@dataclass(frozen=True, slots=True)
class Tenant:
    """Everything that works on one tenant's keys."""

    record: TenantRecord
    space: TenantKeyspace
    ring: KeyRing
    ledger: Ledger
    grants: Grants
    vms: Vms
    points: Points
    objects: Objects
    sessions: Sessions
    damage: Damage
    commits: Commits
    discards: Discards
    stats: Stats
    locks: Locks
    locking: Locking
    retention: Retention


def open_tenant(
    store: MetadataStore,
    record: TenantRecord,
    secrets: TenantSecrets,
    chain: KeyChain,
    ledger: Ledger,
    view: ClusterView,
    pool: NodePool,
    *,
    clock: Clock,
    lock_clock: CautiousClock,
    metrics: CoordinatorMetrics,
    session_ttl_s: float,
) -> Tenant:
    """Put the parts of one tenant together; locks of its points end by `lock_clock`."""
    space = TenantKeyspace(record.tenant)
    ring = KeyRing(secrets)
    grants = Grants(chain, secrets, clock)
    vms = Vms(store, space, ledger, clock, quota=record.quota)
    locks = Locks(store, space, lock_clock)
    points = Points(store, space, ledger, locks=locks, quota=record.quota)
    objects = Objects(store, space, ledger, quota=record.quota)
    sessions = Sessions(
        store,
        space,
        ledger,
        vms=vms,
        points=points,
        key_epoch=ring.data_epoch_newest if ring.has_data else 0,
        clock=clock,
        ttl_s=session_ttl_s,
        quota=record.quota,
    )
    damage = Damage(
        store,
        space,
        ledger,
        view,
        pool,
        grants.presence_asker,
        DamageScope(pool, grants.index_reader, ring.opener()),
    )

    barrier = _barriers(view, pool, grants, ring)
    durability = Durability(damage=damage, view=view, barrier=barrier, metrics=metrics)
    commits = Commits(
        store,
        space,
        ledger,
        sessions=sessions,
        points=points,
        objects=objects,
        durability=durability,
        ring=ring,
        clock=clock,
        metrics=metrics,
        quota=record.quota,
    )
    discards = Discards(
        store,
        space,
        ledger,
        vms=vms,
        objects=objects,
        sessions=sessions,
        locks=locks,
        durability=durability,
        clock=clock,
        metrics=metrics,
        quota=record.quota,
    )
    stats = Stats(store, space, vms=vms, points=points, view=view, pool=pool, grants=grants, opener=ring.opener())
    return Tenant(
        record=record,
        space=space,
        ring=ring,
        ledger=ledger,
        grants=grants,
        vms=vms,
        points=points,
        objects=objects,
        sessions=sessions,
        damage=damage,
        commits=commits,
        discards=discards,
        stats=stats,
        locks=locks,
        locking=Locking(store, space, ledger, vms=vms, clock=clock),
        retention=Retention(store, space, ledger, vms=vms, points=points, locks=locks, clock=lock_clock),
    )


def _barriers(view: ClusterView, pool: NodePool, grants: Grants, ring: KeyRing) -> Callable[[LayoutSet, int], Barrier]:
    def barrier(layout_set: LayoutSet, collection_epoch: int) -> Barrier:
        pool.update(view.state.nodes)
        return Barrier(pool, layout_set.layouts, grants, ring.opener(), collection_epoch=collection_epoch)

    return barrier
