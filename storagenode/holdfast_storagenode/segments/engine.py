"""The segment engine as a `BlockStore`: puts the modules beside it together.

Who may do what: `committer.lock` orders all decisions (is it present? is there space? is the copy still the one in
use?); reads take no lock; the committing thread alone writes segments; one checkpoint at a time writes the index.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_storagenode.segments.appender import Appender
from holdfast_storagenode.segments.checkpoint import CHECKPOINT_BYTES, CHECKPOINT_ENTRIES, Checkpointer
from holdfast_storagenode.segments.committer import GroupCommitter
from holdfast_storagenode.segments.compaction import Compaction
from holdfast_storagenode.segments.deciding import Decider
from holdfast_storagenode.segments.disk import Disk
from holdfast_storagenode.segments.files import SegmentFiles
from holdfast_storagenode.segments.index import (
    Entry,
    IndexDamagedError,
    make_key,
    make_keys,
    partition_range,
    split_key,
    tenant_range,
)
from holdfast_storagenode.segments.observer import StoreObserver
from holdfast_storagenode.segments.reading import Wanted, read_blocks
from holdfast_storagenode.segments.record import SEGMENT_BYTES_TARGET, RecordFormat
from holdfast_storagenode.segments.recovery import SUSPECT_NAME, Recovered, Recovery
from holdfast_storagenode.segments.space import Space
from holdfast_storagenode.store import BlockEntry, Found, Holding, PartitionOf, Sealed, StoreStatus, Verdict

LOOKUP_IDS_MAX: Final = 1024
DECIDED_IDS_MAX: Final = 4096

_SEGMENTS_NAME: Final = "segments"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How an engine is set up. Defaults are for production; tests make segments and bounds small.

    Attributes:
        capacity_bytes: bytes that segments may take; None for the whole file system.
        reserve_bytes: bytes of the file system to leave free; None for a twentieth, at most 1 GiB.
        segment_bytes: length at which a segment is finished and the next begun; less where the capacity is small.
        checkpoint_entries: changes after which the index is written.
        checkpoint_bytes: bytes of log after which the index is written.
    """

    capacity_bytes: int | None = None
    reserve_bytes: int | None = None
    segment_bytes: int = SEGMENT_BYTES_TARGET
    checkpoint_entries: int = CHECKPOINT_ENTRIES
    checkpoint_bytes: int = CHECKPOINT_BYTES


class SegmentStore:
    """Blocks in append-only segments below one directory, which the caller has locked."""

    def __init__(
        self,
        *,
        directory: Path,
        recovered: Recovered,
        files: SegmentFiles,
        record_format: RecordFormat,
        disk: Disk,
        space: Space,
        partition_of: PartitionOf,
        observer: StoreObserver,
        options: EngineOptions,
    ) -> None:
        """Use `open`."""
        self._directory = directory
        self._files = files
        self._disk = disk
        self._space = space
        self._partition_of = partition_of
        self._observer = observer
        self._index = recovered.index
        self._table = recovered.table
        self._checkpointer = Checkpointer(
            self._index, self._table, entries=options.checkpoint_entries, size_bytes=options.checkpoint_bytes
        )
        appender = Appender(
            files,
            disk,
            segment=recovered.segment,
            offset=recovered.offset,
            segment_bytes=space.segment_bytes(options.segment_bytes),
        )
        self._committer = GroupCommitter(
            table=self._table,
            appender=appender,
            record_format=record_format,
            sizes=recovered.sizes,
            observer=observer,
            on_committed=self._checkpointer.committed,
        )
        self._epochs = recovered.epochs
        self._decider = Decider(
            committer=self._committer,
            epochs=recovered.epochs,
            space=space,
            lookup=self._lookup,
            partition_of=partition_of,
        )
        self._compaction = Compaction(
            files=files,
            disk=disk,
            record_format=record_format,
            committer=self._committer,
            table=self._table,
            partition_of=partition_of,
            observer=observer,
            checkpoint=self._checkpointer.write,
        )
        self._compacting = threading.Lock()
        self._stuck_segments: set[int] = set()
        self._closed = False

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        incarnation: bytes,
        partition_of: PartitionOf,
        options: EngineOptions | None = None,
        disk: Disk | None = None,
        observer: StoreObserver | None = None,
    ) -> SegmentStore:
        """Open or make the store in `directory`: judge the index, replay and verify the log's end, cut a torn tail.

        `incarnation` is the directory's own 16 random bytes. `partition_of` must be the same at every opening.

        Raises:
            HoldfastError: INTERNAL if the disk cannot be read or made durable.
        """
        options = options if options is not None else EngineOptions()
        disk = disk if disk is not None else Disk()
        observer = observer if observer is not None else StoreObserver()
        try:
            segments = directory / _SEGMENTS_NAME
            segments.mkdir(exist_ok=True)
            space = Space.of(
                directory, disk, capacity_bytes=options.capacity_bytes, reserve_bytes=options.reserve_bytes
            )
            record_format = RecordFormat(incarnation)
            files = SegmentFiles(segments, record_format, disk)
            recovered = Recovery(
                directory=directory,
                files=files,
                record_format=record_format,
                disk=disk,
                partition_of=partition_of,
                observer=observer,
                map_bytes=2 * space.capacity_bytes,
                checkpoint_entries=options.checkpoint_entries,
            ).run()
        except (OSError, IndexDamagedError) as error:
            raise HoldfastError(ErrorCode.INTERNAL, f"the store in {directory} cannot be opened: {error}") from error
        store = cls(
            directory=directory,
            recovered=recovered,
            files=files,
            record_format=record_format,
            disk=disk,
            space=space,
            partition_of=partition_of,
            observer=observer,
            options=options,
        )
        store._start()
        if recovered.rebuilt:
            # Before any epoch is learnt: the next start must not take this index for one that was lost.
            store.checkpoint()
        return store

    @staticmethod
    def capacity_of(directory: Path, options: EngineOptions) -> int:
        """Return the bytes that a store in `directory` would offer, without opening it."""
        return Space.of(
            directory, Disk(), capacity_bytes=options.capacity_bytes, reserve_bytes=options.reserve_bytes
        ).capacity_bytes

    def put(self, tenant: int, blocks: Sequence[Sealed], *, stamp: int = 0) -> list[Verdict]:
        """See `BlockStore.put`."""
        return self.submit(tenant, blocks, stamp=stamp).result()

    def submit(self, tenant: int, blocks: Sequence[Sealed], *, stamp: int = 0) -> Future[list[Verdict]]:
        """See `SubmittingStore.submit`. A present copy that is known to be corrupt is replaced.

        Raises:
            HoldfastError: DISK_FULL; INTERNAL if the disk failed.
        """
        return self._decider.put(tenant, blocks, stamp=stamp)

    def get(self, tenant: int, ids: Sequence[bytes], *, bytes_max: int) -> list[Found]:
        """See `BlockStore.get`."""
        while True:
            taken, entries = self._take(tenant, ids[:LOOKUP_IDS_MAX], bytes_max)
            found: list[Found] = [Verdict.MISSING if entry is None else Verdict.CORRUPT for entry in entries]
            wanted = [
                Wanted(at, block_id, entry)
                for at, (block_id, entry) in enumerate(zip(taken, entries, strict=True))
                if entry is not None and not entry.quarantined
            ]
            try:
                for item, block in read_blocks(self._files, self._disk, wanted):
                    if block is None:
                        self._quarantine(tenant, item)
                    else:
                        found[item.at] = block
            except FileNotFoundError:
                # Compaction moved what was looked up a moment ago; the table knows where by now.
                continue
            return found

    def has(self, tenant: int, ids: Sequence[bytes], *, verify: bool = False, stamp: int = 0) -> list[Verdict]:
        """See `BlockStore.has`. A stamp counts what is being written as found, and waits for it.

        Raises:
            HoldfastError: with a stamp as `put`.
        """
        verdicts: list[Verdict] = []
        while verify and len(verdicts) < len(ids):
            found = self.get(tenant, ids[len(verdicts) :], bytes_max=1 << 22)
            verdicts.extend(item if isinstance(item, Verdict) else Verdict.OK for item in found)
        if stamp:
            looked_at = verdicts if verify else [Verdict.OK] * len(ids)
            return _gather(
                self._decider.stamp(tenant, ids[part], looked_at[part], stamp=stamp) for part in _parts(len(ids))
            )
        if not verify:
            for entry in self._entries(tenant, ids):
                present = Verdict.CORRUPT if entry is not None and entry.quarantined else Verdict.OK
                verdicts.append(Verdict.MISSING if entry is None else present)
        return verdicts

    def kinds(self, tenant: int, ids: Sequence[bytes]) -> list[int | None]:
        """See `BlockStore.kinds`."""
        return [None if entry is None else entry.kind for entry in self._entries(tenant, ids)]

    def delete(self, tenant: int, ids: Sequence[bytes], *, cutoff: int | None = None) -> list[Verdict]:
        """See `BlockStore.delete`.

        Raises:
            HoldfastError: CONFLICT, NOT_READY; DISK_FULL; INTERNAL if the disk failed.
        """
        return _gather(self._decider.delete(tenant, ids[part], cutoff=cutoff) for part in _parts(len(ids)))

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
        low, high = tenant_range(tenant) if partition is None else partition_range(tenant, partition)
        if end is not None:
            _, high = partition_range(tenant, end - 1)
        if after:
            at = self._partition_of(after) if partition is None or end is not None else partition
            low = max(low, make_key(tenant, at, after) + b"\0")
        with self._trusting(), self._committer.lock:
            listed = self._table.range(low, high, limit, with_quarantined=with_quarantined)
        counted = self._epochs.state.counted
        return [
            BlockEntry(split_key(key)[2], entry.length, entry.kind, counted(key, entry.stamp), entry.quarantined)
            for key, entry in listed
        ]

    def tenants(self) -> list[int]:
        """See `BlockStore.tenants`."""
        with self._committer.lock:
            return sorted(self._table.totals.tenants)

    def holdings(self, partition: int) -> list[Holding]:
        """See `BlockStore.holdings`. Counted once, then kept up with every change."""
        with self._trusting():
            return self._table.holdings.of(partition, self._committer.lock, self._table.whole_keys)

    def quarantined(self, *, limit: int) -> list[tuple[int, bytes]]:
        """See `BlockStore.quarantined`."""
        with self._trusting(), self._committer.lock:
            places = [split_key(key) for key in self._table.quarantined(limit)]
        return [(tenant, block_id) for tenant, _, block_id in places]

    @property
    def epoch(self) -> int:
        """See `BlockStore.epoch`."""
        return self._epochs.state.epoch

    def learn_epoch(self, epoch: int) -> None:
        """See `BlockStore.learn_epoch`.

        Raises:
            HoldfastError: DISK_FULL, INTERNAL.
        """
        self._epochs.learn(epoch)

    def raise_floor(self, partitions: Sequence[int], epoch: int) -> None:
        """See `BlockStore.raise_floor`.

        Raises:
            HoldfastError: DISK_FULL, INTERNAL.
        """
        self._epochs.raise_floor(partitions, epoch)

    def status(self) -> StoreStatus:
        """See `BlockStore.status`."""
        with self._committer.lock:
            used = self._used_bytes()
            totals = self._table.totals
            counts = (totals.block_count, totals.quarantined_count)
        return StoreStatus(
            capacity_bytes=self._space.capacity_bytes,
            used_bytes=used,
            free_bytes=self._space.free_bytes(used),
            block_count=counts[0],
            quarantined_count=counts[1],
            full=self._space.is_full(used),
            failed=self._committer.failed,
        )

    def compact(self, *, dead_fraction_min: float) -> int:
        """See `CompactingStore.compact`."""
        with self._compacting:
            segment = self._compaction.choose(dead_fraction_min=dead_fraction_min, passed_over=self._stuck_segments)
            if segment is None:
                return 0
            freed = self._compaction.run(segment)
            if segment in self._committer.sizes:
                self._stuck_segments.add(segment)
            return freed

    def checkpoint(self) -> bool:
        """Write the index now; returns whether it was taken."""
        return self._checkpointer.write()

    def close(self) -> None:
        """See `BlockStore.close`: commit what is queued, write a last checkpoint, release the files."""
        if self._closed:
            return
        self._closed = True
        self._committer.close()
        self._checkpointer.close()
        self._checkpointer.write()
        self._index.close()
        self._files.close()

    def _start(self) -> None:
        self._checkpointer.start(self._committer)
        self._committer.start()

    def _used_bytes(self) -> int:
        return sum(self._committer.sizes.values())

    def _entries(self, tenant: int, ids: Sequence[bytes]) -> list[Entry | None]:
        return self._lookup(make_keys(tenant, self._partition_of, ids))

    def _lookup(self, keys: Sequence[bytes]) -> list[Entry | None]:
        with self._trusting():
            return self._table.lookup(keys)

    @contextmanager
    def _trusting(self) -> Iterator[None]:
        """Remember an index that was caught lying, for the next start, and tell the caller."""
        try:
            yield
        except IndexDamagedError as error:
            (self._directory / SUSPECT_NAME).touch()
            raise HoldfastError(
                ErrorCode.INTERNAL, "the node's index is damaged; restart the node, it rebuilds it from the blocks"
            ) from error

    def _take(self, tenant: int, ids: Sequence[bytes], bytes_max: int) -> tuple[Sequence[bytes], list[Entry | None]]:
        """Return the ids, and their entries, that one answer of `bytes_max` bytes holds; at least one."""
        entries = self._entries(tenant, ids)
        size = 0
        for at, entry in enumerate(entries):
            size += 0 if entry is None or entry.quarantined else entry.length
            if size > bytes_max and at:
                return ids[:at], entries[:at]
        return ids, entries

    def _quarantine(self, tenant: int, item: Wanted) -> None:
        if self._decider.quarantine(tenant, item):
            place = item.entry
            self._observer.quarantined(
                tenant=tenant, block_id=item.block_id, segment=place.segment, offset=place.offset
            )


def _parts(count: int) -> Iterator[slice]:
    """Yield what to decide at once, at least one part: others get the lock in between."""
    return (slice(at, at + DECIDED_IDS_MAX) for at in range(0, max(count, 1), DECIDED_IDS_MAX))


def _gather(answers: Iterable[Future[list[Verdict]]]) -> list[Verdict]:
    """Decide everything, so that it shares syncs, then wait for all of it."""
    return [verdict for answer in list(answers) for verdict in answer.result()]
