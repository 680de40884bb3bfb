"""Membership, layouts and the steward of one coordinator, put together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.bootstrap import Cluster
from holdfast_coordinator.healing.duties import Duty, DutyWorker
from holdfast_coordinator.healing.heartbeats import Heartbeats
from holdfast_coordinator.healing.lease import StewardLease
from holdfast_coordinator.healing.nodes import Nodes
from holdfast_coordinator.healing.steward import Steward
from holdfast_coordinator.healing.stewardship import StewardRules
from holdfast_coordinator.keys.chain import KeyChain
from holdfast_coordinator.layouts import Computing, Layouts
from holdfast_coordinator.membership import Membership
from holdfast_coordinator.view import ClusterView
from holdfast_core.model.limits import HEARTBEAT_INTERVAL_S, NODE_LEASE_TTL_S, NODE_OUT_AFTER_S, STEWARD_TTL_S
from holdfast_core.runtime.background import Worker
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.metadata.store import MetadataStore

# A node that was left out is taken back once it has sent this many heartbeats. What it sends at first keeps its lease
# for the lease's whole time, which therefore comes on top.
_BEATS_TO_COME_BACK = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class HealingSettings:
    """How a coordinator looks after nodes.

    Attributes:
        node_lease_ttl_s: time without a heartbeat after which a node is down.
        heartbeat_interval_s: time between heartbeats that nodes are asked for.
        out_after_s: time that a node is down before layouts are made without it.
        steward_ttl_s: time without a sign of life after which another coordinator may become steward.
    """

    node_lease_ttl_s: float = NODE_LEASE_TTL_S
    heartbeat_interval_s: float = HEARTBEAT_INTERVAL_S
    out_after_s: float = NODE_OUT_AFTER_S
    steward_ttl_s: float = STEWARD_TTL_S

    def rules(self, replicas: int) -> StewardRules:
        """Return when the steward of a cluster with so many replicas acts."""
        return StewardRules(
            replicas=replicas,
            out_after_s=self.out_after_s,
            back_after_s=self.node_lease_ttl_s + _BEATS_TO_COME_BACK * self.heartbeat_interval_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HealingParts:
    """What a coordinator's services call, and the workers that it runs beside them."""

    layouts: Layouts
    heartbeats: Heartbeats
    nodes: Nodes
    lease: StewardLease
    steward: Steward
    duties: tuple[DutyWorker, ...]

    @property
    def workers(self) -> tuple[Worker, ...]:
        """The workers, for `run_workers`."""
        return (self.lease, self.steward, *self.duties)


def healing_parts(
    store: MetadataStore,
    cluster: Cluster,
    chain: KeyChain,
    view: ClusterView,
    *,
    ledger: Ledger,
    clock: Clock,
    random_bytes: Callable[[int], bytes],
    settings: HealingSettings,
    duties: Sequence[Duty] = (),
    computing: Computing = asyncio.to_thread,
) -> HealingParts:
    """Put the parts together. `computing` runs the planning of layouts; `duties` are what the steward has to see to."""
    layouts = Layouts(view, cluster, ledger=ledger, clock=clock, computing=computing)
    lease = StewardLease(store, clock, coordinator=random_bytes(8).hex(), ttl_s=settings.steward_ttl_s)
    return HealingParts(
        layouts=layouts,
        heartbeats=Heartbeats(
            store,
            chain,
            view,
            Membership(store, clock, ledger=ledger, lease_ttl_s=settings.node_lease_ttl_s),
            layouts,
            clock=clock,
            interval_s=settings.heartbeat_interval_s,
        ),
        nodes=Nodes(store, view, layouts, ledger=ledger),
        lease=lease,
        steward=Steward(
            store,
            view,
            layouts,
            lease,
            ledger=ledger,
            rules=settings.rules(cluster.record.replicas),
            clock=clock,
            random_bytes=random_bytes,
        ),
        duties=tuple(DutyWorker(store, lease, duty, clock) for duty in duties),
    )
