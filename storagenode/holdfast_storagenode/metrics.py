"""What a storage node counts, and the engine's events as log lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from holdfast_core.model.limits import KIB, MIB
from holdfast_core.runtime.logs import Log
from holdfast_core.runtime.metrics import SYNC_SECONDS_BUCKETS
from holdfast_storagenode.healing.status import HealingStatus
from holdfast_storagenode.segments.observer import StoreObserver
from holdfast_storagenode.store import StoreStatus

_COUNT_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_BYTES_BUCKETS: Final = (4 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 32 * MIB, 64 * MIB)


class NodeMetrics(StoreObserver):
    """Counters of traffic and of the engine; gauges that ask the store when they are scraped."""

    def __init__(self, registry: CollectorRegistry, log: Log) -> None:
        """Register the metrics in `registry`."""
        self._log = log
        self._registry = registry
        self._on_quarantined: Callable[[int, bytes], object] = lambda tenant, block_id: None
        self._blocks = Counter(
            "holdfast_node_blocks",
            "Blocks received (in), sent (out), received though present already (deduplicated), and given to "
            "other nodes (to_peers) or handed over by them (from_peers).",
            ("direction",),
            registry=registry,
        )
        self._bytes = Counter("holdfast_node_bytes", "Sealed bytes of those blocks.", ("direction",), registry=registry)
        self._refused = Counter(
            "holdfast_node_refused_batches", "Put batches refused, by error code.", ("code",), registry=registry
        )
        self._commit_seconds = Histogram(
            "holdfast_node_group_commit_seconds",
            "Time to write and sync one group of batches.",
            buckets=SYNC_SECONDS_BUCKETS,
            registry=registry,
        )
        self._commit_batches = Histogram(
            "holdfast_node_group_commit_batches",
            "Batches that shared one sync.",
            buckets=_COUNT_BUCKETS,
            registry=registry,
        )
        self._commit_bytes = Histogram(
            "holdfast_node_group_commit_bytes", "Bytes of one sync.", buckets=_BYTES_BUCKETS, registry=registry
        )
        self._stamped = Counter(
            "holdfast_node_stamped_blocks",
            "Blocks that were there already and were stamped with a newer collection epoch.",
            registry=registry,
        )
        self._found_corrupt = Counter(
            "holdfast_node_corrupt_found", "Copies whose bytes were found not to match their id.", registry=registry
        )
        self._tails = Counter("holdfast_node_torn_tails", "Torn tails cut at start.", registry=registry)
        self._tail_bytes = Counter("holdfast_node_torn_tail_bytes", "Bytes of torn tails.", registry=registry)
        self._gaps = Counter("holdfast_node_segment_gaps", "Damaged ranges between records.", registry=registry)
        self._rebuilds = Counter("holdfast_node_index_rebuilds", "Indexes made anew at start.", registry=registry)
        self._failures = Counter("holdfast_node_disk_failures", "Writes that the disk refused.", registry=registry)
        self._freed = Counter("holdfast_node_compacted_bytes", "Bytes that compaction freed.", registry=registry)

    def watch_store(self, status: Callable[[], StoreStatus]) -> None:
        """Register gauges that call `status` at each scrape."""
        for name, text, value in (
            ("capacity_bytes", "Bytes that segments may take.", lambda: status().capacity_bytes),
            ("used_bytes", "Bytes that segments take.", lambda: status().used_bytes),
            ("free_bytes", "Bytes free for blocks, the reserve taken off.", lambda: status().free_bytes),
            ("stored_blocks", "Blocks held.", lambda: status().block_count),
            ("quarantined_blocks", "Blocks set aside because they are corrupt.", lambda: status().quarantined_count),
            ("full", "1 while writes are refused for want of space.", lambda: float(status().full)),
            ("failed", "1 once the disk refused to make a write durable.", lambda: float(status().failed)),
        ):
            Gauge(f"holdfast_node_{name}", text, registry=self._registry).set_function(value)

    def watch_healing(self, healing: HealingStatus) -> None:
        """Register figures of repair, sync and scrubbing, which are read at each scrape."""
        self._registry.register(_HealingCollector(healing))

    def on_quarantined(self, heard: Callable[[int, bytes], object]) -> None:
        """Let `heard(tenant, block_id)` know of copies that are set aside; it is called from the store's threads."""
        self._on_quarantined = heard

    def moved(self, direction: str, *, blocks: int, size_bytes: int) -> None:
        """Count blocks; `direction` is "in", "out", "deduplicated", "to_peers" or "from_peers"."""
        self._blocks.labels(direction).inc(blocks)
        self._bytes.labels(direction).inc(size_bytes)

    def refused(self, code: str) -> None:
        """Count a put batch that was refused."""
        self._refused.labels(code).inc()

    def committed(self, *, seconds: float, batches: int, records: int, size_bytes: int) -> None:
        """See `StoreObserver`."""
        self._commit_seconds.observe(seconds)
        self._commit_batches.observe(batches)
        self._commit_bytes.observe(size_bytes)

    def stamped(self, *, blocks: int) -> None:
        """See `StoreObserver`."""
        self._stamped.inc(blocks)

    def stamps_unknown(self, *, reason: str) -> None:
        """See `StoreObserver`."""
        self._log.warning("stamps unknown until the collection epoch is learnt", reason=reason)

    def quarantined(self, *, tenant: int, block_id: bytes, segment: int, offset: int) -> None:
        """See `StoreObserver`."""
        self._found_corrupt.inc()
        self._log.error("quarantined", tenant=tenant, block=block_id.hex(), segment=segment, offset=offset)
        self._on_quarantined(tenant, block_id)

    def tail_cut(self, *, segment: int, offset: int, size_bytes: int) -> None:
        """See `StoreObserver`."""
        self._tails.inc()
        self._tail_bytes.inc(size_bytes)
        self._log.warning("torn tail cut", segment=segment, offset=offset, size_bytes=size_bytes)

    def gap_found(self, *, segment: int, offset: int, size_bytes: int) -> None:
        """See `StoreObserver`."""
        self._gaps.inc()
        self._log.error("damaged range in segment", segment=segment, offset=offset, size_bytes=size_bytes)

    def index_rebuilt(self, *, reason: str, blocks: int) -> None:
        """See `StoreObserver`."""
        self._rebuilds.inc()
        self._log.warning("index rebuilt", reason=reason, blocks=blocks)

    def replayed(self, *, records: int, size_bytes: int) -> None:
        """See `StoreObserver`."""
        self._log.info("log replayed", records=records, size_bytes=size_bytes)

    def disk_failed(self, *, what: str) -> None:
        """See `StoreObserver`."""
        self._failures.inc()
        self._log.error("disk failed; no more writes until a restart", what=what)

    def compacted(self, *, segment: int, freed_bytes: int) -> None:
        """See `StoreObserver`."""
        self._freed.inc(freed_bytes)
        self._log.info("segment compacted", segment=segment, freed_bytes=freed_bytes)


class _HealingCollector(Collector):
    """Turns the figures of healing into metrics at each scrape."""

    def __init__(self, healing: HealingStatus) -> None:
        self._healing = healing

    def collect(self) -> Iterator[Metric]:
        healing = self._healing
        for name, text, count in (
            ("repaired_blocks", "Blocks that came from peers.", healing.repaired_blocks),
            ("repaired_bytes", "Sealed bytes of those blocks.", healing.repaired_bytes),
            ("wrong_from_peers", "Blocks that peers sent with bytes that are not theirs.", healing.wrong_blocks),
            ("dropped_blocks", "Blocks of others that this node let go of.", healing.dropped_blocks),
            ("handed_blocks", "Blocks that this node handed to owners.", healing.handed_blocks),
        ):
            yield CounterMetricFamily(f"holdfast_node_{name}", text, value=count)
        for name, text, figure in (
            ("synced_epoch", "Newest layout epoch that the node has synced.", healing.synced_epoch),
            ("partitions", "Partitions owned in the newest layout.", healing.partitions),
            ("partitions_synced", "Those of them that are synced.", healing.partitions_synced),
            ("partitions_at_risk", "Those that too few old owners answer for.", healing.partitions_at_risk),
            ("foreign_blocks", "Blocks of partitions owned in no living layout.", healing.foreign_blocks),
            ("unrepaired_blocks", "Blocks that no peer could give.", healing.unrepaired_count),
            ("scrub_ratio", "Share of blocks that this round of scrubbing has read.", healing.scrub_permille / 1000),
            ("scrubbed_seconds", "Unix time of the end of the last round.", healing.scrubbed_unix_ms / 1000),
        ):
            yield GaugeMetricFamily(f"holdfast_node_{name}", text, value=figure)
