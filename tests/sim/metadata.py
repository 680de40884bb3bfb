"""A metadata store in memory, with the contract of etcd and of the embedded engine, on the time of its event loop.

It passes `tests/metadata/test_contract.py`. Everything happens at the moment of the call, so whoever simulates a
network puts latency, losses and cuts in front of it (`metadata_link`).
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
from collections.abc import AsyncGenerator, Callable, Sequence

from holdfast_core.model.errors import ErrorCode, HoldfastError
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
from holdfast_core.runtime.metadata.hub import WatchHub
from holdfast_core.runtime.metadata.store import (
    OUTCOME_FACT,
    OUTCOME_UNAPPLIED,
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


class MetadataTables:
    """The store without its calls: everything happens at once. `now` and `peek` are for a checker that asks nobody.

    `observers` hear of every change at the moment it is made.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin empty, at revision 1 as etcd does."""
        self._loop = loop
        self._items: dict[bytes, KeyValue] = {}
        self._keys: list[bytes] = []
        self._by_lease: dict[int, dict[bytes, None]] = {}
        self._revision = 1
        self._leases = LeaseTerms({}, loop.time)
        self._lease_ids = itertools.count(1)
        self.hub = WatchHub()
        self._timer: asyncio.TimerHandle | None = None
        self.observers: list[Callable[[WatchBatch], None]] = []

    @property
    def revision(self) -> int:
        """The newest revision."""
        return self._revision

    def now(self, prefix: str) -> list[KeyValue]:
        """Return everything below a prefix, in order of keys."""
        return self._range(prefix.encode(), after=b"", limit=None)

    def peek(self, key: str) -> KeyValue | None:
        """Return a key as it is now."""
        self._end_lapsed()
        return self._items.get(key.encode())

    def page(self, prefix: bytes, *, after: bytes, limit: int) -> Snapshot:
        """Return one page of what is below a prefix."""
        self._end_lapsed()
        items = self._range(prefix, after=after, limit=limit + 1)
        return Snapshot(self._revision, tuple(items[:limit]), more=len(items) > limit)

    def apply(self, conditions: Sequence[Condition], operations: Sequence[Operation]) -> TxnResult:
        """Do what `MetadataStore.txn` does. Raises NOT_FOUND as it does."""
        self._end_lapsed()
        if not all(map(self._holds, conditions)):
            return TxnResult(False, self._revision)
        for operation in operations:
            if isinstance(operation, Put) and operation.lease_id and operation.lease_id not in self._leases:
                raise HoldfastError(
                    ErrorCode.NOT_FOUND,
                    f"the lease {operation.lease_id} of {operation.key!r} has ended",
                    facts={OUTCOME_FACT: OUTCOME_UNAPPLIED},
                )
        self._change(operations)
        return TxnResult(True, self._revision)

    def scan(self, prefixes: Sequence[bytes], *, page_items: int) -> list[Snapshot]:
        """Return the pages of everything below prefixes, which do not overlap."""
        listing = self.snapshot(prefixes)
        cuts = range(0, max(1, len(listing.items)), page_items)
        last = cuts[-1]
        return [Snapshot(listing.revision, listing.items[at : at + page_items], more=at != last) for at in cuts]

    def grant(self, ttl_s: float) -> int:
        """Begin a lease."""
        lease_id = next(self._lease_ids)
        self._leases.add(lease_id, ttl_s)
        self._by_lease[lease_id] = {}
        self._set_timer()
        return lease_id

    def keep(self, lease_id: int) -> float:
        """Give a lease a new term. Raises NOT_FOUND."""
        self._end_lapsed()
        return self._leases.keep(lease_id)

    def left_s(self, lease_id: int) -> float:
        """Return what a lease has left, seconds. Raises NOT_FOUND."""
        self._end_lapsed()
        return self._leases.left_s(lease_id)

    def close(self) -> None:
        """End all watches and timers."""
        self.hub.close()
        if self._timer is not None:
            self._timer.cancel()

    def snapshot(self, prefixes: Sequence[bytes]) -> Snapshot:
        """Return everything below prefixes, which do not overlap."""
        self._end_lapsed()
        items = [item for prefix in prefixes for item in self._range(prefix, after=b"", limit=None)]
        return Snapshot(self._revision, tuple(items))

    def _range(self, prefix: bytes, *, after: bytes, limit: int | None) -> list[KeyValue]:
        begin = bisect.bisect_left(self._keys, prefix)
        if after >= prefix and after:
            begin = max(begin, bisect.bisect_right(self._keys, after))
        end_key = range_end(prefix)
        end = bisect.bisect_left(self._keys, end_key) if end_key else len(self._keys)
        if limit is not None:
            end = min(end, begin + limit)
        return [self._items[key] for key in self._keys[begin:end]]

    def _holds(self, condition: Condition) -> bool:
        item = self._items.get(condition.key.encode())
        create, mod = (0, 0) if item is None else (item.create_revision, item.mod_revision)
        return holds(condition, create_revision=create, mod_revision=mod)

    def _change(self, operations: Sequence[Operation]) -> None:
        """Apply operations as one revision, and tell watchers; nothing happens where nothing changes."""
        revision = self._revision + 1
        puts: list[KeyValue] = []
        deletes: list[str] = []
        for operation in operations:
            key = operation.key.encode()
            before = self._items.get(key)
            if isinstance(operation, Put):
                made = revision if before is None else before.create_revision
                item = KeyValue(operation.key, operation.value, made, revision, operation.lease_id)
                self._place(key, before, item)
                puts.append(item)
            elif before is not None:
                self._place(key, before, None)
                deletes.append(operation.key)
        if puts or deletes:
            self._revision = revision
            batch = WatchBatch(revision, tuple(puts), tuple(deletes))
            self.hub.publish([batch])
            for observer in self.observers:
                observer(batch)

    def _place(self, key: bytes, before: KeyValue | None, item: KeyValue | None) -> None:
        if before is not None and before.lease_id:
            self._by_lease[before.lease_id].pop(key, None)
        if item is None:
            del self._items[key]
            del self._keys[bisect.bisect_left(self._keys, key)]
            return
        if before is None:
            bisect.insort(self._keys, key)
        self._items[key] = item
        if item.lease_id:
            self._by_lease[item.lease_id][key] = None

    def revoke(self, lease_id: int) -> None:
        """End a lease; nothing happens where it has ended."""
        if lease_id not in self._leases:
            return
        self._leases.remove(lease_id)
        self._change([Delete(key.decode()) for key in sorted(self._by_lease[lease_id])])
        del self._by_lease[lease_id]

    def _end_lapsed(self) -> None:
        for lease_id in self._leases.lapsed():
            self.revoke(lease_id)

    def _set_timer(self) -> None:
        """Wake up when the next lease may end, so that watchers learn of it while nobody asks."""
        deadline_s = self._leases.next_deadline_s()
        if self._timer is not None:
            if deadline_s is not None and self._timer.when() <= deadline_s:
                return
            self._timer.cancel()
            self._timer = None
        if deadline_s is not None:
            self._timer = self._loop.call_at(deadline_s, self._wake)

    def _wake(self) -> None:
        self._timer = None
        self._end_lapsed()
        self._set_timer()


class MemoryMetadata:
    """The store, open. Everything happens at the moment of the call; the answer comes a turn of the loop later."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin empty."""
        self.tables = MetadataTables(loop)
        self._closed = False

    async def get(self, key: str) -> KeyValue | None:
        """See `MetadataStore.get`."""
        key_bytes(key)
        await self._enter()
        return self.tables.peek(key)

    async def snapshot(self, prefixes: Sequence[str]) -> Snapshot:
        """See `MetadataStore.snapshot`."""
        covering = covering_prefixes(prefixes)
        await self._enter()
        return self.tables.snapshot(covering)

    async def page(self, prefix: str, *, after: str, limit: int) -> Snapshot:
        """See `MetadataStore.page`."""
        check_page(limit=limit)
        start, behind = prefix_bytes(prefix), prefix_bytes(after)
        await self._enter()
        return self.tables.page(start, after=behind, limit=limit)

    async def scan(self, prefixes: Sequence[str], *, page_items: int) -> AsyncGenerator[Snapshot, None]:
        """See `MetadataStore.scan`."""
        check_page(limit=page_items)
        covering = covering_prefixes(prefixes)
        await self._enter()
        for page in self.tables.scan(covering, page_items=page_items):
            yield page
            await self._enter()

    async def txn(self, conditions: Sequence[Condition], operations: Sequence[Operation]) -> TxnResult:
        """See `MetadataStore.txn`."""
        check_txn(conditions, operations)
        await self._enter()
        return self.tables.apply(conditions, operations)

    async def watch(self, prefix: str) -> AsyncGenerator[WatchBatch, None]:
        """See `MetadataStore.watch`."""
        start = prefix_bytes(prefix)
        await self._enter()
        subscription = self.tables.hub.subscribe(prefix)
        try:
            while not subscription.ended:
                subscription.restart()
                listing = self.tables.snapshot([start])
                yield WatchBatch(listing.revision, listing.items, (), relisted=True)
                while (batch := await subscription.next_batch()) is not None:
                    yield batch
        finally:
            self.tables.hub.unsubscribe(subscription)

    async def grant_lease(self, ttl_s: float) -> int:
        """See `MetadataStore.grant_lease`."""
        check_ttl(ttl_s)
        await self._enter()
        return self.tables.grant(ttl_s)

    async def keep_lease(self, lease_id: int) -> float:
        """See `MetadataStore.keep_lease`."""
        await self._enter()
        return self.tables.keep(lease_id)

    async def lease_left(self, lease_id: int) -> float:
        """See `MetadataStore.lease_left`."""
        await self._enter()
        return self.tables.left_s(lease_id)

    async def revoke_lease(self, lease_id: int) -> None:
        """See `MetadataStore.revoke_lease`."""
        await self._enter()
        self.tables.revoke(lease_id)

    async def close(self) -> None:
        """See `MetadataStore.close`."""
        self._closed = True
        self.tables.close()

    async def _enter(self) -> None:
        if self._closed:
            raise HoldfastError(
                ErrorCode.UNREACHABLE, "the metadata store is closed", facts={OUTCOME_FACT: OUTCOME_UNAPPLIED}
            )
        await asyncio.sleep(0)
