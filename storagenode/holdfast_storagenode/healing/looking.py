"""One look at some partitions: what their sources hold and this node lacks is pulled, source after source.

What is here is looked at anew after each source, so that the next is asked for a listing only where it still may hold
more. A look that pulls some kinds alone remembers what else was listed, for the look that pulls the rest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_storagenode.core import NodeCore
from holdfast_storagenode.healing.plan import Stage, SyncBatch, differing, with_blocks
from holdfast_storagenode.healing.pulling import Pulled, Puller
from holdfast_storagenode.store import BlockEntry, BlockStore, Holding

# About 25 MB. What finds no room is listed once more.
DEFERRED_REMEMBERED_MAX: Final = 100_000


@dataclass(slots=True)
class Look:
    """What came of a look so far.

    Attributes:
        told: by partition and node what peers said that they hold.
        own: by partition what is here.
        whole: by partition the nodes all of whose blocks are here.
        deferred: by partition and tenant the ids that were listed and left.
        lost: by tenant the ids that a node listed and did not give.
    """

    told: Mapping[int, Mapping[str, Sequence[Holding]]]
    own: dict[int, tuple[Holding, ...]]
    whole: defaultdict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    deferred: defaultdict[int, dict[int, set[bytes]]] = field(default_factory=lambda: defaultdict(dict))
    lost: defaultdict[int, set[bytes]] = field(default_factory=lambda: defaultdict(set))

    def lacking(self, partition: int, node_id: str) -> tuple[int, ...]:
        """Return the tenants of which a node may hold blocks of a partition that are not here."""
        return differing(self.own[partition], self.told[partition][node_id])

    def unknown(self, partition: int, node_id: str) -> tuple[int, ...]:
        """Return those of them of which it may hold blocks that no other listed before either."""
        known = with_blocks(self.own[partition], self.deferred.get(partition, {}))
        return differing(known, self.told[partition][node_id])


class Deferred:
    """Blocks that a node listed and that were left for a later look, by partition; bounded."""

    def __init__(self, remembered_max: int = DEFERRED_REMEMBERED_MAX) -> None:
        """Begin with none; remember so many at most."""
        self._remembered_max = remembered_max
        self._count = 0
        self._left: dict[int, list[tuple[str, int, Sequence[BlockEntry]]]] = {}

    def add(self, partition: int, node_id: str, tenant: int, entries: Sequence[BlockEntry]) -> None:
        """Remember what a node listed of a tenant, if there is room."""
        if self._count + len(entries) <= self._remembered_max:
            self._count += len(entries)
            self._left.setdefault(partition, []).append((node_id, tenant, entries))

    def take(self, partitions: Sequence[int]) -> dict[tuple[str, int], list[BlockEntry]]:
        """Return, by node and tenant, what is remembered of partitions, and forget it."""
        taken: dict[tuple[str, int], list[BlockEntry]] = {}
        for partition in partitions:
            for node_id, tenant, entries in self._left.pop(partition, ()):
                self._count -= len(entries)
                taken.setdefault((node_id, tenant), []).extend(entries)
        return taken


class Looker:
    """Looks for one node; belongs to one event loop."""

    def __init__(self, core: NodeCore, puller: Puller) -> None:
        """Pull by `puller` into `core`."""
        self._core = core
        self._puller = puller
        self._deferred = Deferred()

    async def look(self, batch: SyncBatch, look: Look, *, urgent: bool) -> None:
        """Pull what any source of the partitions of a batch holds and this node lacks; what is `urgent`, at once.

        Raises:
            HoldfastError: what this node's own store raises.
        """
        left = self._deferred.take(batch.partitions)
        if batch.stage is Stage.ALL and left:
            await self._pull_left(batch, look, left, urgent=urgent)
        # Each partition begins with another source, so that none bears all.
        waiting = {place: _turned(tuple(look.told[place]), place) for place in batch.partitions}
        while turn := {place: nodes.pop(0) for place, nodes in waiting.items() if nodes}:
            await self._pull_turn(batch, look, turn, urgent=urgent)
        for tenant, ids in look.lost.items():
            await self._puller.note_lost(tenant, sorted(ids))

    async def _pull_left(
        self, batch: SyncBatch, look: Look, left: Mapping[tuple[str, int], list[BlockEntry]], *, urgent: bool
    ) -> None:
        """Pull what the look before this one at the same partitions listed, and left."""
        async with plain_task_group() as group:
            for (node_id, tenant), entries in left.items():
                if node_id in batch.sources:
                    pulling = self._puller.pull_listed(node_id, tenant=tenant, entries=entries, urgent=urgent)
                    group.create_task(_into(look, tenant, pulling))
        await self._look_here(look, batch.partitions)

    async def _pull_turn(self, batch: SyncBatch, look: Look, turn: Mapping[int, str], *, urgent: bool) -> None:
        """Pull from one source of each partition."""
        pulls: dict[tuple[str, int], list[int]] = {}
        for place, node_id in turn.items():
            for tenant in look.unknown(place, node_id):
                pulls.setdefault((node_id, tenant), []).append(place)
        broken: set[int] = set()

        async def pull(node_id: str, tenant: int, places: Sequence[int]) -> None:
            pulling = self._puller.pull(
                node_id, partitions=places, tenant=tenant, kinds=batch.stage.kinds, urgent=urgent
            )
            pulled = await _into(look, tenant, pulling)
            of = self._core.cluster.partition_of
            broken.update(places if pulled.cut_short else map(of, pulled.lost))
            for place, entries in _by_partition(pulled.deferred, of).items():
                look.deferred[place].setdefault(tenant, set()).update(entry.block_id for entry in entries)
                self._deferred.add(place, node_id, tenant, entries)

        async with plain_task_group() as group:
            for (node_id, tenant), places in pulls.items():
                group.create_task(pull(node_id, tenant, places))
        pulled_places = sorted({place for places in pulls.values() for place in places})
        for place, node_id in turn.items():
            # Of what was pulled all that was listed is here, though it may have more by now; of the others all is.
            pulled = place in pulled_places
            if (pulled and place not in broken and place not in look.deferred) or not look.lacking(place, node_id):
                look.whole[place].add(node_id)
        await self._look_here(look, pulled_places)

    async def _look_here(self, look: Look, partitions: Sequence[int]) -> None:
        if partitions:
            look.own.update(await self._core.executor.run(own_holdings, self._core.store, partitions))


def own_holdings(store: BlockStore, partitions: Sequence[int]) -> dict[int, tuple[Holding, ...]]:
    """Return what a store holds of partitions. Runs in the executor."""
    return {partition: tuple(store.holdings(partition)) for partition in partitions}


async def _into(look: Look, tenant: int, pulling: Awaitable[Pulled]) -> Pulled:
    pulled = await pulling
    if pulled.lost:
        look.lost[tenant].update(pulled.lost)
    return pulled


def _by_partition(entries: Sequence[BlockEntry], of: Callable[[bytes], int]) -> dict[int, list[BlockEntry]]:
    sorted_out: dict[int, list[BlockEntry]] = {}
    for entry in entries:
        sorted_out.setdefault(of(entry.block_id), []).append(entry)
    return sorted_out


def _turned(nodes: Sequence[str], by: int) -> list[str]:
    """Return `nodes` in an order that differs from partition to partition."""
    at = by % len(nodes) if nodes else 0
    return [*nodes[at:], *nodes[:at]]
