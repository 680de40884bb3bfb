"""What a simulated storage node keeps its blocks on, and the store over it: crashes, rot, and lack of space.

`Disk` outlives its node. What was submitted and not yet acknowledged when the node crashes is there afterwards or not,
block by block. Some crashes cost the index: then no stamp is known until the node hears from a coordinator.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final, Protocol

from holdfast_core.model.block import verify
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_storagenode.healing.scrub_place import ScrubPlace
from holdfast_storagenode.store import (
    BlockEntry,
    Found,
    Holding,
    PartitionOf,
    Sealed,
    StoreStatus,
    Verdict,
    kind_of,
)
from tests.sim.world import Process

CAPACITY_BYTES: Final = 64 << 20
_MODULUS: Final = 1 << 256

Key = tuple[int, bytes]
"""Tenant and id."""


class DiskWatcher(Protocol):
    """Hears of what may never happen to a block that is needed."""

    def deleted(self, node_id: str, ref: Key, cutoff: int | None) -> None:
        """A node has removed a block."""

    def stamped_back(self, node_id: str, ref: Key, before: int, now: int) -> None:
        """A copy counts as stamped with less than it did."""


@dataclass(slots=True)
class Copy:
    """A block on a disk: its bytes as they are now, its stamp, and whether the node set it aside as corrupt."""

    data: bytes
    stamp: int
    aside: bool = False


@dataclass(slots=True)
class _Batch:
    tenant: int
    blocks: list[tuple[bytes, bytes]]
    stamp: int


@dataclass(slots=True)
class Disk:
    """Durable state. `copies` are by partition; `saved` is what the node wrote beside its blocks.

    Attributes:
        floors: stamp floors by partition.
        floor: of the whole store, from index rebuilds.
        rebuilt: whether the stamps are unknown since an index rebuild, or because the disk is new.
        epoch: the newest collection epoch that was made durable.
        slow_s: what making a batch durable takes at most.
        stands_still: whether no batch becomes durable at the moment.
    """

    copies: dict[int, dict[Key, Copy]] = field(default_factory=dict)
    saved: dict[str, bytes] = field(default_factory=dict)
    floors: dict[int, int] = field(default_factory=dict)
    floor: int = 0
    rebuilt: bool = True
    epoch: int = 0
    capacity_bytes: int = CAPACITY_BYTES
    used_bytes: int = 0
    slow_s: float = 0.003
    stands_still: bool = False
    under_way: list[_Batch] = field(default_factory=list)
    name: str = ""
    scrub: ScrubPlace = field(default_factory=ScrubPlace)
    watcher: DiskWatcher | None = None
    block_count: int = 0
    set_aside: dict[Key, None] = field(default_factory=dict)
    stamps_lost: dict[tuple[int, Key], int] = field(default_factory=dict)

    def find(self, partition: int, key: Key) -> Copy | None:
        """Return the copy of a block."""
        return self.copies.get(partition, {}).get(key)

    def stamp_of(self, partition: int, copy: Copy) -> int:
        """Return what a copy counts as stamped with."""
        return max(copy.stamp, self.floors.get(partition, 0), self.floor)

    def lose_power(self, dice: random.Random, partition_of: PartitionOf, *, rebuild: bool) -> None:
        """Go through a crash: what was under way is there or not; with `rebuild` the stamps are gone."""
        for batch in self.under_way:
            for block_id, data in batch.blocks:
                if dice.random() < 0.5:
                    keep(self, partition_of(block_id), (batch.tenant, block_id), data)
                    if dice.random() < 0.5:
                        stamp(self, partition_of(block_id), (batch.tenant, block_id), batch.stamp)
        self.under_way.clear()
        if rebuild:
            for place, held in self.copies.items():
                for key, copy in held.items():
                    lost = (place, key)
                    self.stamps_lost[lost] = max(self.stamps_lost.get(lost, 0), self.stamp_of(place, copy))
            self.rebuilt = True
            self.floor = 0
            self.floors.clear()
            for held in self.copies.values():
                for copy in held.values():
                    copy.stamp = 0
                    copy.aside = False
            self.set_aside.clear()

    def wipe(self) -> None:
        """Lose everything, as a disk that is replaced."""
        self.copies.clear()
        self.saved.clear()
        self.floors.clear()
        self.under_way.clear()
        self.stamps_lost.clear()
        self.set_aside.clear()
        self.floor = self.epoch = self.used_bytes = self.block_count = 0
        self.rebuilt = True


def keep(disk: Disk, partition: int, key: Key, data: bytes) -> bool:
    """Put a block where no whole copy is; return whether there was none."""
    held = disk.copies.setdefault(partition, {})
    copy = held.get(key)
    if copy is None:
        held[key] = Copy(data, 0)
        disk.used_bytes += len(data)
        disk.block_count += 1
        return True
    if copy.aside:
        copy.data, copy.aside = data, False
        disk.set_aside.pop(key, None)
        return True
    return False


def stamp(disk: Disk, partition: int, key: Key, epoch: int) -> None:
    """Raise a copy's own stamp."""
    copy = disk.copies[partition][key]
    copy.stamp = max(copy.stamp, epoch)


class SimStore:
    """A `BlockStore` with `submit`. One life of it is one process's."""

    def __init__(self, disk: Disk, process: Process, partition_of: PartitionOf, dice: random.Random) -> None:
        """Open the disk."""
        self.disk = disk
        self._cutoffs: dict[int, int] = {}
        self._process = process
        self._partition_of = partition_of
        self._dice = dice
        self._epoch = disk.epoch

    def submit(self, tenant: int, blocks: Sequence[Sealed], *, stamp: int = 0) -> Future[list[Verdict]]:
        """See `SubmittingStore.submit`: durable when the future ends, there or not if the node crashes before."""
        self._process.check_alive()
        self._check_room(tenant, blocks)
        batch = _Batch(tenant, [(block.id, bytes(block.data)) for block in blocks], stamp)
        self.disk.under_way.append(batch)
        done: Future[list[Verdict]] = Future()
        done.set_running_or_notify_cancel()
        delay_s = self._dice.uniform(0.0001, self.disk.slow_s)
        self._process.world.loop.call_later(delay_s, self._durable, batch, done)
        return done

    def put(self, tenant: int, blocks: Sequence[Sealed], *, stamp: int = 0) -> list[Verdict]:
        """See `BlockStore.put`."""
        self._process.check_alive()
        self._check_room(tenant, blocks)
        return self._write(_Batch(tenant, [(block.id, bytes(block.data)) for block in blocks], stamp))

    def get(self, tenant: int, ids: Sequence[bytes], *, bytes_max: int) -> list[Found]:
        """See `BlockStore.get`."""
        self._process.check_alive()
        found: list[Found] = []
        size = 0
        for block_id in ids:
            item = self._read(tenant, block_id)
            size += 0 if isinstance(item, Verdict) else len(item.data)
            if size > bytes_max and found:
                break
            found.append(item)
        return found

    def has(self, tenant: int, ids: Sequence[bytes], *, verify: bool = False, stamp: int = 0) -> list[Verdict]:
        """See `BlockStore.has`."""
        self._process.check_alive()
        verdicts = [self._look(tenant, block_id, verify=verify) for block_id in ids]
        if stamp:
            for block_id, verdict in zip(ids, verdicts, strict=True):
                if verdict is Verdict.OK:
                    self._stamp(self._partition_of(block_id), (tenant, block_id), stamp)
        return verdicts

    def kinds(self, tenant: int, ids: Sequence[bytes]) -> list[int | None]:
        """See `BlockStore.kinds`."""
        copies = [self.disk.find(self._partition_of(block_id), (tenant, block_id)) for block_id in ids]
        return [None if copy is None else kind_of(copy.data) for copy in copies]

    def delete(self, tenant: int, ids: Sequence[bytes], *, cutoff: int | None = None) -> list[Verdict]:
        """See `BlockStore.delete`."""
        self._process.check_alive()
        if cutoff is not None:
            self._see(tenant, cutoff)
        verdicts: list[Verdict] = []
        for block_id in ids:
            place = self._partition_of(block_id)
            copy = self.disk.find(place, (tenant, block_id))
            if copy is None:
                verdicts.append(Verdict.MISSING)
            elif cutoff is not None and self.disk.stamp_of(place, copy) >= cutoff:
                verdicts.append(Verdict.KEPT)
            else:
                del self.disk.copies[place][(tenant, block_id)]
                self.disk.used_bytes -= len(copy.data)
                self.disk.block_count -= 1
                self.disk.set_aside.pop((tenant, block_id), None)
                self.disk.stamps_lost.pop((place, (tenant, block_id)), None)
                if self.disk.watcher is not None:
                    self.disk.watcher.deleted(self.disk.name, (tenant, block_id), cutoff)
                verdicts.append(Verdict.OK)
        return verdicts

    def scan(
        self,
        tenant: int,
        *,
        partition: int | None,
        end: int | None = None,
        after: bytes,
        limit: int,
        with_quarantined: bool = False,
    ) -> list[BlockEntry]:
        """See `BlockStore.scan`."""
        self._process.check_alive()
        above = (-1, b"")
        if after:
            above = (self._partition_of(after) if partition is None or end is not None else partition, after)
        places: Sequence[int] = sorted(self.disk.copies)
        if partition is not None:
            places = range(partition, partition + 1 if end is None else end)
        listed: list[BlockEntry] = []
        for place in places:
            if place < above[0]:
                continue
            held = self.disk.copies.get(place, {})
            for key in sorted(held):
                copy = held[key]
                if key[0] != tenant or (copy.aside and not with_quarantined) or (place, key[1]) <= above:
                    continue
                # What rots here are last bytes, so the header still says the kind.
                kind, counted = kind_of(copy.data), self.disk.stamp_of(place, copy)
                listed.append(BlockEntry(key[1], len(copy.data), kind, counted, copy.aside))
                if len(listed) == limit:
                    return listed
        return listed

    def tenants(self) -> list[int]:
        """See `BlockStore.tenants`."""
        return sorted({key[0] for held in self.disk.copies.values() for key in held})

    def holdings(self, partition: int) -> list[Holding]:
        """See `BlockStore.holdings`."""
        self._process.check_alive()
        counts: dict[int, int] = {}
        sums: dict[int, int] = {}
        for (tenant, block_id), copy in self.disk.copies.get(partition, {}).items():
            if not copy.aside:
                counts[tenant] = counts.get(tenant, 0) + 1
                sums[tenant] = sums.get(tenant, 0) + int.from_bytes(block_id, "big")
        return [
            Holding(tenant, counts[tenant], (sums[tenant] % _MODULUS).to_bytes(32, "big")) for tenant in sorted(counts)
        ]

    def quarantined(self, *, limit: int) -> list[tuple[int, bytes]]:
        """See `BlockStore.quarantined`."""
        return sorted(self.disk.set_aside)[:limit]

    @property
    def epoch(self) -> int:
        """See `BlockStore.epoch`."""
        return self._epoch

    def learn_epoch(self, epoch: int) -> None:
        """See `BlockStore.learn_epoch`."""
        self._process.check_alive()
        self._epoch = max(self._epoch, epoch)
        if self.disk.rebuilt:
            self.disk.rebuilt = False
            self.disk.floor = max(self.disk.floor, epoch)
            self._compare_stamps()

    def raise_floor(self, partitions: Sequence[int], epoch: int) -> None:
        """See `BlockStore.raise_floor`."""
        self._process.check_alive()
        for partition in partitions:
            self.disk.floors[partition] = max(self.disk.floors.get(partition, 0), epoch)

    def status(self) -> StoreStatus:
        """See `BlockStore.status`."""
        disk = self.disk
        free = max(0, disk.capacity_bytes - disk.used_bytes)
        return StoreStatus(
            capacity_bytes=disk.capacity_bytes,
            used_bytes=disk.used_bytes,
            free_bytes=free,
            block_count=disk.block_count,
            quarantined_count=len(disk.set_aside),
            full=free < disk.capacity_bytes // 64,
            failed=False,
        )

    def close(self) -> None:
        """Nothing is left to do: what was acknowledged is durable."""

    def overwrite(self, tenant: int, block_id: bytes, data: bytes) -> None:
        """Put wrong bytes in the place of a block, behind every check."""
        copy = self.disk.find(self._partition_of(block_id), (tenant, block_id))
        if copy is not None:
            copy.data = data

    def _compare_stamps(self) -> None:
        """Let the watcher know of copies that count as stamped with less than before the index was lost."""
        for (place, key), before in self.disk.stamps_lost.items():
            copy = self.disk.find(place, key)
            now = before if copy is None else self.disk.stamp_of(place, copy)
            if now < before and self.disk.watcher is not None:
                self.disk.watcher.stamped_back(self.disk.name, key, before, now)
        self.disk.stamps_lost.clear()

    def _durable(self, batch: _Batch, done: Future[list[Verdict]]) -> None:
        if self.disk.stands_still:
            self._process.world.loop.call_later(0.1, self._durable, batch, done)
        elif self._process.alive:
            self.disk.under_way = [other for other in self.disk.under_way if other is not batch]
            done.set_result(self._write(batch))

    def _write(self, batch: _Batch) -> list[Verdict]:
        verdicts: list[Verdict] = []
        for block_id, data in batch.blocks:
            place, key = self._partition_of(block_id), (batch.tenant, block_id)
            verdicts.append(Verdict.OK if keep(self.disk, place, key, data) else Verdict.PRESENT)
            self._stamp(place, key, batch.stamp)
        return verdicts

    def _stamp(self, partition: int, key: Key, epoch: int) -> None:
        stamp(self.disk, partition, key, epoch)

    def _check_room(self, tenant: int, blocks: Sequence[Sealed]) -> None:
        fresh = {
            block.id: len(block.data)
            for block in blocks
            if (copy := self.disk.find(self._partition_of(block.id), (tenant, block.id))) is None or copy.aside
        }
        size = sum(fresh.values())
        if size > self.disk.capacity_bytes - self.disk.used_bytes:
            raise HoldfastError(ErrorCode.DISK_FULL, f"the node has no space for {size} bytes of blocks")

    def _see(self, tenant: int, cutoff: int) -> None:
        if self.disk.rebuilt:
            raise HoldfastError(ErrorCode.NOT_READY, "the index was rebuilt, and no coordinator was heard of since")
        seen = self._cutoffs[tenant] = max(cutoff, self._cutoffs.get(tenant, 0))
        if cutoff < seen:
            raise HoldfastError(
                ErrorCode.CONFLICT, f"a collection with the cut-off {seen} was here already; this one has {cutoff}"
            )

    def _look(self, tenant: int, block_id: bytes, *, verify: bool) -> Verdict:
        if verify:
            item = self._read(tenant, block_id)
            return item if isinstance(item, Verdict) else Verdict.OK
        copy = self.disk.find(self._partition_of(block_id), (tenant, block_id))
        if copy is None:
            return Verdict.MISSING
        return Verdict.CORRUPT if copy.aside else Verdict.OK

    def _read(self, tenant: int, block_id: bytes) -> Found:
        copy = self.disk.find(self._partition_of(block_id), (tenant, block_id))
        if copy is None:
            return Verdict.MISSING
        if copy.aside:
            return Verdict.CORRUPT
        try:
            return verify(block_id, copy.data)
        except HoldfastError:
            copy.aside = True
            self.disk.set_aside[tenant, block_id] = None
            return Verdict.CORRUPT
