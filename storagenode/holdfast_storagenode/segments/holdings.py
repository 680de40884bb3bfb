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

from holdfast_storagenode.store import Holding

# One of a tenant in a partition takes about 330 bytes; this is 64 tenants in each of 4,096 partitions.
TALLIES_MAX: Final = 262_144

_MODULUS: Final = 1 << 256
_DIGEST_BYTES: Final = 32
# What a key of the index consists of.
_TENANT: Final = slice(0, 4)
_PARTITION: Final = slice(4, 6)
_ID: Final = slice(6, 38)


@dataclass(slots=True)
class _Tally:
    """Blocks of one tenant in one partition; negative while what was there before is still being counted."""

    count: int = 0
    total: int = 0


@dataclass(slots=True)
class Partition:
    """The tallies of one partition by tenant, as keys name it. Until `complete` they hold what changed since the view.

    `note` may leave empty tallies.
    """

    tenants: dict[bytes, _Tally]
    complete: bool = False

    def finish(self, found: Mapping[bytes, _Tally]) -> int:
        """Add what the view showed; return by how many there are more tallies now."""
        before = len(self.tenants)
        for tenant, tally in found.items():
            changed = self.tenants.setdefault(tenant, _Tally())
            changed.count += tally.count
            changed.total += tally.total
        self.complete = True
        return len(self.tenants) - before

    def holdings(self) -> list[Holding]:
        """Return them as a store tells them."""
        return [
            Holding(_number(tenant), tally.count, (tally.total % _MODULUS).to_bytes(_DIGEST_BYTES, "big"))
            for tenant, tally in sorted(self.tenants.items())
            if tally.count
        ]


Counting: TypeAlias = Callable[[int], AbstractContextManager[Iterable[bytes]]]
"""From a partition to the keys of its whole blocks, as they are at the moment of entering."""


class HoldingsBook:
    """Tallies of partitions. `note` is called under `lock` with every change; `of` takes it for a moment.

    `partitions` has those that are kept up, as keys name them.
    """

    def __init__(self, *, tallies_max: int = TALLIES_MAX) -> None:
        self.partitions: dict[bytes, Partition] = {}
        self._tallies_max = tallies_max
        self._tallies = 0
        self._counting = threading.Lock()

    def note(self, key: bytes, sign: int) -> None:
        """Take note that a whole block came (+1) or went (-1). Under the lock."""
        partition = self.partitions.get(key[_PARTITION])
        if partition is None:
            return
        tally = partition.tenants.get(key[_TENANT])
        if tally is None:
            tally = partition.tenants[key[_TENANT]] = _Tally()
            self._tallies += 1
        tally.count += sign
        tally.total += sign * _number(key[_ID])
        if partition.complete and self._tallies > self._tallies_max:
            self._drop(key[_PARTITION])

    def of(self, number: int, lock: AbstractContextManager[object], counting: Counting) -> list[Holding]:
        """Return what is held in a partition. Call it without the lock.

        Raises:
            IndexDamagedError: the index cannot be trusted.
        """
        name = number.to_bytes(2, "big")
        with lock:
            partition = self.partitions.get(name)
            if partition is not None and partition.complete:
                return partition.holdings()
        # One at a time: who asks for the same partition meanwhile finds it counted.
        with self._counting, ExitStack() as view:
            with lock:
                known = self.partitions.get(name)
                if known is not None:
                    return known.holdings()
                keys = view.enter_context(counting(number))
                partition = self.partitions[name] = Partition({})
            try:
                found = _tallied(keys)
                with lock:
                    self._tallies += partition.finish(found)
                    return partition.holdings()
            finally:
                with lock:
                    if not partition.complete or self._tallies > self._tallies_max:
                        self._drop(name)

    def _drop(self, name: bytes) -> None:
        dropped = self.partitions.pop(name, None)
        self._tallies -= 0 if dropped is None else len(dropped.tenants)


def _tallied(keys: Iterable[bytes]) -> dict[bytes, _Tally]:
    tallies: dict[bytes, _Tally] = {}
    for key in keys:
        tally = tallies.get(key[_TENANT])
        if tally is None:
            tally = tallies[key[_TENANT]] = _Tally()
        tally.count += 1
        tally.total += _number(key[_ID])
    return tallies


def _number(part: bytes) -> int:
    return int.from_bytes(part, "big")
