"""Coordinators' healing parts over a metadata store, without gRPC, in time that is moved by hand; and their nodes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Final

from holdfast_coordinator import keyspace
from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.bootstrap import Cluster, ClusterOptions, open_cluster
from holdfast_coordinator.healing.duties import Duty
from holdfast_coordinator.healing.history import read_history
from holdfast_coordinator.healing.parts import HealingParts, HealingSettings, healing_parts
from holdfast_coordinator.keys.chain import KeyChain
from holdfast_coordinator.layouts import Computing
from holdfast_coordinator.view import ClusterState, ClusterView
from holdfast_core.runtime.clock import Clock, ManualClock
from holdfast_core.runtime.metadata.store import MetadataStore
from holdfast_proto.v1.cluster_pb2 import HeartbeatRequest, HeartbeatResponse, LayoutChange
from holdfast_proto.v1.common_pb2 import NodeHealing, NodeStatus
from tests.coordinator.ledgers import make_ledger
from tests.coordinator.rig import PARTITIONS, master_keys

OUT_AFTER_S: Final = 60.0
SETTINGS: Final = HealingSettings(out_after_s=OUT_AFTER_S)
# As the settings have it: a lease's time and three heartbeats.
BACK_AFTER_S: Final = 16.0
_BEAT_S: Final = 2.0


def entry(number: int = 1, *, action: str = "cluster.admin") -> Entry:
    """Return what a call would record."""
    return Entry(principal="admin", tenant="", action=action, request_id="req-1", entry_id=f"{number:016x}")


@dataclass
class Seat:
    """The healing parts of one coordinator."""

    store: MetadataStore
    cluster: Cluster
    view: ClusterView
    ledger: Ledger
    parts: HealingParts

    async def look(self) -> None:
        """Let it keep its lease and do what a steward does, once."""
        await self.view.fresh()
        await self.parts.lease.step()
        await self.parts.steward.step()


async def seat(
    store: MetadataStore,
    clock: Clock,
    *,
    nodes: int = 5,
    replicas: int = 3,
    seed: int = 1,
    settings: HealingSettings = SETTINGS,
    duties: Sequence[Duty] = (),
    computing: Computing = asyncio.to_thread,
) -> Seat:
    """Open the store's cluster, or make it, and return a coordinator's parts over it."""
    master = master_keys()
    options = ClusterOptions(nodes_expected=nodes, replicas=replicas, partitions=PARTITIONS)
    cluster = await open_cluster(
        store,
        master=master,
        options=options,
        random_bytes=random.Random(1).randbytes,
        now_unix_ms=clock.now_unix_ms(),
    )
    chain = KeyChain(store, master, cluster.record.cluster_id, clock)
    await chain.fresh()
    view, ledger = ClusterView(store), make_ledger(store, clock=clock, seed=seed)
    parts = healing_parts(
        store,
        cluster,
        chain,
        view,
        ledger=ledger,
        clock=clock,
        random_bytes=random.Random(seed + 100).randbytes,
        settings=settings,
        duties=duties,
        computing=computing,
    )
    return Seat(store, cluster, view, ledger, parts)


@dataclass
class Fleet:
    """Nodes that send heartbeats while they are up, to one coordinator, and sync at once unless told otherwise.

    `epochs` notes each epoch that was the newest one, in order.
    """

    seat: Seat
    clock: ManualClock
    syncs: bool = True
    epochs: list[int] = field(default_factory=list)
    known: dict[str, HeartbeatResponse] = field(default_factory=dict)

    async def beat(self, number: int, healing: NodeHealing | None = None, **changes: object) -> HeartbeatResponse:
        """Send the heartbeat of a node."""
        node_id = f"node-{number}"
        known = self.known.get(node_id, HeartbeatResponse())
        epoch = known.layout.epoch
        status = NodeStatus(
            node_id=node_id,
            address=f"127.0.0.1:{1024 + number}",
            zone=f"zone-{number}",
            capacity_bytes=1 << 40,
            layout_epoch=epoch,
            healing=healing or NodeHealing(synced_epoch=epoch if self.syncs else 0),
        )
        status.MergeFrom(NodeStatus(**changes))  # type: ignore[arg-type]
        request = HeartbeatRequest(status=status, lease_id=known.lease_id, incarnation=bytes([number]) * 16)
        answer = await self.seat.parts.heartbeats.take(request, entry(number, action="cluster.join"))
        self.known[node_id] = answer
        return answer

    async def run(self, seconds: float, up: Collection[int], *, also: Sequence[Seat] = ()) -> ClusterState:
        """Let time go by while these nodes are up, and coordinators look every second; return what is at the end."""
        for second in range(round(seconds)):
            if second % round(_BEAT_S) == 0:
                for number in up:
                    await self.beat(number)
            for each in (self.seat, *also):
                await each.look()
                newest = each.view.state.layout_set.newest
                if newest is not None and self.epochs[-1:] != [newest.epoch]:
                    self.epochs.append(newest.epoch)
            self.clock.advance(1.0)
        return await self.seat.view.fresh()

    def members(self) -> list[int]:
        """Return the numbers of the newest layout's nodes, as seen last."""
        newest = self.seat.view.state.layout_set.newest
        return [] if newest is None else [int(node.node_id.removeprefix("node-")) for node in newest.nodes]

    async def history(self) -> list[LayoutChange]:
        """Return how layouts followed one another, oldest first."""
        return (await read_history(self.seat.store))[::-1]


async def granted(store: MetadataStore) -> bool:
    """Return whether there is a grant."""
    return await store.get(keyspace.LAYOUT_GRANT) is not None
