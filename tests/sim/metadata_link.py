"""One coordinator's connection to the metadata store: late, lost, cut, and with answers that never come.

What the interface promises holds: reads and leases are tried again by themselves and end in UNREACHABLE within a
bounded time; a transaction is sent once, and where its answer is lost its outcome is unknown: it may have been applied,
never will be, or will be later, after its caller was told.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Final, TypeVar

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.metadata.checks import (
    check_page,
    check_ttl,
    check_txn,
    covering_prefixes,
    key_bytes,
    prefix_bytes,
)
from holdfast_core.runtime.metadata.store import (
    OUTCOME_FACT,
    OUTCOME_UNAPPLIED,
    OUTCOME_UNKNOWN,
    Condition,
    KeyValue,
    Operation,
    Snapshot,
    TxnResult,
    WatchBatch,
)
from tests.sim.metadata import MetadataTables
from tests.sim.network import METADATA, Network
from tests.sim.world import Process

T = TypeVar("T")

CALL_TIMEOUT_S: Final = 5.0
_RETRY_S: Final = 0.5
_LATE_S: Final = 4.0


class MetadataLink:
    """A `MetadataStore` as one process sees it.

    Attributes:
        lost_answers: share of transactions whose caller never hears what became of them.
        lag_s: how long watches lag behind at most.
        relists: share of batches in place of which a watch lists everything anew.
        before: for scripted races: awaited before a `scan` (with its prefixes) or a `txn` (with its operations).
    """

    def __init__(self, process: Process, tables: MetadataTables, network: Network) -> None:
        """Connect."""
        self._process = process
        self._tables = tables
        self._network = network
        self._random = network.random
        self.lost_answers = 0.0
        self.lag_s = 0.01
        self.relists = 0.0
        self.before: Callable[[str, object], Awaitable[None]] | None = None

    async def get(self, key: str) -> KeyValue | None:
        """See `MetadataStore.get`."""
        key_bytes(key)
        return await self._ask(lambda: self._tables.peek(key))

    async def snapshot(self, prefixes: Sequence[str]) -> Snapshot:
        """See `MetadataStore.snapshot`."""
        covering = covering_prefixes(prefixes)
        return await self._ask(lambda: self._tables.snapshot(covering))

    async def page(self, prefix: str, *, after: str, limit: int) -> Snapshot:
        """See `MetadataStore.page`."""
        check_page(limit=limit)
        start, behind = prefix_bytes(prefix), prefix_bytes(after)
        return await self._ask(lambda: self._tables.page(start, after=behind, limit=limit))

    async def scan(self, prefixes: Sequence[str], *, page_items: int) -> AsyncGenerator[Snapshot, None]:
        """See `MetadataStore.scan`."""
        check_page(limit=page_items)
        covering = covering_prefixes(prefixes)
        await self._held("scan", prefixes)
        for page in await self._ask(lambda: self._tables.scan(covering, page_items=page_items)):
            yield page
            await self._ask(lambda: None)

    async def grant_lease(self, ttl_s: float) -> int:
        """See `MetadataStore.grant_lease`."""
        check_ttl(ttl_s)
        return await self._ask(lambda: self._tables.grant(ttl_s))

    async def keep_lease(self, lease_id: int) -> float:
        """See `MetadataStore.keep_lease`."""
        return await self._ask(lambda: self._tables.keep(lease_id))

    async def lease_left(self, lease_id: int) -> float:
        """See `MetadataStore.lease_left`."""
        return await self._ask(lambda: self._tables.left_s(lease_id))

    async def revoke_lease(self, lease_id: int) -> None:
        """See `MetadataStore.revoke_lease`."""
        return await self._ask(lambda: self._tables.revoke(lease_id))

    async def txn(self, conditions: Sequence[Condition], operations: Sequence[Operation]) -> TxnResult:
        """See `MetadataStore.txn`."""
        check_txn(conditions, operations)
        await self._process.here()
        await self._held("txn", operations)
        if self._cut():
            await self._process.sleep(_RETRY_S)
            if self._cut():
                # The connection is gone before anything is sent.
                raise _unreachable(OUTCOME_UNAPPLIED)
        if self.lost_answers and self._random.random() < self.lost_answers:
            return await self._lose(conditions, operations)
        await self._process.sleep(self._network.delay_s())
        result = self._tables.apply(conditions, operations)
        await self._process.sleep(self._network.delay_s())
        if self._cut():
            await self._process.sleep(_RETRY_S)
            raise _unreachable(OUTCOME_UNKNOWN)
        return result

    async def watch(self, prefix: str) -> AsyncGenerator[WatchBatch, None]:
        """See `MetadataStore.watch`."""
        start = prefix_bytes(prefix)
        subscription = self._tables.hub.subscribe(prefix)
        try:
            while not subscription.ended:
                subscription.restart()
                listing = await self._ask_until_told(lambda: self._tables.snapshot([start]))
                subscription.restart()
                yield WatchBatch(listing.revision, listing.items, (), relisted=True)
                while (batch := await subscription.next_batch()) is not None:
                    await self._process.sleep(self._random.uniform(0.0, self.lag_s))
                    if self._cut() or (self.relists and self._random.random() < self.relists):
                        break
                    yield batch
        finally:
            self._tables.hub.unsubscribe(subscription)

    async def close(self) -> None:
        """See `MetadataStore.close`; the store outlives its connections."""

    async def _held(self, name: str, argument: object) -> None:
        if self.before is not None:
            await self.before(name, argument)

    async def _ask(self, job: Callable[[], T]) -> T:
        """Do what may be done twice: through a cut it is tried again for a while."""
        await self._process.sleep(self._network.delay_s())
        waited_s = 0.0
        while self._cut():
            if waited_s >= CALL_TIMEOUT_S:
                raise _unreachable("")
            await self._process.sleep(_RETRY_S)
            waited_s += _RETRY_S
        return job()

    async def _ask_until_told(self, job: Callable[[], T]) -> T:
        while True:
            try:
                return await self._ask(job)
            except HoldfastError as error:
                if error.code is not ErrorCode.UNREACHABLE:
                    raise

    async def _lose(self, conditions: Sequence[Condition], operations: Sequence[Operation]) -> TxnResult:
        """Send a transaction whose answer never comes; it is applied before, after, or never."""
        if self._random.random() < 0.7:
            late_s = self._random.uniform(0.0, _LATE_S) if self._random.random() < 0.5 else self._network.delay_s()
            self._process.world.loop.call_later(late_s, self._apply_unseen, conditions, operations)
        await self._process.sleep(self._random.uniform(0.1, _LATE_S / 2))
        raise _unreachable(OUTCOME_UNKNOWN)

    def _apply_unseen(self, conditions: Sequence[Condition], operations: Sequence[Operation]) -> None:
        """Apply what is under way already, whether who sent it lives or not."""
        try:
            self._tables.apply(conditions, operations)
        except HoldfastError as error:
            if error.code is not ErrorCode.NOT_FOUND:
                raise

    def _cut(self) -> bool:
        name = self._process.name
        return self._network.is_cut(name, METADATA) or self._network.is_cut(METADATA, name)


def _unreachable(outcome: str) -> HoldfastError:
    facts = {OUTCOME_FACT: outcome} if outcome else {}
    return HoldfastError(ErrorCode.UNREACHABLE, "the metadata store does not answer", facts=facts)
