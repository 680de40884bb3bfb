"""Calls that came without a good credential: counted, and recorded as counts only, at most once a minute.

Whoever can reach the port can make such calls without end; a record of each would let strangers fill the audit log.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Final

import prometheus_client
from prometheus_client import CollectorRegistry

from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.requests import new_request_id

ACTION: Final = "auth.refused"
_PAUSE_S: Final = 60.0


class RefusalCounts:
    """Counts by reason. `run` writes them down."""

    def __init__(
        self, ledger: Ledger, registry: CollectorRegistry, *, clock: Clock, random_bytes: Callable[[int], bytes]
    ) -> None:
        """Register the metric, and bind to where the record goes."""
        self._ledger = ledger
        self._clock = clock
        self._random_bytes = random_bytes
        self._metric = prometheus_client.Counter(
            "holdfast_unauthenticated", "Calls refused for want of a good credential.", ("reason",), registry=registry
        )
        self._counts: Counter[str] = Counter()
        self._came = asyncio.Event()

    def count(self, reason: str) -> None:
        """Count a refused call; `reason` is one of the few that `Identities` gives."""
        self._metric.labels(reason).inc()
        self._counts[reason] += 1
        self._came.set()

    async def run(self) -> None:
        """Record the first refusal at once, and those of each minute after it together; until cancelled.

        While the record cannot be written the counts are kept for the next one.
        """
        while True:
            await self._came.wait()
            self._came.clear()
            counts, self._counts = self._counts, Counter()
            try:
                await self._ledger.record(self._entry(counts))
            except HoldfastError:
                self._counts.update(counts)
                self._came.set()
            await self._clock.sleep(_PAUSE_S)

    def _entry(self, counts: Counter[str]) -> Entry:
        details = {reason: str(count) for reason, count in sorted(counts.items())}
        return Entry(
            principal="",
            tenant="",
            action=ACTION,
            request_id=new_request_id(),
            entry_id=self._random_bytes(8).hex(),
            details={"count": str(counts.total())} | details,
            outcome=ErrorCode.UNAUTHENTICATED.name,
        )
