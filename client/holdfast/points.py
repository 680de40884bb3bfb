"""Making a recovery point: read every volume in spans, keep what is new, name the rest, commit.

The producer walks the allocated ranges leaf by leaf beside the parent's index and hands spans to worker threads; the
results are taken in order, so index trees grow from left to right while later spans are sealed and earlier ones sent.
What is in flight is bounded by spans and by the uploader's bytes, never by the volume's size.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections import deque
from collections.abc import AsyncIterator, Callable, Container, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Final

from holdfast.access import Access
from holdfast.convert import BLOCK_CODECS, CONSISTENCY_NUMBERS, volume_spec
from holdfast.index import IndexReader, LeafCursor
from holdfast.results import Progress, ProgressCallback
from holdfast.sources import VolumeSource, open_source
from holdfast.spans import (
    FingerprintCache,
    LeafEntries,
    SealedSpan,
    SpanContext,
    leaf_entries,
    seal_volume_span,
    spans_of_leaf,
)
from holdfast.uploader import Outgoing, Uploader
from holdfast_core.model.block import Codec, Kind, Sealer
from holdfast_core.model.limits import GIB, TREE_FAN_OUT
from holdfast_core.model.tree import VolumeLeaf, VolumeTreeBuilder
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_proto.v1.records_pb2 import PointRecord, VmRecord, VolumeRecord, VolumeSpec

_SCAN_BYTES: Final = GIB
_OFFERS_MAX: Final = 4


@dataclass(slots=True)
class ReadSums:
    """What reading has seen; see `holdfast.results.TransferStats`."""

    logical_bytes: int = 0
    read_bytes: int = 0
    changed_bytes: int = 0
    changed_blocks: int = 0
    reused_bytes: int = 0


@dataclass(slots=True)
class _Leaf:
    """A leaf that is being put together from its spans."""

    index: int
    parent_id: bytes
    parent: VolumeLeaf | None
    slots: list[int] = field(default_factory=list)
    fingerprints: list[bytes] = field(default_factory=list)
    block_ids: list[bytes] = field(default_factory=list)
    base_ids: list[bytes] = field(default_factory=list)

    def add(self, span: SealedSpan) -> None:
        """Take the next span's part."""
        self.slots.extend(span.slots)
        self.fingerprints.extend(span.fingerprints)
        for block_id, base_id in span.references:
            self.block_ids.append(block_id)
            self.base_ids.append(base_id)

    def made(self) -> VolumeLeaf:
        """Return the leaf as it is now."""
        return VolumeLeaf(tuple(self.slots), tuple(self.fingerprints), tuple(self.block_ids), tuple(self.base_ids))


@dataclass(frozen=True, slots=True)
class _Pending:
    """A span in a worker thread; `last` marks the last one of its leaf."""

    leaf: _Leaf
    future: concurrent.futures.Future[SealedSpan]
    end_offset: int
    last: bool


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


@dataclass(frozen=True, slots=True)
class PointSources:
    """What a point is made from: the registration, and earlier points whose content may be named."""

    vm: VmRecord
    parent: PointRecord | None
    base: PointRecord | None
    damaged: Container[bytes]
    given: Mapping[str, VolumeSource]


class PointReader:
    """Reads a VM's volumes into an uploader and returns their records."""

    def __init__(
        self,
        access: Access,
        uploader: Uploader,
        index: IndexReader,
        executor: Executor,
        *,
        workers: int,
        key_epoch: int,
        progress: ProgressCallback | None,
        damaged_index: Callable[[tuple[bytes, ...]], None],
    ) -> None:
        """Bind to a session; `damaged_index` is told of index nodes of parent or base that no owner could give."""
        self.sums = ReadSums()
        self._uploader = uploader
        self._index = index
        self._executor = executor
        self._in_flight_max = 2 * workers + 1
        self._ring = access.ring
        self._sealer = access.ring.sealer(Kind.VOLUME, key_epoch)
        self._sink = IndexSink(access.ring.sealer(Kind.INDEX, access.ring.structure_epoch_newest))
        self._cache = FingerprintCache()
        self._progress = progress
        self._damaged_index = damaged_index
        self._done_bytes = 0
        self._total_bytes = 0

    async def read(self, sources: PointSources) -> list[VolumeRecord]:
        """Read all volumes.

        Raises:
            HoldfastError: SOURCE_UNREADABLE, VOLUME_CHANGED, or what the uploader raises.
        """
        loop = asyncio.get_running_loop()
        opened: list[tuple[VolumeSpec, VolumeSource]] = []
        try:
            for spec in sources.vm.volumes:
                source = sources.given.get(spec.name)
                if source is None:
                    source = await loop.run_in_executor(self._executor, open_source, volume_spec(spec))
                opened.append((spec, source))
            self._total_bytes = sum(source.size_bytes for _, source in opened)
            self.sums.logical_bytes = self._total_bytes
            return [await self._read_volume(spec, source, sources) for spec, source in opened]
        finally:
            for _, source in opened:
                source.close()

    async def _read_volume(self, spec: VolumeSpec, source: VolumeSource, sources: PointSources) -> VolumeRecord:
        context = SpanContext(
            self._ring, self._sealer, BLOCK_CODECS[volume_spec(spec).codec], self._cache, sources.damaged
        )
        builder = VolumeTreeBuilder(-(-source.size_bytes // spec.block_bytes), self._sink.store)
        parent = LeafCursor(self._index, _same_volume(sources.parent, spec))
        base = LeafCursor(self._index, _same_volume(sources.base, spec))
        pending: deque[_Pending] = deque()
        blocks = 0
        try:
            async with plain_task_group() as group:
                offers = asyncio.Semaphore(_OFFERS_MAX)
                async for leaf_index in self._allocated_leaves(source, spec.block_bytes * TREE_FAN_OUT):
                    parent_id, parent_leaf = await parent.leaf(leaf_index)
                    leaf = _Leaf(leaf_index, b"" if parent_id in sources.damaged else parent_id, parent_leaf)
                    known = leaf_entries(parent_leaf, sources.damaged)
                    similar = leaf_entries((await base.leaf(leaf_index))[1], sources.damaged)
                    for item in self._submit(context, source, leaf, spec.block_bytes, known, similar):
                        pending.append(item)
                        while len(pending) > self._in_flight_max:
                            blocks += await self._take(pending.popleft(), builder, group, offers)
                while pending:
                    blocks += await self._take(pending.popleft(), builder, group, offers)
                root = builder.finish()
                await self._offer(self._sink.take(), group, offers)
            consistency = source.finish()
        finally:
            await _abandon(pending)
            await parent.close()
            await base.close()
        for damage in (parent.damage, base.damage):
            if damage:
                self._damaged_index(damage)
        self._done_bytes += source.size_bytes
        self._tell(0)
        return VolumeRecord(
            name=spec.name,
            size_bytes=source.size_bytes,
            block_bytes=spec.block_bytes,
            root=root,
            consistency=CONSISTENCY_NUMBERS[consistency],
            block_count=blocks,
        )

    async def _allocated_leaves(self, source: VolumeSource, leaf_bytes: int) -> AsyncIterator[int]:
        """Yield the indexes of leaves that any allocated extent touches, ascending."""
        loop = asyncio.get_running_loop()
        upcoming = 0
        for start in range(0, source.size_bytes, _SCAN_BYTES):
            end = min(start + _SCAN_BYTES, source.size_bytes)
            for extent in await loop.run_in_executor(self._executor, source.allocated, start, end):
                for leaf_index in range(max(upcoming, extent.start // leaf_bytes), -(-extent.end // leaf_bytes)):
                    yield leaf_index
                    upcoming = leaf_index + 1

    def _submit(
        self,
        context: SpanContext,
        source: VolumeSource,
        leaf: _Leaf,
        block_bytes: int,
        parent: LeafEntries,
        base: LeafEntries,
    ) -> list[_Pending]:
        leaf_offset = leaf.index * block_bytes * TREE_FAN_OUT
        items = []
        for first, end in spans_of_leaf(block_bytes):
            if leaf_offset + first * block_bytes >= source.size_bytes:
                break
            future = self._executor.submit(
                seal_volume_span,
                context,
                source,
                leaf_offset=leaf_offset,
                first_slot=first,
                end_slot=end,
                block_bytes=block_bytes,
                parent=parent,
                base=base,
            )
            end_offset = min(leaf_offset + end * block_bytes, source.size_bytes)
            last = end == TREE_FAN_OUT or end_offset == source.size_bytes
            items.append(_Pending(leaf, future, end_offset, last))
        return items

    async def _take(
        self, item: _Pending, builder: VolumeTreeBuilder, group: asyncio.TaskGroup, offers: asyncio.Semaphore
    ) -> int:
        """Wait for a span, pass its new blocks on, and close its leaf if it was the last; returns its block count."""
        span = await asyncio.wrap_future(item.future)
        self.sums.read_bytes += span.read_bytes
        self.sums.changed_bytes += span.changed_bytes
        self.sums.changed_blocks += span.changed_blocks
        self.sums.reused_bytes += span.reused_bytes
        leaf = item.leaf
        leaf.add(span)
        if item.last and leaf.slots:
            made = leaf.made()
            if leaf.parent_id and made == leaf.parent:
                builder.reuse_leaf(leaf.index, leaf.parent_id)
            else:
                builder.add_leaf(leaf.index, made)
        outgoing = [Outgoing(block, plain_bytes) for block, plain_bytes in span.new]
        await self._offer(outgoing + self._sink.take(), group, offers)
        self._tell(item.end_offset)
        return len(span.slots)

    async def _offer(self, outgoing: list[Outgoing], group: asyncio.TaskGroup, offers: asyncio.Semaphore) -> None:
        """Offer blocks beside the reading, a few spans at once."""
        if not outgoing:
            return
        await offers.acquire()

        async def offer() -> None:
            try:
                await self._uploader.offer(outgoing)
            finally:
                offers.release()

        group.create_task(offer())

    def _tell(self, offset: int) -> None:
        if self._progress is not None:
            self._progress(Progress("send", self._done_bytes + offset, self._total_bytes))


def _same_volume(point: PointRecord | None, spec: VolumeSpec) -> VolumeRecord | None:
    """Return the volume of an earlier point that can be compared block by block."""
    for volume in point.volumes if point is not None else ():
        if volume.name == spec.name and volume.block_bytes == spec.block_bytes:
            return volume
    return None


async def _abandon(pending: deque[_Pending]) -> None:
    """Cancel spans, and wait for those that run: they use the source, which is closed next."""
    running = [item.future for item in pending if not item.future.cancel()]
    if running:
        await asyncio.get_running_loop().run_in_executor(None, concurrent.futures.wait, running)
