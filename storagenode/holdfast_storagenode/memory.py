"""A store in memory: for tests and for clusters that live as long as their process. Honest in all but durability."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Final

from holdfast_core.model.block import verify
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import BATCH_BYTES_MAX, GIB
from holdfast_storagenode.store import BlockEntry, Found, Holding, PartitionOf, Sealed, StoreStatus, Verdict, kind_of

CAPACITY_BYTES_DEFAULT: Final = 4 * GIB

_Key = tuple[int, int, bytes]


class MemoryStore:
    """Keeps blocks in a dictionary; every read is hashed as elsewhere."""

    def __init__(self, partition_of: PartitionOf, *, capacity_bytes: int | None = None) -> None:
        self._partition_of = partition_of
        self._capacity_bytes = CAPACITY_BYTES_DEFAULT if capacity_bytes is None else capacity_bytes
        self._lock = threading.Lock()
        self._blocks: dict[_Key, bytes] = {}
        self._quarantined: set[_Key] = set()
        self._stamps: dict[_Key, int] = {}
        self._floors: dict[int, int] = {}
        self._epoch = 0
        self._cutoff_seen = 0
        self._used_bytes = 0

    def put(self, tenant: int, blocks: Sequence[Sealed], *, stamp: int = 0) -> list[Verdict]:
        """See `BlockStore.put`."""
        with self._lock:
            keys = [self._key(tenant, block.id) for block in blocks]
            fresh = {
                key: bytes(block.data)
                for key, block in zip(keys, blocks, strict=True)
                if key not in self._blocks or key in self._quarantined
            }
            size = sum(len(data) for data in fresh.values())
            if size > self._capacity_bytes - self._used_bytes:
                raise HoldfastError(ErrorCode.DISK_FULL, f"the node has no space for {size} bytes of blocks")
            verdicts: list[Verdict] = []
            for key in keys:
                data = fresh.pop(key, None)
                verdicts.append(Verdict.PRESENT if data is None else Verdict.OK)
                if data is not None:
                    self._used_bytes += len(data) - len(self._blocks.get(key, b""))
                    self._blocks[key] = data
                    self._quarantined.discard(key)
                self._stamp(key, stamp)
            return verdicts

    def get(self, tenant: int, ids: Sequence[bytes], *, bytes_max: int) -> list[Found]:
        """See `BlockStore.get`."""
        found: list[Found] = []
        size = 0
        for block_id in ids:
            item = self._read(self._key(tenant, block_id))
            size += 0 if isinstance(item, Verdict) else len(item.data)
            if size > bytes_max and found:
                break
            found.append(item)
        return found

    def has(self, tenant: int, ids: Sequence[bytes], *, verify: bool = False, stamp: int = 0) -> list[Verdict]:
        """See `BlockStore.has`."""
        verdicts: list[Verdict] = []
        for block_id in ids:
            key = self._key(tenant, block_id)
            if verify:
                item = self._read(key)
                verdicts.append(item if isinstance(item, Verdict) else Verdict.OK)
            elif key in self._quarantined:
                verdicts.append(Verdict.CORRUPT)
            else:
                verdicts.append(Verdict.OK if key in self._blocks else Verdict.MISSING)
            if stamp:
                verdicts[-1] = self._stamped(key, stamp, verdicts[-1])
        return verdicts

    def kinds(self, tenant: int, ids: Sequence[bytes]) -> list[int | None]:
        """See `BlockStore.kinds`."""
        held = (self._blocks.get(self._key(tenant, block_id)) for block_id in ids)
        return [None if data is None else kind_of(data) for data in held]

    def delete(self, tenant: int, ids: Sequence[bytes], *, cutoff: int | None = None) -> list[Verdict]:
        """See `BlockStore.delete`."""
        verdicts: list[Verdict] = []
        with self._lock:
            self._see(cutoff)
            for block_id in ids:
                key = self._key(tenant, block_id)
                if cutoff is not None and key in self._blocks and self._stamp_of(key) >= cutoff:
                    verdicts.append(Verdict.KEPT)
                    continue
                data = self._blocks.pop(key, None)
                self._quarantined.discard(key)
                self._stamps.pop(key, None)
                self._used_bytes -= 0 if data is None else len(data)
                verdicts.append(Verdict.MISSING if data is None else Verdict.OK)
        return verdicts

    def scan(self, tenant: int, *, partition: int | None, after: bytes, limit: int) -> list[BlockEntry]:
        """See `BlockStore.scan`."""
        with self._lock:
            held = sorted(
                (key, data)
                for key, data in self._blocks.items()
                if key[0] == tenant and (partition is None or key[1] == partition) and key not in self._quarantined
            )
        above = (tenant, self._partition_of(after) if partition is None else partition, after) if after else None
        listed = [(key, data) for key, data in held if above is None or key > above]
        return [BlockEntry(key[2], len(data), kind_of(data), self._stamp_of(key)) for key, data in listed[:limit]]

    def tenants(self) -> list[int]:
        """See `BlockStore.tenants`."""
        with self._lock:
            return sorted({key[0] for key in self._blocks})

    def holdings(self, partition: int) -> list[Holding]:
        """See `BlockStore.holdings`."""
        counts: dict[int, int] = {}
        sums: dict[int, int] = {}
        with self._lock:
            for tenant, place, block_id in self._blocks.keys() - self._quarantined:
                if place == partition:
                    counts[tenant] = counts.get(tenant, 0) + 1
                    sums[tenant] = sums.get(tenant, 0) + int.from_bytes(block_id, "big")
        return [
            Holding(tenant, counts[tenant], (sums[tenant] % (1 << 256)).to_bytes(32, "big"))
            for tenant in sorted(counts)
        ]

    def quarantined(self, *, limit: int) -> list[tuple[int, bytes]]:
        """See `BlockStore.quarantined`."""
        with self._lock:
            return [(tenant, block_id) for tenant, _, block_id in sorted(self._quarantined)[:limit]]

    @property
    def epoch(self) -> int:
        """See `BlockStore.epoch`."""
        return self._epoch

    def learn_epoch(self, epoch: int) -> None:
        """See `BlockStore.learn_epoch`."""
        self._epoch = max(self._epoch, epoch)

    def raise_floor(self, partitions: Sequence[int], epoch: int) -> None:
        """See `BlockStore.raise_floor`."""
        with self._lock:
            for partition in partitions:
                self._floors[partition] = max(self._floors.get(partition, 0), epoch)

    def status(self) -> StoreStatus:
        """See `BlockStore.status`."""
        with self._lock:
            free = max(0, self._capacity_bytes - self._used_bytes)
            return StoreStatus(
                capacity_bytes=self._capacity_bytes,
                used_bytes=self._used_bytes,
                free_bytes=free,
                block_count=len(self._blocks),
                quarantined_count=len(self._quarantined),
                full=free < BATCH_BYTES_MAX,
                failed=False,
            )

    def close(self) -> None:
        """Do nothing: what is in memory outlives a stop of the node."""

    def overwrite(self, tenant: int, block_id: bytes, data: bytes) -> None:
        """Put wrong bytes in the place of a block, behind every check; for tests that plant rot."""
        with self._lock:
            self._blocks[self._key(tenant, block_id)] = data

    def _key(self, tenant: int, block_id: bytes) -> _Key:
        return (tenant, self._partition_of(block_id), block_id)

    def _stamp(self, key: _Key, stamp: int) -> None:
        self._stamps[key] = max(self._stamps.get(key, 0), stamp)

    def _stamp_of(self, key: _Key) -> int:
        return max(self._stamps.get(key, 0), self._floors.get(key[1], 0))

    def _stamped(self, key: _Key, stamp: int, verdict: Verdict) -> Verdict:
        """Stamp a block that was found whole, unless it was removed since."""
        with self._lock:
            if verdict is Verdict.OK and key not in self._blocks:
                return Verdict.MISSING
            if verdict is Verdict.OK:
                self._stamp(key, stamp)
        return verdict

    def _see(self, cutoff: int | None) -> None:
        if cutoff is None:
            return
        if cutoff < self._cutoff_seen:
            raise HoldfastError(
                ErrorCode.CONFLICT,
                f"a collection with the cut-off {self._cutoff_seen} was here already; this one has {cutoff}",
            )
        self._cutoff_seen = cutoff

    def _read(self, key: _Key) -> Found:
        data = self._blocks.get(key)
        if data is None:
            return Verdict.MISSING
        if key in self._quarantined:
            return Verdict.CORRUPT
        try:
            return verify(key[2], data)
        except HoldfastError:
            self._quarantined.add(key)
            return Verdict.CORRUPT
