"""Reading blocks with failover over all their owners.

An id is asked of the owner that answers best, then of the next, over the owners of every living layout, newest first.
What no owner could give is missing, corrupt or unreachable: three answers, never mixed. Bytes reach the caller only
after their hash was checked (invariant 6): `fetch` returns verified blocks, `fetch_into` hands bodies to a consumer
that verifies them itself in a worker thread and names those it refuses, which then count as corrupt on that node.

Owners let go of blocks once a newer layout has settled (docs/healing.md), which a reader under older layouts would take
for damage. So nothing is concluded before the layouts were looked at again after the last owner answered: where they
changed, the new owners are asked; where they go on changing, the ids count as unreachable and not as lost.

An owner whose disk hangs answers nothing and refuses nothing. So one is waited for a little while the others are not
tried, and asked again, with patience, for what none of them gave (ADR 0133).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from holdfast_core.model.block import SealedBlock, verify
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.layout import Layout
from holdfast_core.model.limits import ERROR_BLOCK_IDS_MAX, MIB, RPC_TIMEOUT_S
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.blocks.pool import SLOW_FACT, NodePool
from holdfast_core.runtime.blocks.wire import GetAnswer
from holdfast_proto.v1.blocks_pb2 import VERDICT_CORRUPT, VERDICT_DENIED, VERDICT_OK

REQUEST_BYTES: Final = 8 * MIB
REQUESTS_IN_FLIGHT: Final = 6
REFRESHES_MAX: Final = 4
PATIENCE_S: Final = 2.0

REFUSED_FACT: Final = "refused"
"""Fact of an error DENIED that says what was refused, where that was not the capability as a whole."""
REFUSED_KIND: Final = "kind"
"""The block is of a kind that the capability does not cover."""

Consumer = Callable[[Sequence[bytes], Sequence[memoryview]], Sequence[bytes]]
"""Takes ids and bodies in a worker thread; verifies, uses them, and returns the ids whose bytes it refuses."""

Refresh = Callable[[Sequence[Layout]], Awaitable[bool]]
"""Brings layouts and addresses up to date; returns whether anything that reading goes by changed since these layouts
were handed out."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Ids that no owner could give, by reason. An id is `unreachable` if an owner that may have it did not answer."""

    missing: tuple[bytes, ...] = ()
    corrupt: tuple[bytes, ...] = ()
    unreachable: tuple[bytes, ...] = ()
    reason: HoldfastError | None = None

    def __bool__(self) -> bool:
        """Return whether any id is unreadable."""
        return bool(self.missing or self.corrupt or self.unreachable)

    @property
    def damaged(self) -> tuple[bytes, ...]:
        """Ids for which every owner answered and none had good bytes."""
        return self.corrupt + self.missing

    def error(self, what: str) -> HoldfastError:
        """Make the error; `what` says what was being read, for the message."""
        if self.corrupt:
            code, why = ErrorCode.CORRUPT, "are corrupt on their owners"
        elif self.missing:
            code, why = ErrorCode.MISSING, "are on none of their owners"
        else:
            code, why = ErrorCode.UNREACHABLE, "could not be reached on any owner that may have them"
        ids = self.damaged or self.unreachable
        detail = f" ({self.reason.message})" if self.reason is not None and not self.damaged else ""
        facts = {
            "missing": str(len(self.missing)),
            "corrupt": str(len(self.corrupt)),
            "unreachable": str(len(self.unreachable)),
        }
        message = f"{len(ids)} blocks of {what} {why}{detail}"
        return HoldfastError(code, message, facts=facts, block_ids=ids[:ERROR_BLOCK_IDS_MAX])


@dataclass(slots=True)
class _Trial:
    """What one id has been through."""

    tried: set[str] = field(default_factory=set)
    slow: set[str] = field(default_factory=set)
    corrupt: bool = False
    unreachable: bool = False
    denied: HoldfastError | None = None


class _Owner(NamedTuple):
    """A node to ask, and whether it is waited for as long as for any call."""

    node_id: str
    patient: bool


class BlockReader:
    """Fetches sealed blocks from their owners. Belongs to one event loop; calls may overlap."""

    def __init__(
        self,
        pool: NodePool,
        layouts: Callable[[], Sequence[Layout]],
        capability: Callable[[], str],
        *,
        executor: Executor | None = None,
        refresh: Refresh | None = None,
    ) -> None:
        """Bind to a pool.

        Args:
            pool: connections, already told of the nodes.
            layouts: returns the living layouts, newest first; asked anew for each fetch.
            capability: returns the token to show to nodes.
            executor: where bodies are verified or consumed; the loop's own pool if None.
            refresh: asked before anything counts as unreadable; None for who knows that the layouts cannot change, or
                decides by a transaction that compares them.
        """
        self._pool = pool
        self._layouts = layouts
        self._capability = capability
        self._executor = executor
        self._refresh = refresh
        self._slots = asyncio.Semaphore(REQUESTS_IN_FLIGHT)

    async def fetch(self, block_ids: Iterable[bytes], *, what: str = "the request") -> dict[bytes, SealedBlock]:
        """Return the blocks, verified, by id. The caller bounds how many it asks for at once.

        Raises:
            HoldfastError: CORRUPT, MISSING or UNREACHABLE with the ids in `block_ids`; DENIED if the capability
                does not allow reading them.
        """
        found, unreadable = await self.fetch_readable(block_ids)
        if unreadable:
            raise unreadable.error(what)
        return found

    async def fetch_readable(self, block_ids: Iterable[bytes]) -> tuple[dict[bytes, SealedBlock], Unreadable]:
        """As `fetch`, but return also what no owner gave, in place of raising for it."""
        found: dict[bytes, SealedBlock] = {}

        def keep(ids: Sequence[bytes], bodies: Sequence[memoryview]) -> Sequence[bytes]:
            refused = []
            for block_id, body in zip(ids, bodies, strict=True):
                try:
                    found[block_id] = verify(block_id, bytes(body))
                except HoldfastError:
                    refused.append(block_id)
            return refused

        return found, await self.fetch_into(block_ids, keep)

    async def fetch_into(
        self, block_ids: Iterable[bytes], consumer: Consumer, *, block_bytes: int = 64 * 1024
    ) -> Unreadable:
        """Fetch blocks and pass them to `consumer`, in no particular order, in worker threads, perhaps several at once.

        Each id is consumed successfully at most once. `block_bytes` is a guess of a body's size, for batching.

        Returns:
            What could not be read; empty if all was.

        Raises:
            HoldfastError: DENIED for what some owner refused and no other gave: one node alone, whose clock is off or
                which is hostile, keeps nobody from reading. Other refusals that no owner would answer differently.
        """
        pending: Sequence[bytes] = list(dict.fromkeys(block_ids))
        for _ in range(REFRESHES_MAX):
            layouts = self._layouts()
            spent, reason = await self._ask_all(pending, layouts, consumer, max(1, REQUEST_BYTES // block_bytes))
            if not spent:
                return Unreadable()
            try:
                changed = self._refresh is not None and await self._refresh(layouts)
            except HoldfastError as error:
                if not error.retryable:
                    raise
                _raise_denied(spent)
                return Unreadable(unreachable=tuple(spent), reason=error)
            if not changed:
                _raise_denied(spent)
                return _sort_out(spent, reason)
            pending = list(spent)
        busy = HoldfastError(ErrorCode.UNREACHABLE, "the layout changes faster than its owners can be asked")
        return Unreadable(unreachable=tuple(pending), reason=busy)

    async def _ask_all(
        self, block_ids: Sequence[bytes], layouts: Sequence[Layout], consumer: Consumer, ids_per_request: int
    ) -> tuple[dict[bytes, _Trial], HoldfastError | None]:
        """Ask one owner after the other; returns what none of them gave, and why one of them failed if any did."""
        pending = block_ids
        trials: dict[bytes, _Trial] = {}
        reason: HoldfastError | None = None
        spent: dict[bytes, _Trial] = {}
        while pending:
            groups = self._assign(pending, layouts, trials, spent)
            rest: list[bytes] = []
            requests = [
                (owner, ids[at : at + ids_per_request])
                for owner, ids in groups.items()
                for at in range(0, len(ids), ids_per_request)
            ]
            async with plain_task_group() as group:
                tasks = [group.create_task(self._request(owner, ids, consumer, trials)) for owner, ids in requests]
            for task in tasks:
                left, error = task.result()
                rest.extend(left)
                reason = error or reason
            pending = rest
        return spent, reason

    def _assign(
        self,
        pending: Sequence[bytes],
        layouts: Sequence[Layout],
        trials: dict[bytes, _Trial],
        spent: dict[bytes, _Trial],
    ) -> dict[_Owner, list[bytes]]:
        """Give each pending id to its best untried owner, or else to a slow one; ids without one move to `spent`."""
        groups: dict[_Owner, list[bytes]] = {}
        ranks = {
            node_id: self._pool.rank(node_id)
            for layout in layouts
            for node in layout.nodes
            for node_id in (node.node_id,)
        }
        for block_id in pending:
            trial = trials.get(block_id)
            best: _Owner | None = None
            best_key: tuple[bool, bool, int, int] | None = None
            for age, layout in enumerate(layouts):
                for node_id in layout.owners_of_block(block_id):
                    slow = trial is not None and node_id in trial.slow
                    if trial is not None and node_id in trial.tried and not slow:
                        continue
                    suspect, busy = ranks[node_id]
                    owner = _Owner(node_id, slow)
                    key = (slow, suspect, age, busy + len(groups.get(owner, ())))
                    if best_key is None or key < best_key:
                        best, best_key = owner, key
            if best is None:
                spent[block_id] = trial or _Trial()
                continue
            if trial is not None:
                trial.slow.discard(best.node_id)
            groups.setdefault(best, []).append(block_id)
        return groups

    async def _request(
        self, owner: _Owner, ids: Sequence[bytes], consumer: Consumer, trials: dict[bytes, _Trial]
    ) -> tuple[list[bytes], HoldfastError | None]:
        """Ask one node; returns the ids that it did not give, with their trials noted, and why it failed if it did."""
        node_id = owner.node_id
        timeout_s = RPC_TIMEOUT_S if owner.patient else PATIENCE_S
        left: list[bytes] = []
        answered = 0
        error: HoldfastError | None = None
        async with self._slots:
            try:
                async with aclosing(
                    self._pool.get_blocks(node_id, ids, self._capability(), timeout_s=timeout_s)
                ) as answers:
                    async for answer in answers:
                        here = ids[answered : answered + len(answer.verdicts)]
                        if answer.first != answered or len(here) != len(answer.verdicts):
                            raise HoldfastError(ErrorCode.UNREACHABLE, f"storage node {node_id} answered out of order")
                        left.extend(await self._take(node_id, here, answer, consumer, trials))
                        answered += len(here)
                if answered < len(ids):
                    raise HoldfastError(ErrorCode.UNREACHABLE, f"storage node {node_id} ended its answer early")
            except HoldfastError as failure:
                if failure.code is not ErrorCode.UNREACHABLE and not _another_may_answer(failure):
                    raise
                error = failure
                if SLOW_FACT not in failure.facts:
                    self._pool.failed(node_id)
        for block_id in ids[answered:]:
            trial = trials.setdefault(block_id, _Trial())
            trial.tried.add(node_id)
            if not owner.patient and error is not None and SLOW_FACT in error.facts:
                trial.slow.add(node_id)
            else:
                trial.unreachable = True
            if error is not None and error.code is ErrorCode.DENIED:
                trial.denied = error
            left.append(block_id)
        return left, error

    async def _take(
        self,
        node_id: str,
        ids: Sequence[bytes],
        answer: GetAnswer,
        consumer: Consumer,
        trials: dict[bytes, _Trial],
    ) -> list[bytes]:
        """Pass the bodies of one answer on; returns the ids that were not given or were refused."""
        got_ids: list[bytes] = []
        bodies: list[memoryview] = []
        left: list[bytes] = []
        view = answer.blocks
        at = 0
        for block_id, verdict, length in zip(ids, answer.verdicts, answer.lengths, strict=True):
            if verdict == VERDICT_OK:
                got_ids.append(block_id)
                bodies.append(view[at : at + length])
                at += length
                continue
            trial = trials.setdefault(block_id, _Trial())
            trial.tried.add(node_id)
            if verdict == VERDICT_DENIED:
                trial.denied = HoldfastError(
                    ErrorCode.DENIED,
                    "the capability does not cover blocks of this kind",
                    facts={REFUSED_FACT: REFUSED_KIND},
                )
            trial.corrupt = trial.corrupt or verdict == VERDICT_CORRUPT
            left.append(block_id)
        if got_ids:
            loop = asyncio.get_running_loop()
            for block_id in await loop.run_in_executor(self._executor, consumer, got_ids, bodies):
                trial = trials.setdefault(block_id, _Trial())
                trial.tried.add(node_id)
                trial.corrupt = True
                left.append(block_id)
        return left


def _another_may_answer(error: HoldfastError) -> bool:
    """Return whether a node's refusal is its own trouble, so that another owner may still serve."""
    return error.code in (
        ErrorCode.INTERNAL,
        ErrorCode.NOT_READY,
        ErrorCode.DISK_FULL,
        ErrorCode.NOT_FOUND,
        ErrorCode.DENIED,
    )


def _raise_denied(spent: dict[bytes, _Trial]) -> None:
    for trial in spent.values():
        if trial.denied is not None:
            raise trial.denied


def _sort_out(spent: dict[bytes, _Trial], reason: HoldfastError | None) -> Unreadable:
    missing, corrupt, unreachable = [], [], []
    for block_id, trial in spent.items():
        if trial.unreachable or not trial.tried:
            unreachable.append(block_id)
        elif trial.corrupt:
            corrupt.append(block_id)
        else:
            missing.append(block_id)
    return Unreadable(tuple(missing), tuple(corrupt), tuple(unreachable), reason)
