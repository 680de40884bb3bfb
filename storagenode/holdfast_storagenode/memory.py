"""A store in memory: for tests, simulation, and clusters that live as long as their process.

Honest in all but durability. The same calls in the same order leave the same store and give the same answers.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from holdfast_core.model.block import verify
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import BATCH_BYTES_MAX, GIB
from holdfast_storagenode.store import BlockEntry, Found, Holding, PartitionOf, Sealed, StoreStatus, Verdict, kind_of

CAPACITY_BYTES_DEFAULT: Final = 4 * GIB

_MODULUS: Final = 1 << 256


@dataclass(slots=True)
class _Copy:
    """One block: its bytes, its kind as it came, its own stamp, and whether the bytes are known to be corrupt."""

    data: bytes
    kind: int
    stamp: int
    corrupt: bool = False


@dataclass(slots=True)
class _Shelf:
    """What is held of one tenant in one partition, with the count of whole copies and the sum of their ids."""

    copies: dict[bytes, _Copy] = field(default_factory=dict)
    whole_count: int = 0
    whole_sum: int = 0
    order: list[bytes] | None = None

    def place(self, block_id: bytes, copy: _Copy) -> None:
        """Set a whole copy in the place of what was there."""
        self.remove(block_id)
        self.copies[block_id] = copy
        self.order = None
        self._count(block_id, +1)

    def remove(self, block_id: bytes) -> _Copy | None:
        """Take a copy out; return it, None if there was none."""
        copy = self.copies.pop(block_id, None)
        if copy is not None:
            self.order = None
            if not copy.corrupt:
                self._count(block_id, -1)
        return copy

    def set_aside(self, block_id: bytes, copy: _Copy) -> None:
        """Mark a copy as corrupt, unless another has taken its place."""
        if self.copies.get(block_id) is copy and not copy.corrupt:
            copy.corrupt = True
            self._count(block_id, -1)

    def ids(self) -> list[bytes]:
        """Return all ids in order."""
        if self.order is None:
            self.order = sorted(self.copies)
        return self.order

    def _count(self, block_id: bytes, sign: int) -> None:
        self.whole_count += sign
        self.whole_sum += sign * int.from_bytes(block_id, "big")


class MemoryStore:
    """Keeps blocks in dictionaries; every read is hashed as elsewhere."""

    def __init__(self, partition_of: PartitionOf, *, capacity_bytes: int | None = None) -> None:
        self._partition_of = partition_of
        self._capacity_bytes = CAPACITY_BYTES_DEFAULT if capacity_bytes is None else capacity_bytes
        self._lock = threading.Lock()
        self._shelves: dict[int, dict[int, _Shelf]] = {}
        self._floors: dict[int, int] = {}
        self._floor = 0
        self._epoch = 0
        self._cutoffs: dict[int, int] = {}
        self._stamps_known = True
        self._used_bytes = 0

    def put(self, tenant: int, blocks: Sequence[Sealed], *, stamp: int = 0) -> list[Verdict]:
        """See `BlockStore.put`."""
        with self._lock:
            fresh = {block.id: bytes(block.data) for block in blocks if not self._is_whole(tenant, block.id)}
            size = sum(len(data) for data in fresh.values())
            if size > self._capacity_bytes - self._used_bytes:
                raise HoldfastError(ErrorCode.DISK_FULL, f"the node has no space for {size} bytes of blocks")
            verdicts: list[Verdict] = []
            for block in blocks:
                data = fresh.pop(block.id, None)
                verdicts.append(Verdict.PRESENT if data is None else Verdict.OK)
                if data is not None:
                    self._keep(tenant, block.id, data)
                self._raise_stamp(tenant, block.id, stamp)
            return verdicts

    def get(self, tenant: int, ids: Sequence[bytes], *, bytes_max: int) -> list[Found]:
        """See `BlockStore.get`."""
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
        if verify:
            for block_id in ids:
                self._read(tenant, block_id)
        verdicts: list[Verdict] = []
        with self._lock:
            for block_id in ids:
                copy = self._find(tenant, block_id)
                present = Verdict.CORRUPT if copy is not None and copy.corrupt else Verdict.OK
                verdicts.append(Verdict.MISSING if copy is None else present)
                if verdicts[-1] is Verdict.OK:
                    self._raise_stamp(tenant, block_id, stamp)
        return verdicts

    def kinds(self, tenant: int, ids: Sequence[bytes]) -> list[int | None]:
        """See `BlockStore.kinds`."""
        with self._lock:
            held = [self._find(tenant, block_id) for block_id in ids]
        return [None if copy is None else copy.kind for copy in held]

    def delete(self, tenant: int, ids: Sequence[bytes], *, cutoff: int | None = None) -> list[Verdict]:
        """See `BlockStore.delete`."""
        verdicts: list[Verdict] = []
        with self._lock:
            if cutoff is not None:
                self._see(tenant, cutoff)
            for block_id in ids:
                copy = self._find(tenant, block_id)
                if copy is None:
                    verdicts.append(Verdict.MISSING)
                elif cutoff is not None and self._counted(block_id, copy) >= cutoff:
                    verdicts.append(Verdict.KEPT)
                else:
                    verdicts.append(Verdict.OK)
                    self._drop(tenant, block_id)
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
        with self._lock:
            listed: list[BlockEntry] = []
            for block_id, copy in self._above(tenant, partition, end, after):
                if len(listed) >= limit:
                    break
                if with_quarantined or not copy.corrupt:
                    counted = self._counted(block_id, copy)
                    listed.append(BlockEntry(block_id, len(copy.data), copy.kind, counted, copy.corrupt))
            return listed

    def tenants(self) -> list[int]:
        """See `BlockStore.tenants`."""
        with self._lock:
            return sorted(self._shelves)

    def holdings(self, partition: int) -> list[Holding]:
        """See `BlockStore.holdings`."""
        with self._lock:
            shelves = [(tenant, self._shelves[tenant].get(partition)) for tenant in sorted(self._shelves)]
            return [
                Holding(tenant, shelf.whole_count, (shelf.whole_sum % _MODULUS).to_bytes(32, "big"))
                for tenant, shelf in shelves
                if shelf is not None and shelf.whole_count
            ]

    def quarantined(self, *, limit: int) -> list[tuple[int, bytes]]:
        """See `BlockStore.quarantined`."""
        with self._lock:
            return [
                (tenant, block_id)
                for tenant, partition in self._places()
                for shelf in [self._shelves[tenant][partition]]
                if shelf.whole_count < len(shelf.copies)
                for block_id in shelf.ids()
                if shelf.copies[block_id].corrupt
            ][:limit]

    @property
    def epoch(self) -> int:
        """See `BlockStore.epoch`."""
        return self._epoch

    def learn_epoch(self, epoch: int) -> None:
        """See `BlockStore.learn_epoch`."""
        with self._lock:
            self._epoch = max(self._epoch, epoch)
            if not self._stamps_known:
                self._floor, self._stamps_known = max(self._floor, self._epoch), True

    def raise_floor(self, partitions: Sequence[int], epoch: int) -> None:
        """See `BlockStore.raise_floor`."""
        with self._lock:
            for partition in partitions:
                self._floors[partition] = max(self._floors.get(partition, 0), epoch)

    def status(self) -> StoreStatus:
        """See `BlockStore.status`."""
        with self._lock:
            free = max(0, self._capacity_bytes - self._used_bytes)
            shelves = [shelf for of_tenant in self._shelves.values() for shelf in of_tenant.values()]
            block_count = sum(len(shelf.copies) for shelf in shelves)
            return StoreStatus(
                capacity_bytes=self._capacity_bytes,
                used_bytes=self._used_bytes,
                free_bytes=free,
                block_count=block_count,
                quarantined_count=block_count - sum(shelf.whole_count for shelf in shelves),
                full=free < BATCH_BYTES_MAX,
                failed=False,
            )

    def close(self) -> None:
        """Do nothing: what is in memory outlives a stop of the node."""

    def contents(self) -> list[tuple[int, bytes, bytes]]:
        """Return (tenant, id, bytes) of every copy, whole or not, in order; for tests that look behind the calls."""
        with self._lock:
            return [
                (tenant, block_id, self._shelves[tenant][partition].copies[block_id].data)
                for tenant, partition in self._places()
                for block_id in self._shelves[tenant][partition].ids()
            ]

    def overwrite(self, tenant: int, block_id: bytes, data: bytes) -> None:
        """Put wrong bytes in the place of a block, behind every check; for tests that plant rot."""
        with self._lock:
            copy = self._find(tenant, block_id)
            if copy is None:
                raise KeyError(block_id)
            copy.data = data

    def forget_stamps(self) -> None:
        """Lose every stamp, as an engine does whose index was made anew; for tests and simulation.

        The first epoch that is learnt afterwards becomes the floor of the whole store. A directory that is new begins
        like this, too.
        """
        with self._lock:
            for tenant, partition in self._places():
                for copy in self._shelves[tenant][partition].copies.values():
                    copy.stamp = 0
            self._stamps_known = False

    def _places(self) -> list[tuple[int, int]]:
        return [(tenant, partition) for tenant in sorted(self._shelves) for partition in sorted(self._shelves[tenant])]

    def _find(self, tenant: int, block_id: bytes) -> _Copy | None:
        shelf = self._shelves.get(tenant, {}).get(self._partition_of(block_id))
        return None if shelf is None else shelf.copies.get(block_id)

    def _is_whole(self, tenant: int, block_id: bytes) -> bool:
        copy = self._find(tenant, block_id)
        return copy is not None and not copy.corrupt

    def _keep(self, tenant: int, block_id: bytes, data: bytes) -> None:
        shelf = self._shelves.setdefault(tenant, {}).setdefault(self._partition_of(block_id), _Shelf())
        before = shelf.copies.get(block_id)
        self._used_bytes += len(data) - (0 if before is None else len(before.data))
        # A copy that was set aside hands its stamp on.
        shelf.place(block_id, _Copy(data, kind_of(data), 0 if before is None else before.stamp))

    def _drop(self, tenant: int, block_id: bytes) -> None:
        partition = self._partition_of(block_id)
        shelf = self._shelves[tenant][partition]
        copy = shelf.remove(block_id)
        self._used_bytes -= 0 if copy is None else len(copy.data)
        if not shelf.copies:
            del self._shelves[tenant][partition]
        if not self._shelves[tenant]:
            del self._shelves[tenant]

    def _raise_stamp(self, tenant: int, block_id: bytes, stamp: int) -> None:
        copy = self._find(tenant, block_id)
        if copy is not None:
            copy.stamp = max(copy.stamp, stamp)

    def _counted(self, block_id: bytes, copy: _Copy) -> int:
        return max(copy.stamp, self._floor, self._floors.get(self._partition_of(block_id), 0))

    def _above(
        self, tenant: int, partition: int | None, end: int | None, after: bytes
    ) -> Iterator[tuple[bytes, _Copy]]:
        """Yield the copies of a partition, of several, or of all, that come after the id `after`."""
        shelves = self._shelves.get(tenant, {})
        numbers = sorted(shelves)
        if partition is not None:
            here = range(partition, end) if end is not None else (partition,)
            numbers = [number for number in here if number in shelves]
        one = partition is not None and end is None
        at = self._partition_of(after) if after and not one else -1
        for number in numbers:
            if number < at:
                continue
            ids = shelves[number].ids()
            resumed = bool(after) and (one or number == at)
            for block_id in ids[bisect_right(ids, after) if resumed else 0 :]:
                yield block_id, shelves[number].copies[block_id]

    def _see(self, tenant: int, cutoff: int) -> None:
        if not self._stamps_known:
            raise HoldfastError(
                ErrorCode.NOT_READY,
                "the node does not know the stamps of its blocks until a coordinator tells it the collection epoch",
            )
        seen = self._cutoffs[tenant] = max(cutoff, self._cutoffs.get(tenant, 0))
        if cutoff < seen:
            raise HoldfastError(
                ErrorCode.CONFLICT, f"a collection with the cut-off {seen} was here already; this one has {cutoff}"
            )

    def _read(self, tenant: int, block_id: bytes) -> Found:
        with self._lock:
            copy = self._find(tenant, block_id)
            if copy is None:
                return Verdict.MISSING
            if copy.corrupt:
                return Verdict.CORRUPT
            data = copy.data
        try:
            return verify(block_id, data)
        except HoldfastError:
            with self._lock:
                shelf = self._shelves.get(tenant, {}).get(self._partition_of(block_id))
                if shelf is not None:
                    shelf.set_aside(block_id, copy)
            return Verdict.CORRUPT
