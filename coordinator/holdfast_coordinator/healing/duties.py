"""What has to be done from time to time, once for the whole cluster: by the steward, and remembered in the store.

A run is claimed before it begins, by a compare-and-swap on the time of the last one, so that no two coordinators make
the same run, and the death of one in it does not make the next one run again at once. A duty has to be safe all the
same if two do it: what the claim spares is work.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

from holdfast_coordinator import keyspace
from holdfast_coordinator.healing.lease import StewardLease
from holdfast_coordinator.records import parse_number, still
from holdfast_coordinator.transactions import Outcome, attempt
from holdfast_core.model.errors import HoldfastError
from holdfast_core.model.limits import CLOCK_TOLERANCE_S
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.logs import get_log
from holdfast_core.runtime.metadata.store import MetadataStore, Put

_LOOK_INTERVAL_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Duty:
    """Something to be done every `interval_s` seconds; `run` raises HoldfastError if it could not be done this time."""

    name: str
    interval_s: float
    run: Callable[[], Awaitable[None]]


class Due(enum.Enum):
    """Whether a duty is to be run now."""

    YES = "an interval has passed since the last run"
    NO = "it has not"
    COUNT_ANEW = "it was never run, or at a time that has not come yet: an interval begins now"


def is_due(last_unix_ms: int, interval_s: float, now_unix_ms: int) -> Due:
    """Return whether a duty that was run then is due now. Pure.

    A clock that was ahead when it ran must not keep it from running for years; a clock that is behind by a little is
    none of that.
    """
    if not last_unix_ms or last_unix_ms - now_unix_ms > CLOCK_TOLERANCE_S * 1000:
        return Due.COUNT_ANEW
    return Due.YES if now_unix_ms - last_unix_ms >= interval_s * 1000 else Due.NO


class DutyWorker:
    """Runs one duty: a worker. Each has its own, so that none waits for another's long run."""

    def __init__(self, store: MetadataStore, lease: StewardLease, duty: Duty, clock: Clock) -> None:
        """Run `duty` while the lease is held here."""
        self.name = f"duty {duty.name}"
        self._store = store
        self._lease = lease
        self._duty = duty
        self._clock = clock
        self._ran_s: float | None = None
        self._runs = 0
        self._failures = 0

    async def step(self) -> float:
        """Run the duty if it is due; a run that fails is logged, and the next one comes in its time.

        Raises:
            HoldfastError: UNREACHABLE as the store.
        """
        if self._lease.term and await self._claimed():
            self._runs += 1
            try:
                await self._duty.run()
            except HoldfastError as error:
                self._failures += 1
                get_log("steward").warning("duty failed", duty=self._duty.name, code=error.code.name, why=error.message)
        return min(_LOOK_INTERVAL_S, self._duty.interval_s / 10)

    def status(self) -> Mapping[str, int]:
        """Return how often it ran here, and failed."""
        return {"runs": self._runs, "failures": self._failures}

    async def _claimed(self) -> bool:
        """Claim the run that is due, if one is."""
        now_s, now_unix_ms = self._clock.monotonic_s(), self._clock.now_unix_ms()
        if self._ran_s is not None and now_s - self._ran_s < self._duty.interval_s:
            return False  # whatever the wall clock says
        key = keyspace.duty(self._duty.name)
        item = await self._store.get(key)
        last_unix_ms = parse_number(item)
        due = is_due(last_unix_ms, self._duty.interval_s, now_unix_ms)
        if due is Due.NO:
            return False
        claim = [still(key, item), self._lease.still()]
        applied = await attempt(self._store, claim, [Put(key, str(now_unix_ms).encode())]) is Outcome.APPLIED
        if not applied or due is Due.COUNT_ANEW:
            return False
        self._ran_s = now_s
        return True
