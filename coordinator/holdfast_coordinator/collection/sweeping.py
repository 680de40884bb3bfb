"""Sweeping one tenant: what nodes list is compared with the marks, range by range, and garbage is deleted in batches.

Every node is asked, owner or not. One that fails is left out from there on, and looked at next time. Nothing here keeps
anything safe: that a block which is leaned on stays is decided by its stamp, on the node (docs/healing.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final

from holdfast_coordinator.collection.planning import PagePlan, plan_copies, plan_page, plan_ranges
from holdfast_coordinator.collection.scanner import NodeScanner
from holdfast_coordinator.collection.spool import MarkSpool
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.layout import Layout
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.logs import get_log
from holdfast_proto.v1.blocks_pb2 import VERDICT_KEPT, VERDICT_OK
from holdfast_proto.v1.collection_pb2 import CollectionReport

# What a range holds in memory at once; a node that answers adds about 100 bytes a mark that it holds.
MARKS_PER_RANGE: Final = 131_072
DELETES_PER_BATCH: Final = 4096
LOST_IDS_MAX: Final = 65_536
_NODES_AT_ONCE: Final = 16
_ATTEMPTS: Final = 3
_PAUSE_S: Final = 1.0
_PASSING: Final = (ErrorCode.UNREACHABLE, ErrorCode.NOT_READY)


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """What is swept.

    Attributes:
        tenant: number of the tenant.
        cutoff: blocks that are stamped with this epoch or a later one stay.
        newest: the newest layout.
        dry_run: whether nothing is deleted.
    """

    tenant: int
    cutoff: int
    newest: Layout
    dry_run: bool


@dataclass(slots=True)
class Nodes:
    """The nodes of a collection.

    Attributes:
        present: those that are asked.
        needed: those of the living layouts, which all have to answer before a block counts as lost.
        left_out: those that are asked no more, with the reason.
    """

    present: set[str]
    needed: frozenset[str]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every node that may have to has answered so far."""
        return self.needed <= self.present

    def leave_out(self, node_id: str, why: str) -> None:
        """Ask a node no more."""
        self.present.discard(node_id)
        if node_id not in self.left_out:
            self.left_out[node_id] = why
            get_log("collection").warning("node left out", node_id=node_id, why=why)


class Sweeper:
    """Sweeps a tenant. Belongs to one collection."""

    def __init__(
        self,
        scanner: NodeScanner,
        nodes: Nodes,
        report: CollectionReport,
        *,
        clock: Clock,
        check: Callable[[], Awaitable[None]],
        marks_per_range: int = MARKS_PER_RANGE,
    ) -> None:
        """Bind to the nodes; counts go into `report`, and `check` raises once another collection has taken over."""
        self._scanner = scanner
        self._nodes = nodes
        self._report = report
        self._clock = clock
        self._check = check
        self._marks_per_range = marks_per_range
        self._slots = asyncio.Semaphore(_NODES_AT_ONCE)

    async def sweep(self, plan: SweepPlan, marks: MarkSpool) -> list[bytes]:
        """Sweep all partitions; return marked ids that no node listed, if all nodes answered that have to.

        At most `LOST_IDS_MAX` are returned; where there are more, the next collection finds them.

        Raises:
            HoldfastError: CONFLICT if another collection has begun, or if a node has seen a higher cut-off of this
                tenant's; DISK_FULL or UNREACHABLE if marks cannot be read back.
        """
        nowhere: list[bytes] = []
        counts = [marks.count(partition) for partition in range(plan.newest.partitions)]
        for first, end in plan_ranges(counts, marks_max=self._marks_per_range):
            await self._check()
            here = await asyncio.to_thread(marks.marks, first, end)
            everything = frozenset().union(*here.values())
            held: dict[str, set[bytes]] = {}
            async with plain_task_group() as group:
                for node_id in sorted(self._nodes.present):
                    group.create_task(self._sweep_node(plan, node_id, (first, end), everything, held))
            copies = plan_copies(here, held, plan.newest)
            self._report.marked_blocks += len(everything)
            self._report.thin_blocks += copies.thin
            nowhere += copies.nowhere[: LOST_IDS_MAX - len(nowhere)]
        return nowhere if self._nodes.complete else []

    async def _sweep_node(
        self,
        plan: SweepPlan,
        node_id: str,
        partitions: tuple[int, int],
        marks: frozenset[bytes],
        held: dict[str, set[bytes]],
    ) -> None:
        """Sweep a range on one node, and say in `held` which marks it has; a node that fails is left out."""
        mine: set[bytes] = set()
        sweep = _NodeSweep(node_id, mine)
        async with self._slots:
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    await self._go_on(plan, sweep, partitions, marks)
                except _Stopped as stopped:
                    raise stopped.error from stopped
                except HoldfastError as error:
                    if error.code is ErrorCode.CONFLICT:
                        raise
                    if error.code not in _PASSING or attempt == _ATTEMPTS:
                        self._nodes.leave_out(node_id, error.message)
                        return
                else:
                    held[node_id] = mine
                    return
                await self._clock.sleep(_PAUSE_S)

    async def _go_on(
        self, plan: SweepPlan, sweep: _NodeSweep, partitions: tuple[int, int], marks: frozenset[bytes]
    ) -> None:
        """Go on with a range behind the last page that was dealt with."""
        if sweep.garbage:
            await self._delete(plan, sweep)
        if sweep.ended:
            return
        listing = self._scanner.listed(
            sweep.node_id, plan.tenant, first=partitions[0], end=partitions[1], after=sweep.after
        )
        async with aclosing(listing) as pages:
            async for page in pages:
                if not page.block_ids:
                    continue
                found = plan_page(page, marks, cutoff=plan.cutoff)
                sweep.after = page.block_ids[-1]
                sweep.held.update(found.held)
                self._count(found, len(page.block_ids))
                sweep.garbage.extend(zip(found.garbage, found.garbage_lengths, strict=True))
                if len(sweep.garbage) >= DELETES_PER_BATCH:
                    await self._delete(plan, sweep)
        sweep.ended = True
        await self._delete(plan, sweep)

    def _count(self, found: PagePlan, listed: int) -> None:
        report = self._report
        report.listed_copies += listed
        report.garbage_copies += len(found.garbage)
        report.garbage_bytes += sum(found.garbage_lengths)
        report.young_copies += found.young_copies
        report.young_bytes += found.young_bytes

    async def _delete(self, plan: SweepPlan, sweep: _NodeSweep) -> None:
        """Delete what has gathered. What fails stays gathered, and is harmless to delete again."""
        if plan.dry_run:
            sweep.garbage.clear()
        while sweep.garbage:
            try:
                await self._check()
            except HoldfastError as error:
                raise _Stopped(error) from error
            batch = sweep.garbage[:DELETES_PER_BATCH]
            ids = [block_id for block_id, _ in batch]
            verdicts = await self._scanner.delete(sweep.node_id, plan.tenant, ids, cutoff=plan.cutoff)
            self._count_deleted(batch, verdicts)
            del sweep.garbage[: len(batch)]

    def _count_deleted(self, batch: Sequence[tuple[bytes, int]], verdicts: bytes) -> None:
        report = self._report
        for (_, length), verdict in zip(batch, verdicts, strict=True):
            if verdict == VERDICT_OK:
                report.deleted_copies += 1
                report.deleted_bytes += length
            elif verdict == VERDICT_KEPT:
                # Stamped since it was listed: somebody leans on it, or may.
                report.garbage_copies -= 1
                report.garbage_bytes -= length
                report.young_copies += 1
                report.young_bytes += length


@dataclass(slots=True)
class _NodeSweep:
    """How far a node's range has come."""

    node_id: str
    held: set[bytes]
    garbage: list[tuple[bytes, int]] = field(default_factory=list)
    after: bytes = b""
    ended: bool = False


class _Stopped(Exception):
    """The collection is not the one any more; told apart from what a node says."""

    def __init__(self, error: HoldfastError) -> None:
        super().__init__(error.message)
        self.error = error
