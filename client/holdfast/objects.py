"""Stored objects: cut by content and written through the uploader, read as ordered pieces from any offset.

Memory is flat: a few pieces are cut ahead, a few windows are fetched ahead, whatever the object's size.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from typing import Final

from holdfast.access import Access
from holdfast.content import WINDOW_BYTES, ContentReader, Entry
from holdfast.damage import DamageReport
from holdfast.index import DAMAGE, IndexReader
from holdfast.points import IndexSink, ReadSums
from holdfast.results import Progress, ProgressCallback
from holdfast.spans import FingerprintCache, SealedSpan, SpanContext, seal_cuts
from holdfast.uploader import Outgoing, Uploader
from holdfast_core.model.block import Codec, Kind
from holdfast_core.model.errors import HoldfastError
from holdfast_core.model.tree import ObjectTreeBuilder, ObjectWalk, decode_object_leaf
from holdfast_proto.v1.records_pb2 import ObjectRecord

_CUT_BYTES_GUESS: Final = 256 * 1024
_WINDOWS_AHEAD: Final = 3


class ObjectWriter:
    """Writes one object through a session's uploader."""

    def __init__(
        self,
        access: Access,
        uploader: Uploader,
        executor: Executor,
        *,
        workers: int,
        key_epoch: int,
        progress: ProgressCallback | None,
    ) -> None:
        """Bind to a session."""
        self.sums = ReadSums()
        self._uploader = uploader
        self._executor = executor
        self._in_flight_max = 2 * workers
        self._progress = progress
        ring = access.ring
        sealer = ring.sealer(Kind.APPLICATION, key_epoch)
        self._context = SpanContext(ring, sealer, Codec.ZSTD, FingerprintCache(), frozenset())
        self._sink = IndexSink(ring.sealer(Kind.INDEX, ring.structure_epoch_newest))
        # Here and not above: loading the cutter takes a tenth of the SDK's import, and VMs do without it.
        from holdfast_core.model.cutting import Cutter

        self._cutter = Cutter(ring.cutting_key)
        self._tree = ObjectTreeBuilder(self._sink.store)
        self._block_count = 0

    async def write(self, pieces: AsyncIterator[bytes]) -> tuple[bytes, int]:
        """Cut and offer everything that `pieces` yields; returns the root and the number of cuts.

        Raises:
            HoldfastError: what the uploader raises. Errors of `pieces` pass through.
        """
        loop = asyncio.get_running_loop()
        pending: deque[tuple[Sequence[bytes], asyncio.Future[SealedSpan]]] = deque()
        async for piece in pieces:
            self.sums.logical_bytes += len(piece)
            self.sums.read_bytes += len(piece)
            cuts = await loop.run_in_executor(self._executor, self._cutter.feed, piece)
            if cuts:
                pending.append((cuts, loop.run_in_executor(self._executor, seal_cuts, self._context, cuts)))
            while len(pending) > self._in_flight_max:
                await self._take(*pending.popleft())
        cuts = await loop.run_in_executor(self._executor, self._cutter.finish)
        if cuts:
            pending.append((cuts, loop.run_in_executor(self._executor, seal_cuts, self._context, cuts)))
        while pending:
            await self._take(*pending.popleft())
        root = self._tree.finish()
        await self._uploader.offer(self._sink.take())
        return root, self._block_count

    async def _take(self, cuts: Sequence[bytes], future: asyncio.Future[SealedSpan]) -> None:
        span = await future
        for cut, fingerprint, reference in zip(cuts, span.fingerprints, span.references, strict=True):
            self._tree.add(fingerprint, reference[0], len(cut))
        self._block_count += len(cuts)
        self.sums.changed_bytes += span.changed_bytes
        self.sums.changed_blocks += span.changed_blocks
        self.sums.reused_bytes += span.reused_bytes
        outgoing = [Outgoing(block, plain_bytes) for block, plain_bytes in span.new]
        await self._uploader.offer(outgoing + self._sink.take())
        if self._progress is not None:
            self._progress(Progress("send", self.sums.logical_bytes, 0))


async def object_windows(
    index: IndexReader, record: ObjectRecord, *, start: int, end: int, what: str
) -> AsyncGenerator[list[Entry], None]:
    """Yield the entries that hold bytes `start` to before `end`, in order, in windows; keys are byte offsets.

    Raises:
        HoldfastError: CORRUPT, MISSING or UNREACHABLE, naming index nodes.
    """
    walk = ObjectWalk(record.root, block_count=record.block_count, size_bytes=record.size_bytes, start=start, end=end)
    window: list[Entry] = []
    window_bytes = 0
    while True:
        for leaf_ref in walk.take_leaves():
            plain = await index.nodes([leaf_ref.leaf_id], what=what)
            leaf = decode_object_leaf(leaf_ref, plain[leaf_ref.leaf_id])
            offset = leaf_ref.byte_offset
            for length, fingerprint, block_id in zip(leaf.lengths, leaf.fingerprints, leaf.block_ids, strict=True):
                if offset < end and offset + length > start:
                    window.append(Entry(offset, length, fingerprint, block_id, b""))
                    window_bytes += length
                offset += length
                if window_bytes >= WINDOW_BYTES:
                    yield window
                    window, window_bytes = [], 0
        if walk.done:
            break
        walk.feed(await index.nodes(walk.wanted(), what=what))
    if window:
        yield window


async def read_object(
    index: IndexReader, content: ContentReader, record: ObjectRecord, *, start: int, end: int
) -> AsyncGenerator[bytes, None]:
    """Yield the object's bytes `start` to before `end` in order; a few windows are fetched ahead.

    Raises:
        HoldfastError: CORRUPT or MISSING with the byte ranges named, UNREACHABLE.
    """
    # Tasks rather than a task group: a generator may be advanced and closed from different tasks.
    what = f"object {record.storage_id}"
    ahead: deque[asyncio.Task[_Pieces]] = deque()
    try:
        async with aclosing(object_windows(index, record, start=start, end=end, what=what)) as windows:
            async for window in windows:
                ahead.append(asyncio.create_task(_read_window(content, window, what)))
                if len(ahead) >= _WINDOWS_AHEAD:
                    for piece in _trim(await ahead.popleft(), start, end):
                        yield piece
            while ahead:
                for piece in _trim(await ahead.popleft(), start, end):
                    yield piece
    finally:
        for task in ahead:
            task.cancel()
        if ahead:
            await asyncio.wait(ahead)


_Pieces = list[tuple[int, bytes]]


async def _read_window(content: ContentReader, window: Sequence[Entry], what: str) -> _Pieces:
    found: dict[int, bytes] = {}
    damaged = await content.read(window, found.update, block_bytes=_CUT_BYTES_GUESS)
    if damaged is not None:
        report = DamageReport(what)
        report.add(damaged, "")
        error = report.error()
        assert error is not None, "damage has ids"
        raise error
    return sorted(found.items())


def _trim(pieces: _Pieces, start: int, end: int) -> list[bytes]:
    """Cut the first and last piece to the range asked for."""
    trimmed = []
    for offset, plain in pieces:
        low, high = max(0, start - offset), min(len(plain), end - offset)
        trimmed.append(plain if low == 0 and high == len(plain) else plain[low:high])
    return trimmed


def damage_of(error: HoldfastError) -> tuple[bytes, ...]:
    """Return the ids that an error proves lost, to be reported; none for other errors."""
    return error.block_ids if error.code in DAMAGE else ()
