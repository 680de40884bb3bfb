"""The coordinator's own metrics, beside those of calls that the service host counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from holdfast_core.runtime.clock import Clock
from holdfast_proto.v1.records_pb2 import Reading

# Seconds. A small object's barrier takes milliseconds, a terabyte's minutes.
_BARRIER_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0)


class CoordinatorMetrics:
    """What a coordinator counts, and what it sees of the cluster."""

    def __init__(self, registry: CollectorRegistry, clock: Clock) -> None:
        """Register the metrics."""
        self._clock = clock
        self._commits = Counter(
            "holdfast_commits", "Records made visible by this coordinator.", ("kind",), registry=registry
        )
        self._volumes_read = Counter(
            "holdfast_volumes_read",
            "Volumes of points that this coordinator committed, by how they were read; distrusted means that a sample "
            "contradicted the change tracker.",
            ("reading",),
            registry=registry,
        )
        self._vms_discarded = Counter(
            "holdfast_vms_discarded", "VMs whose discarding this coordinator ended.", registry=registry
        )
        self._sessions_begun = Counter(
            "holdfast_sessions_begun", "Sessions opened or resumed by this coordinator.", ("kind",), registry=registry
        )
        self._sessions_open = Gauge(
            "holdfast_sessions_open", "Open sessions of the cluster, as counted last.", registry=registry
        )
        self._nodes = Gauge("holdfast_nodes", "Registered storage nodes, by state.", ("state",), registry=registry)
        self._layout_epoch = Gauge(
            "holdfast_layout_epoch", "Newest layout epoch; 0 before the first.", registry=registry
        )
        self._layouts_living = Gauge(
            "holdfast_layouts_living", "Layout epochs that are alive; 1 once all has settled.", registry=registry
        )
        self._partitions_at_risk = Gauge(
            "holdfast_partitions_at_risk",
            "Copies of partitions whose former owners cannot be reached, as the nodes report them.",
            registry=registry,
        )
        self._steward = Gauge("holdfast_steward", "Whether this coordinator is the steward.", registry=registry)
        self._barrier_seconds = Histogram(
            "holdfast_barrier_seconds",
            "Time that a commit waited for the check that all it names is durable.",
            buckets=_BARRIER_BUCKETS,
            registry=registry,
        )

    def committed(self, kind: str) -> None:
        """Count a commit; `kind` is "point" or "object"."""
        self._commits.labels(kind).inc()

    def volumes_read(self, readings: Iterable[Reading.ValueType]) -> None:
        """Count how the volumes of a committed point were read."""
        for reading in readings:
            self._volumes_read.labels(Reading.Name(reading).removeprefix("READING_").lower()).inc()

    def discarded(self) -> None:
        """Count a VM that was discarded."""
        self._vms_discarded.inc()

    def begun(self, kind: str) -> None:
        """Count a session."""
        self._sessions_begun.labels(kind).inc()

    def seen(
        self,
        *,
        sessions_open: int,
        nodes_up: int,
        nodes_down: int,
        nodes_full: int,
        nodes_out: int,
        layout_epoch: int,
        layouts_living: int,
        partitions_at_risk: int,
        is_steward: bool,
    ) -> None:
        """Take over what was counted; a full node counts as up too, and one that is out as down where it is."""
        self._sessions_open.set(sessions_open)
        for state, count in (("up", nodes_up), ("down", nodes_down), ("full", nodes_full), ("out", nodes_out)):
            self._nodes.labels(state).set(count)
        self._layout_epoch.set(layout_epoch)
        self._layouts_living.set(layouts_living)
        self._partitions_at_risk.set(partitions_at_risk)
        self._steward.set(is_steward)

    @contextmanager
    def barrier(self) -> Iterator[None]:
        """Time a barrier, however it ends."""
        began_s = self._clock.monotonic_s()
        try:
            yield
        finally:
            self._barrier_seconds.observe(self._clock.monotonic_s() - began_s)
