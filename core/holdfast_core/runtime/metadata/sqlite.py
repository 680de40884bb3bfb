"""The embedded metadata store: SQLite in one file, for one machine and exactly one coordinator.

Invariants:
    * A transaction is on disk (WAL, synchronous=FULL) before it is answered and before a watch shows it.
    * One thread owns the connection and runs jobs one after another, so every job sees and makes a consistent state.
      `SqliteStore._run` is the only place that crosses into it. A job that has begun runs to its end even if its caller
      is cancelled, and is published by the thread itself, so watches never miss what was committed.
    * Leases run on the injected monotonic clock. Only their terms are stored: after a restart each has a full one.
      Lapsed leases end before any other job looks at the store, and without any job by `_expire_leases`.

After an I/O error nobody knows what the disk holds, so the store refuses all further work until it is opened anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import sqlite3
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.metadata.checks import (
    check_page,
    check_ttl,
    check_txn,
    covering_prefixes,
    holds,
    key_bytes,
    prefix_bytes,
    range_end,
)
from holdfast_core.runtime.metadata.filelock import FileLock
from holdfast_core.runtime.metadata.hub import WatchHub
from holdfast_core.runtime.metadata.store import (
    OUTCOME_FACT,
    OUTCOME_UNAPPLIED,
    OUTCOME_UNKNOWN,
    Condition,
    Delete,
    KeyValue,
    Operation,
    Put,
    Snapshot,
    TxnResult,
    WatchBatch,
)
from holdfast_core.runtime.metadata.terms import LeaseTerms

IN_MEMORY: Final = ":memory:"

_APPLICATION_ID: Final = int.from_bytes(b"HFMD", "big")
_SCHEMA_VERSION: Final = 1
_SCHEMA: Final = (
    "CREATE TABLE items (key BLOB PRIMARY KEY NOT NULL, value BLOB NOT NULL, create_revision INTEGER NOT NULL,"
    " mod_revision INTEGER NOT NULL, lease_id INTEGER NOT NULL)",
    "CREATE INDEX items_by_lease ON items (lease_id) WHERE lease_id != 0",
    # AUTOINCREMENT: an id that ended must never come back for somebody else.
    "CREATE TABLE leases (id INTEGER PRIMARY KEY AUTOINCREMENT, ttl_s REAL NOT NULL)",
    "CREATE TABLE store (revision INTEGER NOT NULL)",
    # As in etcd, an empty store is at revision 1, so that 0 can stand for "does not exist".
    "INSERT INTO store VALUES (1)",
    f"PRAGMA application_id = {_APPLICATION_ID}",
    f"PRAGMA user_version = {_SCHEMA_VERSION}",
)
_COLUMNS: Final = "key, value, create_revision, mod_revision, lease_id"
_FULL_DISK_RETRY_S: Final = 1.0

_Row = tuple[bytes, bytes, int, int, int]
_T = TypeVar("_T")


def _item(row: _Row) -> KeyValue:
    key, value, create_revision, mod_revision, lease_id = row
    return KeyValue(key.decode(), value, create_revision, mod_revision, lease_id)


def _within(prefix: bytes, after: bytes = b"") -> tuple[str, tuple[bytes, ...]]:
    """Return the condition for keys below a prefix that sort behind `after`, and its parameters.

    One plain bound on each side: with anything else SQLite reads on to the end of the table.
    """
    low = ("key > ?", after) if after >= prefix and after else ("key >= ?", prefix)
    end = range_end(prefix)
    return (f"{low[0]} AND key < ?", (low[1], end)) if end else (low[0], (low[1],))


def _connect(path: str) -> sqlite3.Connection:
    # No waiting for other users of the file: after the lock above there is none but by mistake.
    connection = sqlite3.connect(path, timeout=0, isolation_level=None)
    try:
        # Exclusive: a stray tool that wrote to the file would change it behind the watches.
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        (application_id,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if not tables:
            connection.execute("BEGIN IMMEDIATE")
            for statement in _SCHEMA:
                connection.execute(statement)
            connection.execute("COMMIT")
        elif (application_id, version) != (_APPLICATION_ID, _SCHEMA_VERSION):
            raise HoldfastError(
                ErrorCode.MISMATCH,
                f"{path} is not a metadata store that this version can read (schema {version}, wanted"
                f" {_SCHEMA_VERSION}); use the version of Holdfast that made it, or another directory",
            )
    except BaseException:
        connection.close()
        raise
    return connection


class _Tables:
    """The synchronous engine; lives in one thread."""

    def __init__(self, connection: sqlite3.Connection, monotonic_s: Callable[[], float]) -> None:
        self._connection = connection
        (self._revision,) = connection.execute("SELECT revision FROM store").fetchone()
        self.leases = LeaseTerms(dict(connection.execute("SELECT id, ttl_s FROM leases").fetchall()), monotonic_s)
        self._published: list[WatchBatch] = []
        self._scans = itertools.count()

    def close(self) -> None:
        self._connection.close()

    def take_batches(self) -> list[WatchBatch]:
        """Return the changes committed since the last call, oldest first."""
        batches, self._published = self._published, []
        return batches

    def get(self, key: bytes) -> KeyValue | None:
        row = self._connection.execute(f"SELECT {_COLUMNS} FROM items WHERE key = ?", (key,)).fetchone()
        return None if row is None else _item(row)

    def snapshot(self, prefixes: Sequence[bytes]) -> Snapshot:
        items: list[KeyValue] = []
        for prefix in prefixes:
            items += self._range(prefix, after=b"", limit=-1)
        return Snapshot(self._revision, tuple(items))

    def page(self, prefix: bytes, *, after: bytes, limit: int) -> Snapshot:
        items = self._range(prefix, after=after, limit=limit + 1)
        return Snapshot(self._revision, tuple(items[:limit]), more=len(items) > limit)

    def _range(self, prefix: bytes, *, after: bytes, limit: int) -> list[KeyValue]:
        where, bounds = _within(prefix, after)
        query = f"SELECT {_COLUMNS} FROM items WHERE {where} ORDER BY key LIMIT ?"
        return [_item(row) for row in self._connection.execute(query, (*bounds, limit))]

    def begin_scan(self, prefixes: Sequence[bytes]) -> tuple[str, int]:
        """Copy what lies below the prefixes into a table of its own; return its name and the revision.

        A temporary table is a file that vanishes with the connection, so what is scanned never has to fit into memory.
        A second connection could hold a snapshot without copying, but the file is locked against others for good.
        """
        name = f"scan_{next(self._scans)}"
        self._connection.execute(
            f"CREATE TEMP TABLE {name} (key BLOB PRIMARY KEY NOT NULL, value BLOB NOT NULL, create_revision INTEGER,"
            " mod_revision INTEGER, lease_id INTEGER) WITHOUT ROWID"
        )
        for prefix in prefixes:
            where, bounds = _within(prefix)
            self._connection.execute(f"INSERT INTO temp.{name} SELECT {_COLUMNS} FROM items WHERE {where}", bounds)
        return name, self._revision

    def scanned(self, name: str, *, after: bytes, limit: int) -> list[KeyValue]:
        rows = self._connection.execute(
            f"SELECT {_COLUMNS} FROM temp.{name} WHERE key > ?1 ORDER BY key LIMIT ?2", (after, limit)
        )
        return [_item(row) for row in rows]

    def end_scan(self, name: str) -> None:
        self._connection.execute(f"DROP TABLE temp.{name}")

    def txn(self, conditions: Sequence[Condition], operations: Sequence[Operation]) -> TxnResult:
        if not all(map(self._holds, conditions)):
            return TxnResult(False, self._revision)
        for operation in operations:
            if isinstance(operation, Put) and operation.lease_id and operation.lease_id not in self.leases:
                raise HoldfastError(
                    ErrorCode.NOT_FOUND,
                    f"the lease {operation.lease_id} of {operation.key!r} has ended",
                    facts={OUTCOME_FACT: OUTCOME_UNAPPLIED},
                )
        if operations:
            with self._transaction():
                batch = self._apply(operations)
            self._commit_batch(batch)
        return TxnResult(True, self._revision)

    def _holds(self, condition: Condition) -> bool:
        row = self._connection.execute(
            "SELECT create_revision, mod_revision FROM items WHERE key = ?", (condition.key.encode(),)
        ).fetchone()
        create_revision, mod_revision = row or (0, 0)
        return holds(condition, create_revision=create_revision, mod_revision=mod_revision)

    def _apply(self, operations: Sequence[Operation]) -> WatchBatch:
        revision = self._revision + 1
        puts: list[KeyValue] = []
        deletes: list[str] = []
        for operation in operations:
            key = operation.key.encode()
            if isinstance(operation, Put):
                row = self._connection.execute(
                    "INSERT INTO items VALUES (?1, ?2, ?3, ?3, ?4)"
                    " ON CONFLICT (key) DO UPDATE SET value = excluded.value,"
                    f" mod_revision = excluded.mod_revision, lease_id = excluded.lease_id RETURNING {_COLUMNS}",
                    (key, operation.value, revision, operation.lease_id),
                ).fetchone()
                puts.append(_item(row))
            elif self._connection.execute("DELETE FROM items WHERE key = ?", (key,)).rowcount:
                deletes.append(operation.key)
        if puts or deletes:
            self._connection.execute("UPDATE store SET revision = ?", (revision,))
        return WatchBatch(revision, tuple(puts), tuple(deletes))

    def _commit_batch(self, batch: WatchBatch) -> None:
        """Take over in memory what a transaction has just made durable."""
        if batch.puts or batch.deletes:
            self._revision = batch.revision
            self._published.append(batch)

    def grant(self, ttl_s: float) -> int:
        with self._transaction():
            cursor = self._connection.execute("INSERT INTO leases (ttl_s) VALUES (?)", (ttl_s,))
        lease_id = cursor.lastrowid
        if lease_id is None:
            raise HoldfastError(ErrorCode.INTERNAL, "SQLite gave a new lease no id")
        self.leases.add(lease_id, ttl_s)
        return lease_id

    def revoke(self, lease_id: int) -> None:
        if lease_id not in self.leases:
            return
        with self._transaction():
            rows = self._connection.execute("SELECT key FROM items WHERE lease_id = ? ORDER BY key", (lease_id,))
            batch = self._apply([Delete(key.decode()) for (key,) in rows.fetchall()])
            self._connection.execute("DELETE FROM leases WHERE id = ?", (lease_id,))
        self._commit_batch(batch)
        self.leases.remove(lease_id)

    def end_lapsed_leases(self) -> None:
        """Revoke the leases whose term is over, each at a revision of its own."""
        for lease_id in self.leases.lapsed():
            self.revoke(lease_id)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise


class SqliteStore:
    """The embedded engine as a `MetadataStore`; made by `open`."""

    def __init__(self, path: str, clock: Clock) -> None:
        """Take the names in; `open` does the rest."""
        self._path = path
        self._clock = clock
        self._hub = WatchHub()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="metadata")
        self._loop = asyncio.get_running_loop()
        self._lock: FileLock | None = None
        self._tables: _Tables | None = None
        self._failed = False
        self._lease_granted = asyncio.Event()
        self._expiry: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, path: Path | str, clock: Clock) -> SqliteStore:
        """Open the store in the file `path`, making it if it does not exist, or one in memory for ":memory:".

        Raises:
            HoldfastError: BUSY if another process has it open; MISMATCH or CORRUPT if the file is something else;
                INVALID_ARGUMENT if the file cannot be opened; DISK_FULL.
        """
        store = cls(str(path), clock)
        try:
            await store._run(store._open_tables)
        except BaseException:
            store._thread.shutdown()
            raise
        store._expiry = asyncio.create_task(store._expire_leases(), name="metadata-leases")
        return store

    async def get(self, key: str) -> KeyValue | None:
        """See `MetadataStore.get`."""
        name = key_bytes(key)
        return await self._on_tables(lambda tables: tables.get(name))

    async def snapshot(self, prefixes: Sequence[str]) -> Snapshot:
        """See `MetadataStore.snapshot`."""
        covering = covering_prefixes(prefixes)
        return await self._on_tables(lambda tables: tables.snapshot(covering))

    async def page(self, prefix: str, *, after: str, limit: int) -> Snapshot:
        """See `MetadataStore.page`."""
        check_page(limit=limit)
        start, behind = prefix_bytes(prefix), prefix_bytes(after)
        return await self._on_tables(lambda tables: tables.page(start, after=behind, limit=limit))

    async def scan(self, prefixes: Sequence[str], *, page_items: int) -> AsyncGenerator[Snapshot, None]:
        """See `MetadataStore.scan`. Here the items are copied once, before the first page."""
        check_page(limit=page_items)
        covering = covering_prefixes(prefixes)
        name, revision = await self._on_tables(lambda tables: tables.begin_scan(covering))
        try:
            after, more = b"", True
            while more:
                items = await self._on_tables(partial(_Tables.scanned, name=name, after=after, limit=page_items + 1))
                more = len(items) > page_items
                yield Snapshot(revision, tuple(items[:page_items]), more=more)
                after = items[-1 - more].key.encode() if items else after
        finally:
            if self._tables is not None and not self._failed:
                await self._on_tables(lambda tables: tables.end_scan(name))

    async def txn(self, conditions: Sequence[Condition], operations: Sequence[Operation]) -> TxnResult:
        """See `MetadataStore.txn`. Here an outcome is unknown only after an I/O error of the disk."""
        check_txn(conditions, operations)
        return await self._on_tables(lambda tables: tables.txn(conditions, operations))

    async def watch(self, prefix: str) -> AsyncGenerator[WatchBatch, None]:
        """See `MetadataStore.watch`."""
        start = prefix_bytes(prefix)
        subscription = self._hub.subscribe(prefix)
        try:
            while not subscription.ended:
                # Subscribed before listing, so nothing falls between; what the listing holds already is left out below.
                subscription.restart()
                listing = await self._on_tables(lambda tables: tables.snapshot([start]))
                yield WatchBatch(listing.revision, listing.items, (), relisted=True)
                while (batch := await subscription.next_batch()) is not None:
                    if batch.revision > listing.revision:
                        yield batch
        finally:
            self._hub.unsubscribe(subscription)

    async def grant_lease(self, ttl_s: float) -> int:
        """See `MetadataStore.grant_lease`."""
        check_ttl(ttl_s)
        lease_id = await self._on_tables(lambda tables: tables.grant(ttl_s))
        self._lease_granted.set()
        return lease_id

    async def keep_lease(self, lease_id: int) -> float:
        """See `MetadataStore.keep_lease`."""
        return await self._on_tables(lambda tables: tables.leases.keep(lease_id))

    async def lease_left(self, lease_id: int) -> float:
        """See `MetadataStore.lease_left`."""
        return await self._on_tables(lambda tables: tables.leases.left_s(lease_id))

    async def revoke_lease(self, lease_id: int) -> None:
        """See `MetadataStore.revoke_lease`."""
        await self._on_tables(lambda tables: tables.revoke(lease_id))

    async def close(self) -> None:
        """Finish what has begun, close the file and give up its lock."""
        tables, self._tables = self._tables, None
        if tables is None:
            return
        self._hub.close()
        if self._expiry is not None:
            self._expiry.cancel()
            await asyncio.wait([self._expiry])
        try:
            await self._run(tables.close)
        finally:
            self._thread.shutdown()
            if self._lock is not None:
                self._lock.release()

    async def _expire_leases(self) -> None:
        """End leases as their terms run out, so that watchers learn of it while nobody else asks for anything."""
        while True:
            self._lease_granted.clear()
            try:
                deadline_s = await self._on_tables(lambda tables: tables.leases.next_deadline_s())
            except HoldfastError as error:
                if error.code is not ErrorCode.DISK_FULL:
                    return  # The store has failed, and says so to everybody who asks.
                deadline_s = self._clock.monotonic_s() + _FULL_DISK_RETRY_S
            await self._until_deadline_or_grant(deadline_s)

    async def _until_deadline_or_grant(self, deadline_s: float | None) -> None:
        waits: list[asyncio.Task[object]] = [asyncio.create_task(self._lease_granted.wait())]
        if deadline_s is not None:
            waits.append(asyncio.create_task(self._sleep_until(deadline_s)))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.wait(waits)

    async def _sleep_until(self, deadline_s: float) -> None:
        """Sleep; what is left is read when the task begins, as time may have passed since it was made."""
        await self._clock.sleep(deadline_s - self._clock.monotonic_s())

    async def _on_tables(self, job: Callable[[_Tables], _T]) -> _T:
        tables = self._tables
        if tables is None:
            raise HoldfastError(
                ErrorCode.UNREACHABLE, "the metadata store is closed", facts={OUTCOME_FACT: OUTCOME_UNAPPLIED}
            )
        return await self._run(lambda: self._perform(tables, job))

    async def _run(self, job: Callable[[], _T]) -> _T:
        """Run the job on the store's own thread: the one crossing between the event loop and blocking work."""
        return await self._loop.run_in_executor(self._thread, job)

    def _perform(self, tables: _Tables, job: Callable[[_Tables], _T]) -> _T:
        if self._failed:
            raise HoldfastError(
                ErrorCode.UNREACHABLE,
                f"the metadata store {self._path} failed on an I/O error; check the disk and restart the coordinator",
                facts={OUTCOME_FACT: OUTCOME_UNAPPLIED},
            )
        try:
            tables.end_lapsed_leases()
            return job(tables)
        except sqlite3.Error as error:
            raise self._translated(error) from error
        finally:
            if batches := tables.take_batches():
                self._loop.call_soon_threadsafe(self._hub.publish, batches)

    def _translated(self, error: sqlite3.Error) -> HoldfastError:
        match _primary_code(error):
            case sqlite3.SQLITE_FULL:
                return HoldfastError(
                    ErrorCode.DISK_FULL,
                    f"the disk of the metadata store {self._path} is full; free some space",
                    facts={OUTCOME_FACT: OUTCOME_UNAPPLIED},
                )
            case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
                code, what = ErrorCode.CORRUPT, "is damaged"
            case _:
                code, what = ErrorCode.UNREACHABLE, "failed"
        self._failed = True
        return HoldfastError(
            code, f"the metadata store {self._path} {what}: {error}", facts={OUTCOME_FACT: OUTCOME_UNKNOWN}
        )

    def _open_tables(self) -> None:
        try:
            if self._path != IN_MEMORY:
                self._lock = FileLock(Path(self._path + ".lock"), subject=f"the metadata store {self._path}")
                _make_file(Path(self._path))
            self._tables = _Tables(_connect(self._path), self._clock.monotonic_s)
        except (OSError, sqlite3.Error) as error:
            raise _open_error(self._path, error) from error
        finally:
            if self._tables is None and self._lock is not None:
                self._lock.release()


def _make_file(path: Path) -> None:
    """Make the database for its owner only (it holds wrapped keys; SQLite gives the WAL the same mode), durably."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _primary_code(error: sqlite3.Error) -> int:
    # Errors that the module itself raises carry no code; the low byte of SQLite's extended codes is the plain one.
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


def _open_error(path: str, error: OSError | sqlite3.Error) -> HoldfastError:
    code = ErrorCode.INVALID_ARGUMENT
    if isinstance(error, sqlite3.Error):
        code = {
            sqlite3.SQLITE_BUSY: ErrorCode.BUSY,
            sqlite3.SQLITE_CORRUPT: ErrorCode.CORRUPT,
            sqlite3.SQLITE_NOTADB: ErrorCode.CORRUPT,
            sqlite3.SQLITE_FULL: ErrorCode.DISK_FULL,
        }.get(_primary_code(error), code)
    return HoldfastError(code, f"the metadata store {path} cannot be opened: {error}")
