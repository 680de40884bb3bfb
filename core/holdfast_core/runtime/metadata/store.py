"""What a metadata store is: keys, revisions, compare-and-swap transactions, watches and leases.

The semantics are those of etcd's v3 API, cut down to what a coordinator needs:

* The store has one revision. Each transaction that changes anything raises it by one; all its changes carry that
  revision. A key's `create_revision` is the revision that made it (a deletion ends it; putting it again makes it anew),
  its `mod_revision` the one that wrote it last.
* Every read is linearizable. `snapshot`, `page` and all pages of one `scan` answer from exactly one revision.
* Keys sort by their UTF-8 bytes, which is also how Python sorts `str`.

Errors are `HoldfastError`. UNREACHABLE comes within a bounded time. After a transaction its facts hold
`outcome`: "unknown" means that the transaction may have been applied or may yet be (read again to learn; never repeat a
compare-and-swap blindly), "unapplied" that it certainly was not. Reads, lease calls and watches retry by themselves.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

OUTCOME_FACT: Final = "outcome"
OUTCOME_UNKNOWN: Final = "unknown"
OUTCOME_UNAPPLIED: Final = "unapplied"


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One key as the store held it at some revision; `lease_id` is 0 for a key without a lease."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease_id: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the store held at one revision: items in key order, each key once.

    `more` is set only by `page` and `scan`: there are further keys to return, at this revision.
    """

    revision: int
    items: tuple[KeyValue, ...]
    more: bool = False


@dataclass(frozen=True, slots=True)
class Absent:
    """Holds while the key does not exist."""

    key: str


@dataclass(frozen=True, slots=True)
class Exists:
    """Holds while the key exists."""

    key: str


@dataclass(frozen=True, slots=True)
class ModRevisionIs:
    """Holds while the key was last written at `revision`; revision 0 stands for a key that does not exist."""

    key: str
    revision: int


@dataclass(frozen=True, slots=True)
class CreateRevisionIs:
    """Holds while the key is the very one made at `revision`; revision 0 stands for a key that does not exist."""

    key: str
    revision: int


@dataclass(frozen=True, slots=True)
class Put:
    """Write `value`; under a lease the key vanishes when the lease ends, and `lease_id` 0 takes it off any lease."""

    key: str
    value: bytes
    lease_id: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove the key; nothing happens if it does not exist."""

    key: str


Condition: TypeAlias = Absent | Exists | ModRevisionIs | CreateRevisionIs
Operation: TypeAlias = Put | Delete


@dataclass(frozen=True, slots=True)
class TxnResult:
    """Whether all conditions held and so the operations were applied, and the store's revision right after."""

    succeeded: bool
    revision: int


@dataclass(frozen=True, slots=True)
class WatchBatch:
    """All changes below the watched prefix that one revision made, or a fresh listing.

    With `relisted` the puts are everything below the prefix at `revision`: forget what was known before. That is the
    first batch of every watch, and comes again when the store no longer has the history in between.
    """

    revision: int
    puts: tuple[KeyValue, ...]
    deletes: tuple[str, ...]
    relisted: bool = False


class MetadataStore(Protocol):
    """One metadata store, open. Safe to share between the tasks of one event loop.

    Keys and prefixes are checked by `checks` alike in every engine: INVALID_ARGUMENT for a malformed one,
    LIMIT_EXCEEDED beyond its limits. A prefix may be empty and then means every key.
    """

    async def get(self, key: str) -> KeyValue | None:
        """Return the key as it is now, None if it does not exist."""

    async def snapshot(self, prefixes: Sequence[str]) -> Snapshot:
        """Return everything below all the prefixes at one revision. For prefixes that stay small: all is in memory."""

    async def page(self, prefix: str, *, after: str, limit: int) -> Snapshot:
        """Return at most `limit` keys below `prefix` that sort behind `after` ("" for the first page)."""

    def scan(self, prefixes: Sequence[str], *, page_items: int) -> AsyncGenerator[Snapshot, None]:
        """Yield everything below all the prefixes at one revision, page by page: flat in memory, whatever there is.

        Every page has that revision, as many as `page_items` items, and `more` unless it is the last; one page comes at
        least. Reading goes on beside writes. Close the generator (`contextlib.aclosing`) when leaving it early.

        Raises:
            HoldfastError: CONFLICT if the store gave up the revision before all was read: begin again, and read faster.
        """

    async def txn(self, conditions: Sequence[Condition], operations: Sequence[Operation]) -> TxnResult:
        """Apply all operations if all conditions hold, else nothing. Durable when it returns.

        Raises:
            HoldfastError: INVALID_ARGUMENT if a key is operated on twice; LIMIT_EXCEEDED for more conditions,
                operations or bytes than `limits` has; NOT_FOUND if the conditions hold and a lease that a put names
                is gone; UNREACHABLE as the module says.
        """

    def watch(self, prefix: str) -> AsyncGenerator[WatchBatch, None]:
        """Yield a listing, then every later change below `prefix`, each exactly once and in order of revisions.

        Lost connections, lost quorum and compaction are survived; the watch ends when the store is closed. Close the
        generator (`contextlib.aclosing`) when leaving it early.

        Raises:
            HoldfastError: UNREACHABLE if the first listing cannot be had; DENIED at any time.
        """

    async def grant_lease(self, ttl_s: float) -> int:
        """Make a lease that lasts at least `ttl_s` seconds from now unless it is kept; return its id, above 0."""

    async def keep_lease(self, lease_id: int) -> float:
        """Give the lease a new full term and return its seconds. Raises NOT_FOUND if it has ended."""

    async def lease_left(self, lease_id: int) -> float:
        """Return the seconds the lease lasts unless it is kept, without keeping it. Raises NOT_FOUND if it has ended.

        etcd rounds down to whole seconds.
        """

    async def revoke_lease(self, lease_id: int) -> None:
        """End the lease and delete its keys at one revision; nothing happens if it has ended already."""

    async def close(self) -> None:
        """Release everything. Every later call raises; open watches end."""
