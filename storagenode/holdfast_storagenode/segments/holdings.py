"""How many whole blocks there are by partition and tenant, and the sums of their ids: counted once, then kept up.

A partition is counted from a view of the index while writes go on: what changes after the view was taken is added to
the tally, from then on for good. Tallies are bounded in number; partitions that find no room are counted each time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Final, TypeAlias

from holdfast_storagenode.segments.index import split_key
from holdfast_storagenode.store import Holding

# One of a tenant in a partition takes about 250 bytes.
TALLIES_MAX: Final = 131_072

_MODULUS: Final = 1 << 256
_DIGEST_BYTES: Final = 32
_PARTITION_AT: Final = 4


@dataclass(slots=True)
class _Tally:
    """Blocks of one tenant in one partition; negative while what was there before is still being counted."""

    count: int = 0
    total: int = 0


@dataclass(slots=True)
class _Partition:
    """The tallies of one partition by tenant. Until it is `complete` they hold what changed since the view."""

    tenants: dict[int, _Tally]
    complete: bool = False

    def add(self, tenant: int, count: int, total: int) -> int:
        """Add to a tenant's tally; return by how many there are more tallies now."""
        tally = self.tenants.get(tenant)
        if tally is None:
            self.tenants[tenant] = _Tally(count, total)
            return 1
        tally.count += count
        tally.total += total
        if tally.count == 0 and self.complete:
            del self.tenants[tenant]
            return -1
        return 0

    def finish(self, found: Mapping[int, _Tally]) -> int:
        """Add what the view showed; return by how many there are more tallies now."""
        before = len(self.tenants)
        for tenant, tally in found.items():
            self.add(tenant, tally.count, tally.total)
        self.tenants = {tenant: tally for tenant, tally in self.tenants.items() if tally.count}
        self.complete = True
        return len(self.tenants) - before

    def holdings(self) -> list[Holding]:
        """Return them as a store tells them."""
        return [
            Holding(tenant, tally.count, (tally.total % _MODULUS).to_bytes(_DIGEST_BYTES, "big"))
            for tenant, tally in sorted(self.tenants.items())
        ]


Counting: TypeAlias = Callable[[int], AbstractContextManager[Iterable[bytes]]]
"""From a partition to the keys of its whole blocks, as they are at the moment of entering."""


class HoldingsBook:
    """Tallies of partitions. `note` is called under `lock` with every change; `of` takes it for a moment."""

    def __init__(self, *, tallies_max: int = TALLIES_MAX) -> None:
        self._tallies_max = tallies_max
        self._tallies = 0
        self._partitions: dict[int, _Partition] = {}
        self._counting = threading.Lock()

    def note(self, key: bytes, sign: int) -> None:
        """Take note that a whole block came (+1) or went (-1). Under the lock."""
        partition = self._partitions.get(key[_PARTITION_AT] << 8 | key[_PARTITION_AT + 1])
        if partition is None:
            return
        tenant, number, total = _read_key(key)
        self._tallies += partition.add(tenant, sign, sign * total)
        if partition.complete and self._tallies > self._tallies_max:
            self._drop(number)

    def of(self, number: int, lock: AbstractContextManager[object], counting: Counting) -> list[Holding]:
        """Return what is held in a partition. Call it without the lock.

        Raises:
            IndexDamagedError: the index cannot be trusted.
        """
        with lock:
            partition = self._partitions.get(number)
            if partition is not None and partition.complete:
                return partition.holdings()
        # One at a time: who asks for the same partition meanwhile finds it counted.
        with self._counting:
            return self._count(number, lock, counting)

    def _count(self, number: int, lock: AbstractContextManager[object], counting: Counting) -> list[Holding]:
        with ExitStack() as view:
            with lock:
                known = self._partitions.get(number)
                if known is not None:
                    return known.holdings()
                keys = view.enter_context(counting(number))
                partition = self._partitions[number] = _Partition({})
            try:
                found = _tallied(keys)
                with lock:
                    self._tallies += partition.finish(found)
                    return partition.holdings()
            finally:
                with lock:
                    if not partition.complete or self._tallies > self._tallies_max:
                        self._drop(number)

    def _drop(self, number: int) -> None:
        self._tallies -= len(self._partitions.pop(number).tenants)


def _tallied(keys: Iterable[bytes]) -> dict[int, _Tally]:
    tallies: dict[int, _Tally] = {}
    for key in keys:
        tenant, _, number = _read_key(key)
        tally = tallies.get(tenant)
        if tally is None:
            tally = tallies[tenant] = _Tally()
        tally.count += 1
        tally.total += number
    return tallies


def _read_key(key: bytes) -> tuple[int, int, int]:
    """Return tenant, partition, and the id as a number."""
    tenant, partition, block_id = split_key(key)
    return tenant, partition, int.from_bytes(block_id, "big")
