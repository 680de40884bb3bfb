"""Making a recovery point: read every volume in spans, keep what is new, name the rest, commit.

The producer walks the allocated ranges leaf by leaf beside the parent's index and hands spans to sealers; the results
are taken in order, so index trees grow from left to right while later spans are sealed and earlier ones sent.
What is in flight is bounded by spans and by the uploader's bytes, never by the volume's size.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections import deque
from collections.abc import AsyncIterator, Callable, Container, Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final

from holdfast.access import Access
from holdfast.bases import BaseFetcher
from holdfast.convert import BLOCK_CODECS, CONSISTENCY_NUMBERS, volume_spec
from holdfast.deltas import DeltaCoder
from holdfast.hints import ChangedPart, IndexDamaged, ParentIndex, parent_places
from holdfast.index import IndexReader, LeafCursor
from holdfast.leaves import GrowingLeaf, KeptSubtrees, PendingSpan
from holdfast.planning import Planner, PointSources, VolumePlan
from holdfast.results import Progress, ProgressCallback
from holdfast.sealers import LeafSpans, SealingProcesses, SessionProcesses, ThreadSealer, VolumeSealer
from holdfast.sources import SharedSource
from holdfast.spans import SPAN_BYTES, FingerprintCache, SealedSpan, SpanContext, SpanSource, spans_of_leaf
from holdfast.uploader import Outgoing, Uploader
from holdfast_core.model.block import Codec, Kind, Sealer
from holdfast_core.model.limits import GIB, MIB, TREE_FAN_OUT
from holdfast_core.model.tree import VolumeLeaf, VolumeTreeBuilder
from holdfast_core.model.tree.shape import leaf_count
from holdfast_core.model.tree.walk import VolumeRef
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.blocks.reader import BlockReader
from holdfast_proto.v1.records_pb2 import VolumeRecord, VolumeSpec

_SCAN_BYTES: Final = GIB
_OFFERS_MAX: Final = 2
# Each offer is a question to every owner, which costs a node 2 ms whatever is asked: few large ones.
_OFFER_BYTES: Final = 8 * MIB
# Spans that are sealed but for blocks that wait for their bases: while these come over the network, reading goes on.
_AHEAD_MAX: Final = 8
# Where a hint leaves little to read of each leaf, many leaves hold no more than one otherwise.
_SPANS_MAX: Final = 64


@dataclass(slots=True)
class ReadSums:
    """What reading has seen; see `holdfast.results.TransferStats`."""

    logical_bytes: int = 0
    read_bytes: int = 0
    changed_bytes: int = 0
    changed_blocks: int = 0
    reused_bytes: int = 0
    delta_blocks: int = 0
    delta_plain_bytes: int = 0
    delta_bytes: int = 0
    sampled_bytes: int = 0


class IndexSink:
    """Seals index nodes and holds them until the next offer takes them along."""

    def __init__(self, sealer: Sealer) -> None:
        self._sealer = sealer
        self._waiting: list[Outgoing] = []

    def store(self, plain: bytes) -> bytes:
        """Seal a node; returns its id."""
        block = self._sealer.seal(plain, codec=Codec.ZSTD)
        self._waiting.append(Outgoing(block, len(plain), index=True))
        return block.id

    def take(self) -> list[Outgoing]:
        """Return what waits, and forget it."""
        taken, self._waiting = self._waiting, []
        return taken


@dataclass(slots=True)
class _Run:
    """A volume while it is read."""

    size_bytes: int
    block_bytes: int
    builder: VolumeTreeBuilder
    sealer: VolumeSealer
    deltas: DeltaCoder | None
    spans_max: int
    group: asyncio.TaskGroup
    offers: asyncio.Semaphore
    pending: deque[PendingSpan | KeptSubtrees] = field(default_factory=deque)
    blocks: int = 0
    upcoming_leaf: int = 0

    @property
    def leaf_count(self) -> int:
        """Number of leaves that the volume can have."""
        return leaf_count(-(-self.size_bytes // self.block_bytes))

    def first_is_ready(self) -> bool:
        """Whether what comes next need not be waited for."""
        if not self.pending:
            return False
        item = self.pending[0]
        return isinstance(item, KeptSubtrees) or item.span.done()

    def keep(self, ref: VolumeRef) -> None:
        """Name a subtree of the parent again when its turn comes."""
        last = self.pending[-1] if self.pending else None
        if isinstance(last, KeptSubtrees):
            last.refs.append(ref)
        else:
            self.pending.append(KeptSubtrees([ref]))


class PointReader:
    """Reads a VM's volumes into an uploader and returns their records.

    Attributes:
        sums: what was read so far.
        notices: sentences for people, about volumes that were read whole although there is a change tracker.
        lost_bases: blocks of parent or base that no owner could give; they would have been bases of deltas.
    """

    def __init__(
        self,
        access: Access,
        uploader: Uploader,
        index: IndexReader,
        blocks: BlockReader,
        executor: Executor,
        processes: SealingProcesses,
        *,
        workers: int,
        key_epoch: int,
        progress: ProgressCallback | None,
        damaged_index: Callable[[tuple[bytes, ...]], None],
    ) -> None:
        """Bind to a session; `damaged_index` is told of index nodes of parent or base that no owner could give."""
        self.sums = ReadSums()
        self.notices: list[str] = []
        self.lost_bases: list[bytes] = []
        self._sums_before = (0, 0, 0)
        self._uploader = uploader
        self._index = index
        self._executor = executor
        self._processes = processes
        self._in_flight_max = 2 * workers + 1
        self._ring = access.ring
        self._sealer = access.ring.sealer(Kind.VOLUME, key_epoch)
        self._sink = IndexSink(access.ring.sealer(Kind.INDEX, access.ring.structure_epoch_newest))
        self._key_epoch = key_epoch
        # One a codec, and with deltas one more: what a volume is made of must not depend on who met a content first.
        self._caches: dict[tuple[Codec, bool], FingerprintCache] = {}
        self._deltas: DeltaCoder | None = None
        if access.may_read_data:
            bases = BaseFetcher(
                blocks, access.ring.opener(), key_epoch=key_epoch, damaged=lambda ids: self.lost_bases.extend(ids)
            )
            self._deltas = DeltaCoder(bases, self._sealer, executor, self._cache(Codec.ZSTD, deltas=True))
        self._progress = progress
        self._damaged_index = damaged_index
        self._done_bytes = 0
        self._gathered: list[Outgoing] = []
        self._gathered_bytes = 0
        self._total_bytes = 0

    async def read(self, sources: PointSources, planner: Planner) -> list[VolumeRecord]:
        """Read all volumes; the sources stay open, finished.

        Raises:
            HoldfastError: SOURCE_UNREADABLE, VOLUME_CHANGED, or what the uploader raises.
        """
        plans = [await planner.plan(spec) for spec in sources.vm.volumes]
        self.notices += planner.notices
        self._total_bytes = sum(plan.source.size_bytes for plan in plans)
        self.sums.logical_bytes = self._total_bytes
        self.sums.sampled_bytes = planner.sampled_bytes
        shared = {
            plan.spec.name: plan.source
            for plan in plans
            if plan.spec.name not in sources.given and isinstance(plan.source, SharedSource)
        }
        to_read = sum(plan.read_bytes() for plan in plans if plan.spec.name in shared)
        async with self._processes.lend(to_read) as processes:
            return [await self._read_volume(plan, sources, processes, shared.get(plan.spec.name)) for plan in plans]

    def _sealer_of(
        self,
        plan: VolumePlan,
        damaged: Container[bytes],
        processes: SessionProcesses | None,
        shared: SharedSource | None,
    ) -> VolumeSealer:
        codec = _codec_of(plan.spec)
        cache = self._cache(codec, deltas=self._deltas_of(plan.spec) is not None)
        context = SpanContext(self._ring, self._sealer, codec, cache, damaged)
        part: SpanSource = plan.source
        if plan.changed is not None:
            part = ChangedPart(plan.source, plan.changed, plan.spec.block_bytes)
        threads = ThreadSealer(self._executor, context, part, damaged=damaged)
        if processes is None or shared is None:
            return threads
        return processes.sealer(
            shared.shared(), threads, codec=codec, keys=self._ring.volume_keys(self._key_epoch), damaged=damaged
        )

    def _cache(self, codec: Codec, *, deltas: bool) -> FingerprintCache:
        return self._caches.setdefault((codec, deltas), FingerprintCache())

    def _deltas_of(self, spec: VolumeSpec) -> DeltaCoder | None:
        return self._deltas if _codec_of(spec) is Codec.ZSTD and not spec.no_delta else None

    async def _read_volume(
        self, plan: VolumePlan, sources: PointSources, processes: SessionProcesses | None, shared: SharedSource | None
    ) -> VolumeRecord:
        source = plan.source
        run: _Run | None = None
        try:
            async with plain_task_group() as group:
                offers = asyncio.Semaphore(_OFFERS_MAX)
                run = self._run_of(plan, self._sealer_of(plan, sources.damaged, processes, shared), group, offers)
                try:
                    await self._fill(run, plan, sources)
                except IndexDamaged as damage:
                    # What was read so far is offered all the same: it counts as met, and is named again.
                    await self._drain(run)
                    plan = self._compared_after_all(plan, damage)
                    run = self._run_of(plan, self._sealer_of(plan, sources.damaged, processes, shared), group, offers)
                    await self._fill(run, plan, sources)
                root = run.builder.finish()
                self._gathered += self._sink.take()
                await self._offer(run)
            consistency = await asyncio.get_running_loop().run_in_executor(self._executor, source.finish)
        finally:
            await _abandon(run)
        self._done_bytes += source.size_bytes
        self._tell(0)
        return VolumeRecord(
            name=plan.spec.name,
            size_bytes=source.size_bytes,
            block_bytes=plan.spec.block_bytes,
            root=root,
            consistency=CONSISTENCY_NUMBERS[consistency],
            block_count=run.blocks,
            reading=plan.reading,
            reading_note=plan.note,
        )

    def _run_of(
        self, plan: VolumePlan, sealer: VolumeSealer, group: asyncio.TaskGroup, offers: asyncio.Semaphore
    ) -> _Run:
        size_bytes, block_bytes = plan.source.size_bytes, plan.spec.block_bytes
        builder = VolumeTreeBuilder(-(-size_bytes // block_bytes), self._sink.store)
        deltas = self._deltas_of(plan.spec)
        spans_max = self._in_flight_max + (_AHEAD_MAX if deltas is not None else 0)
        return _Run(size_bytes, block_bytes, builder, sealer, deltas, spans_max, group, offers)

    def _compared_after_all(self, plan: VolumePlan, damage: IndexDamaged) -> VolumePlan:
        """Begin anew without the hint; what was counted as changed will be counted again."""
        self._damaged_index(damage.block_ids)
        plan = plan.compared("the parent's index is damaged")
        self.notices.append(plan.notice())
        self.sums.changed_bytes, self.sums.changed_blocks, self.sums.reused_bytes = self._sums_before
        return plan

    async def _fill(self, run: _Run, plan: VolumePlan, sources: PointSources) -> None:
        """Read a volume into its tree.

        Raises:
            IndexDamaged: a hint cannot be used, because the parent's index cannot be read where it is needed.
        """
        self._sums_before = self.sums.changed_bytes, self.sums.changed_blocks, self.sums.reused_bytes
        if plan.changed is None or plan.parent is None:
            await self._read_all(run, plan, sources)
        else:
            await self._read_changed(run, ChangedPart(plan.source, plan.changed, run.block_bytes), plan.parent)
        await self._drain(run)

    async def _read_all(self, run: _Run, plan: VolumePlan, sources: PointSources) -> None:
        """Read all that is allocated, beside the leaves of parent and base."""
        parent = LeafCursor(self._index, plan.parent.record if plan.parent is not None else None)
        base = LeafCursor(self._index, plan.base)
        try:
            async for leaf_index in self._allocated_leaves(plan.source, run, 0, plan.source.size_bytes):
                parent_id, parent_leaf = await parent.leaf(leaf_index)
                base_leaf = (await base.leaf(leaf_index))[1]
                leaf = GrowingLeaf(leaf_index, b"" if parent_id in sources.damaged else parent_id, parent_leaf)
                await self._submit(run, leaf, base_leaf)
        finally:
            await parent.close()
            await base.close()
        for damage in (parent.damage, base.damage):
            if damage:
                self._damaged_index(damage)

    async def _read_changed(self, run: _Run, part: ChangedPart, parent: ParentIndex) -> None:
        """Read what changed, and keep the parent's subtrees between; a base's fingerprints are not looked at."""
        run.blocks = parent.record.block_count
        upcoming = 0
        async with aclosing(parent_places(parent, size_bytes=part.size_bytes, changed=part.changed)) as places:
            async for found in places:
                await self._read_new(run, part, range(upcoming, found.place.first_leaf))
                upcoming = found.place.end_leaf
                if found.leaf is None:
                    run.keep(found.place.ref)
                    continue
                run.blocks -= len(found.leaf.slots)
                index = found.place.ref.place
                if index < run.leaf_count:
                    slots = part.slots(index)
                    await self._submit(run, GrowingLeaf(index, found.place.ref.node_id, found.leaf, slots), None)
        await self._read_new(run, part, range(upcoming, run.leaf_count))

    async def _read_new(self, run: _Run, part: ChangedPart, leaves: range) -> None:
        """Read what changed where the parent has nothing."""
        ranges = part.changed.within(leaves.start * TREE_FAN_OUT, leaves.stop * TREE_FAN_OUT)
        if ranges:
            start, end = ranges[0][0] * run.block_bytes, min(ranges[-1][1] * run.block_bytes, run.size_bytes)
            async for leaf_index in self._allocated_leaves(part, run, start, end):
                await self._submit(run, GrowingLeaf(leaf_index, b"", None, part.slots(leaf_index)), None)

    async def _allocated_leaves(self, source: SpanSource, run: _Run, start: int, end: int) -> AsyncIterator[int]:
        """Yield the indexes of leaves that an allocated extent within the range touches, ascending, each once a run."""
        loop = asyncio.get_running_loop()
        leaf_bytes = run.block_bytes * TREE_FAN_OUT
        for low in range(start, end, _SCAN_BYTES):
            high = min(low + _SCAN_BYTES, end)
            for extent in await loop.run_in_executor(self._executor, source.allocated, low, high):
                first = max(run.upcoming_leaf, extent.start // leaf_bytes)
                for leaf_index in range(first, -(-extent.end // leaf_bytes)):
                    run.upcoming_leaf = leaf_index + 1
                    yield leaf_index

    async def _submit(self, run: _Run, leaf: GrowingLeaf, base: VolumeLeaf | None) -> None:
        """Hand the spans of a leaf to the sealer, and take what is in turn while too many are in flight."""
        run.pending.extend(_spans_of(run, leaf, base))
        while True:
            while run.first_is_ready():
                await self._advance(run)
            spans = [item for item in run.pending if isinstance(item, PendingSpan)]
            unsealed = [item for item in spans if not item.sealed.done()]
            few_enough = len(spans) <= _SPANS_MAX and _weight(spans) <= run.spans_max
            if few_enough and _weight(unsealed) <= self._in_flight_max:
                return
            waits = {spans[0].span, *(item.sealed for item in unsealed)}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)

    async def _drain(self, run: _Run) -> None:
        """Take all that is pending."""
        while run.pending:
            await self._advance(run)

    async def _advance(self, run: _Run) -> None:
        """Take the next item in turn."""
        item = run.pending.popleft()
        if isinstance(item, KeptSubtrees):
            for ref in item.refs:
                run.builder.reuse_subtree(ref.level, ref.place, ref.node_id)
        else:
            await self._take(item, run)

    async def _take(self, item: PendingSpan, run: _Run) -> None:
        """Wait for a span, pass its new blocks on, and close its leaf if it was the last."""
        span = await item.span
        self.sums.read_bytes += span.read_bytes
        self.sums.changed_bytes += span.changed_bytes
        self.sums.changed_blocks += span.changed_blocks
        self.sums.reused_bytes += span.reused_bytes
        self.sums.delta_blocks += span.delta_blocks
        self.sums.delta_plain_bytes += span.delta_plain_bytes
        self.sums.delta_bytes += span.delta_bytes
        leaf = item.leaf
        leaf.add(span)
        if item.last and (made := leaf.made()) is not None:
            run.blocks += len(made.slots)
            if leaf.parent_id and made == leaf.parent:
                run.builder.reuse_leaf(leaf.index, leaf.parent_id)
            else:
                run.builder.add_leaf(leaf.index, made)
        self._gathered += [Outgoing(block, plain_bytes) for block, plain_bytes in span.new]
        self._gathered += self._sink.take()
        self._gathered_bytes += sum([len(block.data) for block, _ in span.new])
        if self._gathered_bytes >= _OFFER_BYTES:
            await self._offer(run)
        self._tell(item.end_offset)

    async def _offer(self, run: _Run) -> None:
        """Offer what has been gathered, beside the reading."""
        outgoing, self._gathered, self._gathered_bytes = self._gathered, [], 0
        if not outgoing:
            return
        await run.offers.acquire()

        async def offer() -> None:
            try:
                await self._uploader.offer(outgoing)
            finally:
                run.offers.release()

        run.group.create_task(offer())

    def _tell(self, offset: int) -> None:
        if self._progress is not None:
            self._progress(Progress("send", self._done_bytes + offset, self._total_bytes))


def _codec_of(spec: VolumeSpec) -> Codec:
    return BLOCK_CODECS[volume_spec(spec).codec]


def _spans_of(run: _Run, leaf: GrowingLeaf, base: VolumeLeaf | None) -> list[PendingSpan]:
    """Hand the spans of a leaf that lie within the volume and hold something to read to its sealer."""
    offset = leaf.index * run.block_bytes * TREE_FAN_OUT
    spans = spans_of_leaf(run.block_bytes)
    if leaf.changed is not None and not isinstance(run.sealer, ThreadSealer):
        # A process sees the volume and not the hint, so each run of changed slots is a span of its own.
        step = spans[0][1]
        spans = [(at, min(end, at + step)) for first, end in leaf.changed for at in range(first, end, step)]
    spans = [
        (first, end)
        for first, end in spans
        if offset + first * run.block_bytes < run.size_bytes and leaf.reads(first, end)
    ]
    if not spans:
        # What is kept of the leaf still has its turn.
        nothing: concurrent.futures.Future[SealedSpan] = concurrent.futures.Future()
        nothing.set_result(SealedSpan())
        done = asyncio.wrap_future(nothing)
        return [PendingSpan(leaf, nothing, done, done, offset, last=True, weight=0.0)]
    every = run.deltas.every if run.deltas is not None else 0
    futures = run.sealer.submit(LeafSpans(offset, spans, run.block_bytes, leaf.parent, base, every))
    items = []
    for (first, end), future in zip(spans, futures, strict=True):
        sealed = span = asyncio.wrap_future(future)
        sealed.add_done_callback(_seen)
        if run.deltas is not None:
            span = run.group.create_task(run.deltas.complete(sealed, block_bytes=run.block_bytes, every=every))
        end_offset = min(offset + end * run.block_bytes, run.size_bytes)
        weight = leaf.share(first, end) * (end - first) * run.block_bytes / SPAN_BYTES
        items.append(PendingSpan(leaf, future, sealed, span, end_offset, (first, end) == spans[-1], weight))
    return items


def _weight(spans: Sequence[PendingSpan]) -> float:
    """Return how much spans hold, in full ones."""
    return sum(item.weight for item in spans)


def _seen(sealed: asyncio.Future[SealedSpan]) -> None:
    """Look at how a span ended: of several that fail, the first to be taken tells."""
    if not sealed.cancelled():
        sealed.exception()


async def _abandon(run: _Run | None) -> None:
    """Cancel spans, and wait for those that run: they use the source, which is closed next."""
    pending = run.pending if run is not None else ()
    futures = [item.future for item in pending if isinstance(item, PendingSpan)]
    running = [future for future in futures if not future.cancel()]
    if running:
        await asyncio.get_running_loop().run_in_executor(None, concurrent.futures.wait, running)
