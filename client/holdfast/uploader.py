"""Brings blocks to their owners: asks who has them, sends the rest to all owners at once, and counts to the quorum.

While nobody has anything, they are sent without a question, and the nodes' answers tell of those that were there.

A block is safe when a write quorum of the newest layout's owners hold it durably; the other copies go on behind. What
is in flight is bounded in bytes, so a slow node slows the caller down and a silent one is given up after a while. When
a node knows a newer layout, everything that is not settled is placed anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from holdfast.access import Access
from holdfast.asking import Asking
from holdfast.batches import Batch, Counted
from holdfast.sender import NodeSender
from holdfast.wire import encode_put
from holdfast_core.model.block import SealedBlock
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import BATCH_BLOCKS_MAX, BATCH_BYTES_MAX, BATCH_BYTES_TARGET, MIB, RPC_TIMEOUT_S
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.status import TRANSPORT_FACT
from holdfast_proto.v1.blocks_pb2 import VERDICT_OK

UNSETTLED_BYTES_MAX: Final = 40 * MIB
# Four times the target: a batch costs a node some milliseconds whatever is in it, and bytes in flight are bounded.
_BATCH_BYTES: Final = 4 * BATCH_BYTES_TARGET
OPEN_BATCHES_BYTES_MAX: Final = 24 * MIB
_ASK_TIMEOUT_S: Final = 3.0
_STRAGGLER_S: Final = 5.0
_LATE: Final = "DEADLINE_EXCEEDED"
_REPLACEMENTS_MAX: Final = 8
_ASKINGS_MAX: Final = 5
_ASK_PAUSE_S: Final = 0.5

Placement = tuple[int, tuple[str, ...], tuple[str, ...]]
"""Layout epoch, owners of a block under it, and those of them that lack it."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A block that some owner may lack; `plain_bytes` is its plaintext's length."""

    block: SealedBlock
    plain_bytes: int
    index: bool = False


@dataclass(slots=True)
class Sums:
    """What an uploader has seen; see `holdfast.results.TransferStats` for the meaning."""

    present_plain_bytes: int = 0
    stored_bytes: int = 0
    sent_bytes: int = 0
    stored_plain_bytes: int = 0
    stored_blocks: int = 0
    index_bytes: int = 0
    under_replicated_blocks: int = 0


class _OpenBatch:
    """Blocks of one placement that wait to become a batch, each with what it was counted as if it counts as stored."""

    __slots__ = ("blocks", "counted", "sealed_bytes")

    def __init__(self) -> None:
        self.blocks: list[SealedBlock] = []
        self.counted: list[Counted | None] = []
        self.sealed_bytes = 0


class Uploader:
    """Uploads the blocks of one session. Belongs to one event loop.

    Use as an async context manager; inside, `offer` blocks, then `flush`, then `settle`. Leaving it early cancels what
    is under way.

    Attributes:
        sums: counters.
        quorum: set while nothing that was offered is short of its quorum.
    """

    def __init__(self, access: Access, pool: NodePool, *, clock: Clock, stall_s: float = RPC_TIMEOUT_S) -> None:
        """Bind to a session's access. `stall_s` is how long a node may acknowledge nothing."""
        self.sums = Sums()
        self._access = access
        self._pool = pool
        self._clock = clock
        self._stall_s = stall_s
        self._senders: dict[str, NodeSender] = {}
        self._unasked: set[str] = set()
        self._open: dict[Placement, _OpenBatch] = {}
        self._open_bytes = 0
        self._unsettled: dict[int, Batch] = {}
        self._unsettled_bytes = 0
        self._asking = Asking()
        self._below_quorum = 0
        self._sequence = 0
        self._recent: tuple[set[bytes], set[bytes]] = (set(), set())
        self._failure: HoldfastError | None = None
        self._stale = False
        self._replacements = 0
        self._progress = asyncio.Event()
        self._placing = asyncio.Lock()
        self._context = plain_task_group()
        self._group: asyncio.TaskGroup | None = None

    async def __aenter__(self) -> Uploader:
        """Begin."""
        self._group = await self._context.__aenter__()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """End the streams; without an error, after everything queued is done or has failed."""
        for sender in self._senders.values():
            sender.close()
        await self._context.__aexit__(kind, error, trace)  # type: ignore[arg-type]

    async def offer(self, outgoing: Sequence[Outgoing]) -> None:
        """Take blocks to keep; returns when they are placed and there is room for more.

        Raises:
            HoldfastError: NO_QUORUM, DISK_FULL, DENIED, … as soon as anything offered so far cannot reach its quorum.
        """
        fresh = self._not_recent(outgoing)
        if fresh:
            await self._place(fresh)
        while self._unsettled_bytes > UNSETTLED_BYTES_MAX:
            moved = await self._next_progress(_STRAGGLER_S)
            if not moved and not self._below_quorum:
                # What is in the way has its quorum and waits for a node that hangs: repair brings it there.
                self.give_up()
        self._raise_failure()

    async def flush(self) -> None:
        """Send what waits to fill a batch, and wait until everything is at quorum.

        Raises:
            HoldfastError: as `offer`.
        """
        while True:
            await self._replace_if_stale()
            self._close_open()
            if not self._below_quorum and not self._stale:
                return
            await self._next_progress()

    async def settle(self, timeout_s: float) -> bool:
        """Wait until every copy is written or has failed, at most `timeout_s`; returns whether that came about.

        Afterwards `sums.under_replicated_blocks` counts blocks that some owner lacks.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while self._unsettled:
                    await self._next_progress()
        except TimeoutError:
            return False
        return True

    def give_up(self) -> None:
        """Stop waiting for copies beyond the quorum; what is still queued fails."""
        for sender in list(self._senders.values()):
            if sender.busy:
                sender.fail(HoldfastError(ErrorCode.UNREACHABLE, f"storage node {sender.node_id} is too slow"))

    @property
    def under_replicated_blocks(self) -> int:
        """Blocks that at least one owner lacks now."""
        waiting = sum(len(batch.block_ids) for batch in self._unsettled.values())
        return self.sums.under_replicated_blocks + waiting

    def _not_recent(self, outgoing: Sequence[Outgoing]) -> list[Outgoing]:
        """Drop what this session offered a moment ago; parallel spans may seal the same content."""
        young, old = self._recent
        fresh = []
        for item in outgoing:
            block_id = item.block.id
            if block_id in young or block_id in old:
                if not item.index:
                    self.sums.present_plain_bytes += item.plain_bytes
                continue
            young.add(block_id)
            fresh.append(item)
        if len(young) > 65_536:
            self._recent = (set(), young)
        return fresh

    async def _place(self, items: Sequence[Outgoing], *, count: bool = True) -> None:
        """Ask the owners and put the blocks that some lack into open batches.

        `count` is False where blocks are placed a second time.
        """
        for _ in range(_REPLACEMENTS_MAX):
            layout = self._access.newest()
            by_owners: dict[tuple[str, ...], list[Outgoing]] = {}
            for item in items:
                by_owners.setdefault(layout.owners_of_block(item.block.id), []).append(item)
            try:
                # What is placed a second time was sent once, so some have it.
                asked = not count or self._asking.is_worth_it()
                held = await self._ask(by_owners, layout.epoch) if asked else {}
                break
            except HoldfastError as error:
                if error.code is not ErrorCode.WRONG_EPOCH:
                    raise
                await self._access.refresh(seen_epoch=layout.epoch)
                self._stale = True
        else:
            raise HoldfastError(ErrorCode.CONFLICT, "the layout changes faster than blocks can be placed; try again")
        if held:
            self._asking.found()
        elif asked:
            self._asking.found_nothing(sum([len(item.block.data) for item in items]))
        for owners, group in by_owners.items():
            if any(node in held for node in owners):
                self._add_some(layout.epoch, owners, group, held, count=count)
            else:
                if count:
                    self._count_stored(group)
                self._add((layout.epoch, owners, owners), group, stored=count)

    def _add_some(
        self,
        epoch: int,
        owners: tuple[str, ...],
        group: Sequence[Outgoing],
        held: Mapping[str, Container[bytes]],
        *,
        count: bool,
    ) -> None:
        """Add the blocks of one set of owners of which some are held somewhere."""
        for item in group:
            lacking = tuple([node for node in owners if item.block.id not in held.get(node, ())])
            stored = count and len(lacking) == len(owners)
            if lacking:
                self._add((epoch, owners, lacking), (item,), stored=stored)
            if stored:
                self._count_stored((item,))
            elif count and not item.index:
                self.sums.present_plain_bytes += item.plain_bytes

    def _count_stored(self, group: Iterable[Outgoing]) -> None:
        sums = self.sums
        for item in group:
            size = len(item.block.data)
            sums.stored_bytes += size
            sums.stored_plain_bytes += item.plain_bytes
            sums.stored_blocks += 1
            if item.index:
                sums.index_bytes += size

    def _met(self, batch: Batch, positions: Iterable[int]) -> None:
        """Count blocks as present that were placed as new, and that a node turned out to have; called by the senders.

        Nobody had been asked about them, or somebody else stored them meanwhile.
        """
        self._asking.found()
        sums = self.sums
        for counted in filter(None, [batch.counted[at] for at in positions]):
            sums.stored_bytes -= counted.sealed_bytes
            sums.stored_plain_bytes -= counted.plain_bytes
            sums.stored_blocks -= 1
            if counted.is_index:
                sums.index_bytes -= counted.sealed_bytes
            else:
                sums.present_plain_bytes += counted.plain_bytes

    async def _ask(self, by_owners: Mapping[tuple[str, ...], Sequence[Outgoing]], epoch: int) -> dict[str, set[bytes]]:
        """Return which of the blocks each node holds; no entry for nodes that hold none or do not answer."""
        questions: dict[str, list[bytes]] = {}
        for owners, group in by_owners.items():
            ids = [item.block.id for item in group]
            for node in owners:
                questions.setdefault(node, []).extend(ids)
        held: dict[str, set[bytes]] = {}
        async with plain_task_group() as tasks:
            for node, ids in questions.items():
                if node not in self._unasked and self._sender(node).dead is None:
                    tasks.create_task(self._ask_node(node, ids, epoch, held))
        return held

    async def _ask_node(self, node: str, ids: Sequence[bytes], epoch: int, held: dict[str, set[bytes]]) -> None:
        timeout_s = min(self._stall_s, _ASK_TIMEOUT_S)
        for attempt in range(_ASKINGS_MAX):
            try:
                verdicts = await self._pool.has_blocks(
                    node, b"".join(ids), self._access.capability(), layout_epoch=epoch, timeout_s=timeout_s
                )
                break
            except HoldfastError as error:
                if error.code is ErrorCode.WRONG_EPOCH:
                    raise
                if error.facts.get(TRANSPORT_FACT) == _LATE:
                    # Slow, perhaps not gone: it is sent everything, and the stream's own patience decides.
                    self._unasked.add(node)
                    return
                if error.code is not ErrorCode.NOT_READY or attempt + 1 == _ASKINGS_MAX:
                    self._sender(node).fail(error)
                    return
            # A node that has just started learns the layout with its next heartbeat.
            await self._clock.sleep(_ASK_PAUSE_S)
        if VERDICT_OK in verdicts:
            held[node] = {block_id for block_id, verdict in zip(ids, verdicts, strict=True) if verdict == VERDICT_OK}

    def _sender(self, node: str) -> NodeSender:
        sender = self._senders.get(node)
        if sender is None:
            assert self._group is not None, "the uploader is used inside its context"
            sender = self._senders[node] = NodeSender(
                self._pool,
                node,
                self._access.capability,
                self._done,
                self._met,
                clock=self._clock,
                stall_s=self._stall_s,
            )
            self._group.create_task(sender.run())
        return sender

    def _add(self, placement: Placement, group: Iterable[Outgoing], *, stored: bool) -> None:
        """Put blocks into an open batch; `stored` says that they count as stored from now on."""
        for item in group:
            size = len(item.block.data)
            waiting = self._open.get(placement)
            if waiting is not None and waiting.sealed_bytes + size > BATCH_BYTES_MAX:
                self._send_open(placement)
                waiting = None
            if waiting is None:
                waiting = self._open[placement] = _OpenBatch()
            waiting.blocks.append(item.block)
            waiting.counted.append(Counted(size, item.plain_bytes, item.index) if stored else None)
            waiting.sealed_bytes += size
            self._open_bytes += size
            if waiting.sealed_bytes >= _BATCH_BYTES or len(waiting.blocks) >= BATCH_BLOCKS_MAX:
                self._send_open(placement)
            elif self._open_bytes > OPEN_BATCHES_BYTES_MAX:
                self._send_open(max(self._open, key=lambda key: self._open[key].sealed_bytes))

    def _close_open(self) -> None:
        for placement in list(self._open):
            self._send_open(placement)

    def _send_open(self, placement: Placement) -> None:
        waiting = self._open.pop(placement)
        self._open_bytes -= waiting.sealed_bytes
        epoch, owners, lacking = placement
        self._sequence += 1
        batch = Batch(
            waiting.blocks,
            counted=waiting.counted,
            wire=encode_put(waiting.blocks, sequence=self._sequence, layout_epoch=epoch),
            sequence=self._sequence,
            layout_epoch=epoch,
            targets=lacking,
            needed=len(owners) // 2 + 1 - (len(owners) - len(lacking)),
        )
        self._unsettled[batch.sequence] = batch
        self._unsettled_bytes += batch.sealed_bytes
        if not batch.at_quorum:
            self._below_quorum += 1
        for node in lacking:
            self._sender(node).put(batch)

    def _done(self, node: str, batch: Batch, error: HoldfastError | None) -> None:
        """Note a node's answer for a batch; called by the senders."""
        if batch.moved:
            return
        was_at_quorum = batch.at_quorum
        if error is None:
            batch.acknowledged.add(node)
            self.sums.sent_bytes += batch.sealed_bytes
        elif error.code is ErrorCode.WRONG_EPOCH:
            self._stale = True
            self._progress.set()
            return
        else:
            batch.failed[node] = error
        if batch.at_quorum and not was_at_quorum:
            self._below_quorum -= 1
        if batch.lost and not batch.at_quorum and self._failure is None:
            self._failure = batch.loss()
        if batch.settled:
            del self._unsettled[batch.sequence]
            self._unsettled_bytes -= batch.sealed_bytes
            if batch.failed:
                self.sums.under_replicated_blocks += len(batch.block_ids)
        self._progress.set()

    async def _next_progress(self, timeout_s: float | None = None) -> bool:
        """Wait for something to happen; returns whether it did in time."""
        # Cleared before anything is awaited: what happens from here on is not missed.
        self._progress.clear()
        self._raise_failure()
        await self._replace_if_stale()
        moved = True
        if self._unsettled:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._progress.wait()
            except TimeoutError:
                moved = False
        self._raise_failure()
        return moved

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    async def _replace_if_stale(self) -> None:
        """Place everything that is not settled under the newest layout."""
        async with self._placing:
            while self._stale:
                self._replacements += 1
                if self._replacements > _REPLACEMENTS_MAX:
                    raise HoldfastError(ErrorCode.CONFLICT, "the layout changed too often during the upload; try again")
                self._stale = False
                epochs = [batch.layout_epoch for batch in self._unsettled.values()]
                await self._access.refresh(seen_epoch=max(epochs, default=self._access.newest().epoch))
                self._revive()
                moved = list(self._unsettled.values())
                self._unsettled.clear()
                self._unsettled_bytes = 0
                for batch in moved:
                    if not batch.at_quorum:
                        self._below_quorum -= 1
                    batch.moved = True
                again = [block for batch in moved for block in batch.blocks()]
                waiting = [block for open_batch in self._open.values() for block in open_batch.blocks]
                self._open.clear()
                self._open_bytes = 0
                await self._place([Outgoing(block, 0) for block in again + waiting], count=False)

    def _revive(self) -> None:
        """Forget senders that a newer layout ended; their successors use the new epoch."""
        for node, sender in list(self._senders.items()):
            if sender.dead is not None and sender.dead.code is ErrorCode.WRONG_EPOCH:
                del self._senders[node]
