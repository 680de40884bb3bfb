"""What a node looks at next, to hold all that it has to (docs/healing.md, "Sync" and "Repair"). Pure.

`SyncProgress` knows which partitions wait for a look and what came of the looks so far; `plan_sync` picks the next
batch: those with the fewest live owners first, and among those index nodes and application data before volume data.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from holdfast_core.runtime.capability import KINDS
from holdfast_storagenode.living import Living, enough
from holdfast_storagenode.store import BlockEntry, Holding

RETRY_S: Final = 2.0
"""Seconds until partitions that could not be synced are looked at again."""


_DIGEST_BYTES: Final = 32


class Stage(enum.IntEnum):
    """Which kinds of block a look pulls: what restores cannot begin without, then all."""

    URGENT = 0
    ALL = 1

    @property
    def kinds(self) -> frozenset[int]:
        """The kinds of block that are pulled."""
        return frozenset({1, 2}) if self is Stage.URGENT else KINDS


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncBatch:
    """Partitions to look at side by side.

    Attributes:
        stage: what to pull.
        live_owners: the fewest live owners that each of them has in a living layout.
        partitions: ascending.
        sources: by node that is to be asked, the partitions among them that it owns in a living layout.
    """

    stage: Stage
    live_owners: int
    partitions: tuple[int, ...]
    sources: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """What came of a look at one partition.

    Attributes:
        answered: its owners that answered at all, this node among them.
        covered: those of them that fence the newest epoch, all of whose blocks are here.
        deferred: whether volume data was left for a later look.
    """

    answered: frozenset[str]
    covered: frozenset[str]
    deferred: bool


def live_owners(living: Living, partition: int, live: Collection[str]) -> int:
    """Return the fewest live owners that a partition has in one of the living layouts."""
    return min(sum(owner in live for owner in layout.owners_of(partition)) for layout in living.layouts)


def plan_sync(
    living: Living,
    pending: Mapping[int, Stage],
    ranks: Mapping[int, int],
    *,
    node_id: str,
    up: Collection[str],
    partitions_max: int,
) -> SyncBatch | None:
    """Return the next partitions to look at, None where none waits.

    `ranks` says how many live owners each partition has (`live_owners`), `up` which other nodes are up.
    """
    if not pending:
        return None
    owners, stage = min((ranks[partition], stage) for partition, stage in pending.items())
    alike = [place for place, kind in pending.items() if kind == stage and ranks[place] == owners]
    chosen = tuple(sorted(alike)[:partitions_max])
    sources: dict[str, list[int]] = {}
    for partition in chosen:
        for owner in living.owners_of(partition):
            if owner != node_id and owner in up:
                sources.setdefault(owner, []).append(partition)
    return SyncBatch(
        stage=stage,
        live_owners=owners,
        partitions=chosen,
        sources={node: tuple(places) for node, places in sources.items()},
    )


def differing(own: Sequence[Holding], theirs: Sequence[Holding]) -> tuple[int, ...]:
    """Return the tenants of which a peer may hold a block that is not here."""
    here = {holding.tenant: holding for holding in own}
    return tuple(holding.tenant for holding in theirs if holding.count and here.get(holding.tenant) != holding)


def with_blocks(holdings: Sequence[Holding], ids: Mapping[int, Collection[bytes]]) -> tuple[Holding, ...]:
    """Return what would be held with these blocks too, by tenant, none of which is held."""
    if not ids:
        return tuple(holdings)
    known = {holding.tenant: holding for holding in holdings}
    for tenant, more in ids.items():
        before = known.get(tenant, Holding(tenant, 0, bytes(_DIGEST_BYTES)))
        total = int.from_bytes(before.digest, "big") + sum(int.from_bytes(block_id, "big") for block_id in more)
        digest = (total % (1 << 8 * _DIGEST_BYTES)).to_bytes(_DIGEST_BYTES, "big")
        known[tenant] = Holding(tenant, before.count + len(more), digest)
    return tuple(known.values())


def cut_batches(
    entries: Sequence[BlockEntry], *, bytes_max: int, blocks_max: int
) -> tuple[tuple[BlockEntry, ...], ...]:
    """Cut entries into runs of at most so many blocks and bytes; a block that is larger has a run of its own."""
    batches: list[tuple[BlockEntry, ...]] = []
    run: list[BlockEntry] = []
    size = 0
    for entry in entries:
        if run and (size + entry.length > bytes_max or len(run) == blocks_max):
            batches.append(tuple(run))
            run, size = [], 0
        run.append(entry)
        size += entry.length
    if run:
        batches.append(tuple(run))
    return tuple(batches)


class SyncProgress:
    """Which partitions wait for a look, and which are synced under the newest layout. No clock: times are passed in."""

    def __init__(self, node_id: str, *, interval_s: float) -> None:
        """Begin with nothing; whole rounds begin `interval_s` after one another at most."""
        self._node_id = node_id
        self._interval_s = interval_s
        self._living: Living | None = None
        self._up: frozenset[str] = frozenset()
        self._registered: frozenset[str] | None = None
        self._owned: tuple[int, ...] = ()
        self._pending: dict[int, Stage] = {}
        self._covered: dict[int, frozenset[str]] = {}
        self._answered: dict[int, frozenset[str]] = {}
        self._synced: set[int] = set()
        self._floored: set[int] = set()
        self._ranks: dict[int, int] = {}
        self._round_due_s = 0.0
        self._retry_due_s = 0.0

    def hurry(self) -> None:
        """Let the next whole round begin at the next `observe`."""
        self._round_due_s = 0.0

    @property
    def owned(self) -> tuple[int, ...]:
        """The partitions that the node owns in the newest layout."""
        return self._owned

    @property
    def synced_count(self) -> int:
        """How many of them are synced."""
        return len(self._owned) if self._living is not None and not self._living.older else len(self._synced)

    @property
    def at_risk_count(self) -> int:
        """How many are not, because too few old owners answered."""
        living = self._living
        if living is None or not living.older:
            return 0
        return sum(
            partition not in self._synced and not enough(living, partition, answered, self._registered)
            for partition, answered in self._answered.items()
        )

    @property
    def all_synced(self) -> bool:
        """Whether the node holds all that it has to under the newest layout."""
        return self._living is not None and self.synced_count == len(self._owned)

    @property
    def idle(self) -> bool:
        """Whether no partition waits for a look."""
        return not self._pending

    def observe(
        self, living: Living, up: frozenset[str], now_s: float, *, registered: frozenset[str] | None = None
    ) -> bool:
        """Take note of what is known now, and begin what that calls for; returns whether layouts changed.

        A round over all partitions begins with the first call, after a change of layouts, and when it is due; after a
        node came up, one over those that are shared with it.
        """
        before, self._living = self._living, living
        self._registered = registered
        up_before, self._up = self._up, up
        came_up = up - up_before
        changed = living is not before
        if changed:
            if before is None or before.newest.epoch != living.newest.epoch:
                self._owned = living.owned_by(self._node_id)
                self._covered, self._answered = {}, {}
                self._synced, self._floored = set(), set()
                self._pending = {}
            self._judge(self._covered)
        if changed or up != up_before:
            live = {self._node_id, *up}
            self._ranks = {place: live_owners(living, place, live) for place in self._owned}
        if changed or now_s >= self._round_due_s:
            self._begin(self._owned)
            self._round_due_s = now_s + self._interval_s
        elif came_up:
            self._begin([place for place in self._owned if not came_up.isdisjoint(living.owners_of(place))])
        if self.idle and not self.all_synced and now_s >= self._retry_due_s:
            self._begin([place for place in self._owned if place not in self._synced])
        return changed

    def next_batch(self, *, partitions_max: int) -> SyncBatch | None:
        """Return what to look at next, None for nothing."""
        if self._living is None:
            return None
        return plan_sync(
            self._living,
            self._pending,
            self._ranks,
            node_id=self._node_id,
            up=self._up,
            partitions_max=partitions_max,
        )

    def without_floor(self, partitions: Sequence[int]) -> tuple[int, ...]:
        """Return those of `partitions` whose stamp floor has not been raised under the newest layout."""
        return tuple(place for place in partitions if place not in self._floored)

    def floored(self, partitions: Sequence[int]) -> None:
        """Note that the stamp floor of partitions was raised, after enough old owners fenced the newest epoch."""
        self._floored.update(partitions)

    def settle(self, looks: Mapping[int, Looked], now_s: float) -> None:
        """Take note of what came of looks at partitions under the layouts that were observed last."""
        for partition, looked in looks.items():
            self._covered[partition] = self._covered.get(partition, frozenset()) | looked.covered
            self._answered[partition] = looked.answered
            if looked.deferred and self._pending.get(partition) is Stage.URGENT:
                self._pending[partition] = Stage.ALL
            else:
                self._pending.pop(partition, None)
        self._judge(looks)
        if self.idle:
            self._retry_due_s = now_s + RETRY_S

    def _judge(self, partitions: Collection[int]) -> None:
        living = self._living
        if living is None or not living.older:
            return
        for partition in partitions:
            # Without the floor the copies here may count as older than a session that leans on them.
            covered = self._covered.get(partition, frozenset())
            if partition in self._floored and enough(living, partition, covered, self._registered):
                self._synced.add(partition)

    def _begin(self, partitions: Collection[int]) -> None:
        for partition in partitions:
            self._pending[partition] = Stage.URGENT
