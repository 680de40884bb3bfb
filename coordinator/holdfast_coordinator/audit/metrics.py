"""Metrics of the audit log: how it is appended to, and how much of it has not moved into the cluster."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_APPEND_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_SIZE_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class AuditMetrics:
    """What one coordinator counts of the audit log."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Register the metrics."""
        self._records = Counter(
            "holdfast_audit_records",
            "Records appended by this coordinator, by outcome.",
            ("outcome",),
            registry=registry,
        )
        self._batch_records = Histogram(
            "holdfast_audit_batch_records",
            "Records that shared one transaction.",
            buckets=_SIZE_BUCKETS,
            registry=registry,
        )
        self._append_seconds = Histogram(
            "holdfast_audit_append_seconds",
            "Time from the first call that joined a transaction to its end.",
            buckets=_APPEND_BUCKETS,
            registry=registry,
        )
        self._replanned = Counter(
            "holdfast_audit_conflicts",
            "Transactions planned anew because another coordinator appended.",
            registry=registry,
        )
        self._sealed = Counter(
            "holdfast_audit_segments_sealed",
            "Segments that this coordinator moved into the cluster.",
            registry=registry,
        )
        self._unsealed = Gauge(
            "holdfast_audit_unsealed_records",
            "Records that only the metadata store holds, as seen last.",
            registry=registry,
        )

    def appended(self, outcomes: list[str]) -> None:
        """Count one transaction with its records' outcomes: OK, REPEATED or names of error codes."""
        self._batch_records.observe(len(outcomes))
        for outcome in outcomes:
            self._records.labels(outcome).inc()

    def waited(self, seconds: float) -> None:
        """Take the time that the first member of a batch waited."""
        self._append_seconds.observe(seconds)

    def conflict(self) -> None:
        """Count a transaction that lost to another coordinator's."""
        self._replanned.inc()

    def sealed(self) -> None:
        """Count a segment."""
        self._sealed.inc()

    def unsealed(self, records: int) -> None:
        """Take over how many records have not been sealed."""
        self._unsealed.set(records)
