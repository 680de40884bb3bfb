"""Group commit: writers queue, one thread writes what has queued with large vectored writes and one sync, then answers.

The order of the queue is the order of the log, and it is decided under `lock`; so is every change of the table. While a
record is queued or being written it is *decided* but not durable: other writers build on it, readers do not see it.

Nothing is acknowledged before its sync. A write for which there is no space is taken back, fails alone, and the next
one may succeed. A sync that fails may have lost any page without ever telling again, so the engine then takes no more
writes until a restart has read back what the disk really holds.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import MIB
from holdfast_storagenode.segments.appender import Appender
from holdfast_storagenode.segments.observer import StoreObserver
from holdfast_storagenode.segments.record import RECORD_HEADER_BYTES, RecordFormat, RecordHeader, RecordType
from holdfast_storagenode.segments.table import BlockTable, Placed
from holdfast_storagenode.store import Verdict

GROUP_BYTES_MAX: Final = 64 * MIB

_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def uncancellable() -> Future[list[Verdict]]:
    """Return a future that a waiter cannot cancel: what is queued will be written, whoever still listens."""
    future: Future[list[Verdict]] = Future()
    future.set_running_or_notify_cancel()
    return future


@dataclass(slots=True, eq=False)
class PendingRecord:
    """A record whose place in the order is decided, and after its group's commit the error it met, if any.

    A record of stamps has no key of its own; `stamped` has those of the blocks that it names.
    """

    key: bytes
    header: RecordHeader
    payload: bytes | memoryview = b""
    stamped: Sequence[bytes] = ()
    error: HoldfastError | None = None


@dataclass(slots=True, eq=False)
class Ticket:
    """One batch: records to write, records of others that it builds on, and the answer once all are durable.

    `stamps` are written behind the other records. `size_bytes` is what the log grows by.
    """

    verdicts: list[Verdict] = field(default_factory=list)
    records: list[PendingRecord] = field(default_factory=list)
    stamps: list[PendingRecord] = field(default_factory=list)
    builds_on: list[PendingRecord] = field(default_factory=list)
    done: Future[list[Verdict]] = field(default_factory=uncancellable)
    size_bytes: int = 0

    def take(self, records: Collection[PendingRecord]) -> None:
        """Add records to write."""
        self.records.extend(records)
        self._grow(records)

    def take_stamps(self, records: Collection[PendingRecord]) -> None:
        """Add records of stamps to write."""
        self.stamps.extend(records)
        self._grow(records)

    def _grow(self, records: Collection[PendingRecord]) -> None:
        payload_bytes = sum([len(record.payload) for record in records])
        self.size_bytes += RECORD_HEADER_BYTES * len(records) + payload_bytes


class GroupCommitter:
    """The queue and its thread.

    Attributes:
        lock: guards the queue and the table's changes.
        sizes: length of each segment, as far as it is durable; guarded by `lock`.
        end: (segment, offset) up to which the table is true of the log; guarded by `lock`.
    """

    def __init__(
        self,
        *,
        table: BlockTable,
        appender: Appender,
        record_format: RecordFormat,
        sizes: dict[int, int],
        observer: StoreObserver,
        on_committed: Callable[[int], None],
    ) -> None:
        self.lock = threading.Condition()
        self.sizes = sizes
        self.end = appender.end
        self._table = table
        self._appender = appender
        self._format = record_format
        self._observer = observer
        self._on_committed = on_committed
        self._queue: deque[Ticket] = deque()
        self._decided: dict[bytes, PendingRecord] = {}
        self._stamping: dict[bytes, PendingRecord] = {}
        self._queued_bytes = 0
        self._failure: HoldfastError | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="group-commit", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether the disk refused to make something durable; there are no more writes then."""
        return self._failure is not None

    @property
    def queued_bytes(self) -> int:
        """Bytes that are decided but not durable yet."""
        return self._queued_bytes

    def decided(self, key: bytes) -> PendingRecord | None:
        """Return the last record of a key that is decided but not durable yet, stamps aside. Under the lock."""
        return self._decided.get(key)

    def stamping(self, key: bytes) -> PendingRecord | None:
        """Return the last record of stamps that names a key, decided after all else about it. Under the lock."""
        return self._stamping.get(key)

    def decides_any(self, keys: Sequence[bytes]) -> bool:
        """Return whether any of these has a record that `decided` would return. Under the lock."""
        return not self._decided.keys().isdisjoint(keys)

    def check_writable(self) -> None:
        """Return if writes are taken. Under the lock.

        Raises:
            HoldfastError: INTERNAL if the disk has failed; NOT_READY once the store is closing.
        """
        if self._failure is not None:
            raise self._failure
        if self._closing:
            raise HoldfastError(ErrorCode.NOT_READY, "this node is going down and takes no more writes")

    def enqueue(self, ticket: Ticket) -> None:
        """Take a batch into the order. Under the lock, after `check_writable`."""
        if self._stamping:
            # A new copy carries the stamp itself, and one that is removed has none.
            for record in ticket.records:
                if record.header.type is not RecordType.QUARANTINE:
                    self._stamping.pop(record.key, None)
        for record in ticket.stamps:
            self._stamping.update(dict.fromkeys(record.stamped, record))
        self._decided.update([(record.key, record) for record in ticket.records])
        self._queued_bytes += ticket.size_bytes
        self._queue.append(ticket)
        self.lock.notify()

    def close(self) -> None:
        """Commit what is queued, then end the thread and close the log; idempotent."""
        with self.lock:
            self._closing = True
            self.lock.notify()
        self._thread.join()
        self._appender.close()

    def _run(self) -> None:
        while tickets := self._next_group():
            self._commit(tickets)

    def _next_group(self) -> list[Ticket]:
        """Wait for work; return the batches of the next sync, or none when it is time to end."""
        with self.lock:
            while not self._queue and not self._closing:
                self.lock.wait()
            tickets: list[Ticket] = []
            size = 0
            while self._queue and (not tickets or size + self._queue[0].size_bytes <= GROUP_BYTES_MAX):
                ticket = self._queue.popleft()
                size += ticket.size_bytes
                tickets.append(ticket)
            return tickets

    def _commit(self, tickets: Sequence[Ticket]) -> None:
        started_s = time.perf_counter()
        records = [record for ticket in tickets for record in (*ticket.records, *ticket.stamps)]
        places: list[tuple[int, int]] = []
        # What the waiters get should this thread end by a fault of ours: never silence, never an acknowledgement.
        error: HoldfastError | None = HoldfastError(ErrorCode.INTERNAL, "the node's writer ended by a fault")
        try:
            places, error = self._make_durable(records) if self._failure is None else ([], self._failure)
        finally:
            self._settle(tickets, records, places, error)
        if error is None:
            size = sum([ticket.size_bytes for ticket in tickets])
            seconds = time.perf_counter() - started_s
            self._observer.committed(seconds=seconds, batches=len(tickets), records=len(records), size_bytes=size)
            stamped = sum([len(record.stamped) for ticket in tickets for record in ticket.stamps])
            if stamped:
                self._observer.stamped(blocks=stamped)
            self._on_committed(size)

    def _make_durable(self, records: Sequence[PendingRecord]) -> tuple[list[tuple[int, int]], HoldfastError | None]:
        """Write and sync. Returns the place of each record, or the error that all of them met."""
        if not records:
            return [], None
        try:
            pack = self._format.pack
            places = self._appender.append([(pack(record.header), record.payload) for record in records])
        except OSError as error:
            return [], self._taken_back(error)
        try:
            self._appender.sync()
        except OSError as error:
            failure = self._disk_failed(f"fdatasync: {error.strerror}")
            self._taken_back(error)
            return [], failure
        return places, None

    def _taken_back(self, cause: OSError) -> HoldfastError:
        """Cut away a group that could not be written and return the error for it."""
        try:
            self._appender.rollback()
        except OSError as error:
            return self._disk_failed(f"truncate: {error.strerror}")
        if cause.errno in _NO_SPACE:
            return HoldfastError(ErrorCode.DISK_FULL, "the node's disk is full; free space or add nodes")
        return self._disk_failed(f"write: {cause.strerror}")

    def _disk_failed(self, what: str) -> HoldfastError:
        if self._failure is None:
            self._observer.disk_failed(what=what)
            self._failure = HoldfastError(
                ErrorCode.INTERNAL,
                f"the node's disk failed ({what}); it takes no more writes until it is restarted",
                facts={"disk": "failed"},
            )
        return self._failure

    def _settle(
        self,
        tickets: Sequence[Ticket],
        records: Sequence[PendingRecord],
        places: Sequence[tuple[int, int]],
        error: HoldfastError | None,
    ) -> None:
        """Publish a group and answer its batches."""
        with self.lock:
            if error is not None and error.code is ErrorCode.INTERNAL and self._failure is None:
                self._failure = error
            if error is None and records:
                self._publish(records, places)
            decided, stamping = self._decided, self._stamping
            for record in records:
                record.error = error
                # A later batch may have decided about the same block meanwhile.
                if decided.get(record.key) is record:
                    del decided[record.key]
            for record in [record for ticket in tickets for record in ticket.stamps]:
                for key in record.stamped:
                    if stamping.get(key) is record:
                        del stamping[key]
            self._queued_bytes -= sum([ticket.size_bytes for ticket in tickets])
        for ticket in tickets:
            failure = error if ticket.records or ticket.stamps else None
            if failure is None:
                # Records of others that it builds on were in this group or in an earlier one, which may have failed.
                failure = next((record.error for record in ticket.builds_on if record.error is not None), None)
            if failure is not None:
                ticket.done.set_exception(failure)
            else:
                ticket.done.set_result(ticket.verdicts)

    def _publish(self, records: Sequence[PendingRecord], places: Sequence[tuple[int, int]]) -> None:
        placed: list[Placed] = []
        for record, (segment, offset) in zip(records, places, strict=True):
            if record.stamped:
                placed.extend([Placed(key, record.header, segment, offset) for key in record.stamped])
            else:
                placed.append(Placed(record.key, record.header, segment, offset))
        self._table.apply(placed)
        # In the order of the log, so the last record of each segment is the one that stays here.
        for last in {record.segment: record for record in placed}.values():
            self.sizes[last.segment] = last.offset + last.header.record_bytes
        self.end = self._appender.end
