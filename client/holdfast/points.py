"""Making a recovery point: read every volume in spans, keep what is new, name the rest, commit.

The producer walks the allocated ranges leaf by leaf beside the parent's index and hands spans to sealers; the results
are taken in order, so index trees grow from left to right while later spans are sealed and earlier ones sent.
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
from holdfast.sealers import LeafSpans, SealingProcesses, SessionProcesses, ThreadSealer, VolumeSealer
from holdfast.sources import SharedSource, VolumeSource, open_source
from holdfast.spans import FingerprintCache, SealedSpan, SpanContext, spans_of_leaf
from holdfast.uploader import Outgoing, Uploader
from holdfast_core.model.block import Codec, Kind, Sealer
from holdfast_core.model.limits import GIB, MIB, TREE_FAN_OUT
from holdfast_core.model.tree import VolumeLeaf, VolumeTreeBuilder
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_proto.v1.records_pb2 import PointRecord, VmRecord, VolumeRecord, VolumeSpec

_SCAN_BYTES: Final = GIB
_OFFERS_MAX: Final = 2
# Each offer is a question to every owner, which costs a node 2 ms whatever is asked: few large ones.
_OFFER_BYTES: Final = 5 * MIB


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
    """A span in a sealer's hands; `last` marks the last one of its leaf."""

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
        processes: SealingProcesses,
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
        self._processes = processes
        self._in_flight_max = 2 * workers + 1
        self._ring = access.ring
        self._sealer = access.ring.sealer(Kind.VOLUME, key_epoch)
        self._sink = IndexSink(access.ring.sealer(Kind.INDEX, access.ring.structure_epoch_newest))
        self._key_epoch = key_epoch
        # One a codec: which block a repeated content is named by must not depend on who met it first.
        self._caches: dict[Codec, FingerprintCache] = {}
        self._progress = progress
        self._damaged_index = damaged_index
        self._done_bytes = 0
        self._gathered: list[Outgoing] = []
        self._gathered_bytes = 0
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
            shared = {
                spec.name: source
                for spec, source in opened
                if spec.name not in sources.given and isinstance(source, SharedSource)
            }
            async with self._processes.lend(sum(source.data_bytes() for source in shared.values())) as processes:
                records = []
                for spec, source in opened:
                    sealer = self._sealer_of(spec, source, sources.damaged, processes, shared.get(spec.name))
                    records.append(await self._read_volume(spec, source, sealer, sources))
                return records
        finally:
            for _, source in opened:
                source.close()

    def _sealer_of(
        self,
        spec: VolumeSpec,
        source: VolumeSource,
        damaged: Container[bytes],
        processes: SessionProcesses | None,
        shared: SharedSource | None,
    ) -> VolumeSealer:
        codec = BLOCK_CODECS[volume_spec(spec).codec]
        cache = self._caches.setdefault(codec, FingerprintCache())
        context = SpanContext(self._ring, self._sealer, codec, cache, damaged)
        threads = ThreadSealer(self._executor, context, source, damaged=damaged)
        if processes is None or shared is None:
            return threads
        return processes.sealer(
            shared.shared(), threads, codec=codec, keys=self._ring.volume_keys(self._key_epoch), damaged=damaged
        )

    async def _read_volume(
        self, spec: VolumeSpec, source: VolumeSource, sealer: VolumeSealer, sources: PointSources
    ) -> VolumeRecord:
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
                    base_leaf = (await base.leaf(leaf_index))[1]
                    for item in _submit(sealer, source.size_bytes, leaf, spec.block_bytes, base_leaf):
                        pending.append(item)
                        while len(pending) > self._in_flight_max:
                            blocks += await self._take(pending.popleft(), builder, group, offers)
                while pending:
                    blocks += await self._take(pending.popleft(), builder, group, offers)
                root = builder.finish()
                self._gathered += self._sink.take()
                await self._offer(group, offers)
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
        self._gathered += [Outgoing(block, plain_bytes) for block, plain_bytes in span.new]
        self._gathered += self._sink.take()
        self._gathered_bytes += sum([len(block.data) for block, _ in span.new])
        if self._gathered_bytes >= _OFFER_BYTES:
            await self._offer(group, offers)
        self._tell(item.end_offset)
        return len(span.slots)

    async def _offer(self, group: asyncio.TaskGroup, offers: asyncio.Semaphore) -> None:
        """Offer what has been gathered, beside the reading."""
        outgoing, self._gathered, self._gathered_bytes = self._gathered, [], 0
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


def _submit(
    sealer: VolumeSealer, size_bytes: int, leaf: _Leaf, block_bytes: int, base: VolumeLeaf | None
) -> list[_Pending]:
    """Hand the spans of a leaf that lie within the volume to its sealer."""
    offset = leaf.index * block_bytes * TREE_FAN_OUT
    spans = [(first, end) for first, end in spans_of_leaf(block_bytes) if offset + first * block_bytes < size_bytes]
    futures = sealer.submit(LeafSpans(offset, spans, block_bytes, leaf.parent, base))
    return [
        _Pending(leaf, future, min(offset + end * block_bytes, size_bytes), (first, end) == spans[-1])
        for (first, end), future in zip(spans, futures, strict=True)
    ]


async def _abandon(pending: deque[_Pending]) -> None:
    """Cancel spans, and wait for those that run: they use the source, which is closed next."""
    running = [item.future for item in pending if not item.future.cancel()]
    if running:
        await asyncio.get_running_loop().run_in_executor(None, concurrent.futures.wait, running)
