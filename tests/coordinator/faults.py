"""A metadata store that fails on script: the coordinator dies at a call, or a transaction's answer is lost."""

from __future__ import annotations

import enum
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from holdfast_coordinator import keyspace
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.metadata.store import (
    OUTCOME_FACT,
    OUTCOME_UNKNOWN,
    Condition,
    KeyValue,
    MetadataStore,
    Operation,
    Snapshot,
    TxnResult,
    WatchBatch,
)


class Crash(Exception):
    """The coordinator is dead: it never does anything again."""


class Fault(enum.Enum):
    """What happens at the chosen call."""

    DIES_BEFORE = "the coordinator dies before the call reaches the store"
    DIES_AFTER = "the coordinator dies after the store has done what the call says"
    LOST_BEFORE = "the call never reaches the store, and the coordinator hears only that the outcome is unknown"
    LOST_AFTER = "the store does what the call says, and the coordinator hears only that the outcome is unknown"


class FaultyStore:
    """Wraps a store; armed, it counts calls and fails the chosen one. Watches are left alone."""

    def __init__(self, store: MetadataStore) -> None:
        self._store = store
        self._fault: Fault | None = None
        self._at = 0
        self._dead = False
        self.calls = 0
        self._before_commit: Callable[[], Awaitable[object]] | None = None
        self._about = ""
        self._refuses_log = False

    def before_next_commit(self, act: Callable[[], Awaitable[object]], *, about: str = "/points/") -> None:
        """Let something else happen at the last moment before the next transaction that writes such a key."""
        self._before_commit, self._about = act, about

    def refuse_log(self, refusing: bool) -> None:
        """From now on fail every transaction that would append to the audit log, before it does anything."""
        self._refuses_log = refusing

    def arm(self, fault: Fault | None, *, at: int = 0) -> None:
        """Count from 0 again and fail call number `at`; with None only count."""
        self._fault, self._at, self._dead, self.calls = fault, at, False, 0

    @property
    def struck(self) -> bool:
        """Whether the chosen call came."""
        return self.calls > self._at

    async def _call(self, name: str, *arguments: Any, **options: Any) -> Any:
        return await self._do(name, partial(getattr(self._store, name), *arguments, **options))

    async def _do(self, name: str, act: Callable[[], Awaitable[Any]]) -> Any:
        if self._dead:
            raise Crash
        position = self.calls
        self.calls += 1
        fault = self._fault if position == self._at else None
        if fault is Fault.DIES_BEFORE:
            self._dead = True
            raise Crash
        if fault is Fault.LOST_BEFORE:
            raise _lost(name)
        result = await act()
        if fault is Fault.DIES_AFTER:
            self._dead = True
            raise Crash
        if fault is Fault.LOST_AFTER:
            raise _lost(name)
        return result

    async def get(self, key: str) -> KeyValue | None:
        found: KeyValue | None = await self._call("get", key)
        return found

    async def snapshot(self, prefixes: Sequence[str]) -> Snapshot:
        found: Snapshot = await self._call("snapshot", prefixes)
        return found

    async def page(self, prefix: str, *, after: str, limit: int) -> Snapshot:
        found: Snapshot = await self._call("page", prefix, after=after, limit=limit)
        return found

    async def scan(self, prefixes: Sequence[str], *, page_items: int) -> AsyncGenerator[Snapshot, None]:
        async def pages() -> list[Snapshot]:
            return [page async for page in self._store.scan(prefixes, page_items=page_items)]

        for page in await self._do("scan", pages):
            yield page

    async def txn(self, conditions: Sequence[Condition], operations: Sequence[Operation]) -> TxnResult:
        if self._before_commit is not None and any(self._about in operation.key for operation in operations):
            act, self._before_commit = self._before_commit, None
            await act()
        if self._refuses_log and any(operation.key == keyspace.AUDIT_HEAD for operation in operations):
            raise HoldfastError(ErrorCode.UNREACHABLE, "the store takes no records")
        result: TxnResult = await self._call("txn", conditions, operations)
        return result

    def watch(self, prefix: str) -> AsyncGenerator[WatchBatch, None]:
        return self._store.watch(prefix)

    async def grant_lease(self, ttl_s: float) -> int:
        lease_id: int = await self._call("grant_lease", ttl_s)
        return lease_id

    async def keep_lease(self, lease_id: int) -> float:
        left_s: float = await self._call("keep_lease", lease_id)
        return left_s

    async def lease_left(self, lease_id: int) -> float:
        left_s: float = await self._call("lease_left", lease_id)
        return left_s

    async def revoke_lease(self, lease_id: int) -> None:
        await self._call("revoke_lease", lease_id)

    async def close(self) -> None:
        await self._store.close()


def _lost(name: str) -> HoldfastError:
    facts = {OUTCOME_FACT: OUTCOME_UNKNOWN} if name == "txn" else {}
    return HoldfastError(ErrorCode.UNREACHABLE, "the store was lost before it answered", facts=facts)
