"""A served volume: a recovery point's image below, what has been fetched of it above that, a guest's writes on top."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any, Final, TypeVar

from holdfast.descriptors import Extent
from holdfast.images.point_image import PointImage
from holdfast.serving.device import Span
from holdfast.serving.local_file import LocalFile
from holdfast.serving.overlay import GRAIN_BYTES, VolumeFiles
from holdfast.serving.range_locks import RangeLocks
from holdfast_core.model.errors import HoldfastError
from holdfast_core.model.limits import GIB, MIB
from holdfast_core.runtime.clock import Clock

PATIENCE_S: Final = 60.0
"""How long a read waits for a cluster that does not answer before the guest is told of an error."""

_RETRY_FIRST_S: Final = 0.2
_RETRY_MAX_S: Final = 5.0
_SPANS_BYTES_MAX: Final = 1 * GIB

Answer = TypeVar("Answer")


class ServedVolume:
    """One volume of a point, writable where it has local files (`Device`). The image and the files stay their owner's.

    Attributes:
        image: the volume as the point has it.
        reading: how many reads of guests wait for the image now; what works in the background gives way to them.
    """

    def __init__(
        self,
        image: PointImage,
        files: VolumeFiles | None,
        executor: Executor,
        *,
        point_id: str,
        clock: Clock,
        read_only: bool,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Bind to an image and the files over it, if there are any; without them it is read-only."""
        self.image = image
        self.reading = 0
        self._written = files.written if files is not None else None
        self._fetched = files.fetched if files is not None else None
        self._executor = executor
        self._point_id = point_id
        self._clock = clock
        self._read_only = read_only or files is None
        self._patience_s = patience_s
        self._locks = RangeLocks()
        self._syncing = asyncio.Lock()
        self._changes = 0
        self._synced = 0

    @property
    def name(self) -> str:
        """Name of the volume."""
        return self.image.name

    @property
    def description(self) -> str:
        """What it is."""
        return f"volume {self.image.name} of {self._point_id}"

    @property
    def size_bytes(self) -> int:
        """Size of the volume."""
        return self.image.size_bytes

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""
        return self._read_only

    async def pieces(self, offset: int, length: int) -> list[bytes]:
        """Return the bytes of a range: written, else fetched, else from the point.

        Raises:
            HoldfastError: CORRUPT, MISSING; UNREACHABLE if the cluster did not answer for long; SOURCE_UNREADABLE.
        """
        return await self._pieces(self._layers(offset, offset + length))

    async def _pieces(self, layers: list[tuple[int, int, LocalFile | None]]) -> list[bytes]:
        pieces: list[bytes] = []
        for start, end, file in layers:
            if file is not None:
                pieces.append(await self._in_thread(file.read, start, end - start))
            else:
                pieces += await self._remote(start, end - start)
        return pieces

    def _layers(self, start: int, end: int, *, below: bool = False) -> list[tuple[int, int, LocalFile | None]]:
        """Return (start, end, file) for runs of a range that come from one place; None is the point itself.

        `below` leaves out what was written.
        """
        runs: list[tuple[int, int, LocalFile | None]] = [(start, end, None)]
        for file in (None if below else self._written, self._fetched):
            if file is not None and file.map.held:
                runs = [part for run in runs for part in (_split(file, run) if run[2] is None else [run])]
        return runs

    async def _remote(self, offset: int, length: int) -> list[bytes]:
        self.reading += 1
        try:
            return await self._patiently(partial(self.image.pieces, offset, length))
        finally:
            self.reading -= 1

    async def _patiently(self, call: Callable[[], Awaitable[Answer]]) -> Answer:
        """Try again while the cluster does not answer: to a guest an error of its disk is worse than a pause."""
        deadline_s = self._clock.monotonic_s() + self._patience_s
        pause_s = _RETRY_FIRST_S
        while True:
            try:
                return await call()
            except HoldfastError as error:
                if not error.retryable or self._clock.monotonic_s() + pause_s > deadline_s:
                    raise
            await self._clock.sleep(pause_s)
            pause_s = min(2 * pause_s, _RETRY_MAX_S)

    async def write(self, offset: int, data: bytes) -> None:
        """Write over the point; durable at the next `flush`.

        Raises:
            HoldfastError: TARGET_UNWRITABLE; for parts of a grain also as `pieces`.
        """
        written = self._writable()
        end = offset + len(data)
        first, last = offset // GRAIN_BYTES, -(-end // GRAIN_BYTES)
        async with self._locks.hold(first, last):
            await self._fill_edges(written, offset, end)
            await self._in_thread(written.write, offset, data)
            self._mark(written, first, last)

    async def zero(self, offset: int, length: int, *, allocate: bool) -> None:
        """Make a range zeros.

        Raises:
            HoldfastError: as `write`.
        """
        written = self._writable()
        end = offset + length
        first, last = offset // GRAIN_BYTES, -(-end // GRAIN_BYTES)
        async with self._locks.hold(first, last):
            await self._fill_edges(written, offset, end)
            await self._in_thread(lambda: written.zero(offset, length, allocate=allocate))
            self._mark(written, first, last)

    async def trim(self, offset: int, length: int) -> None:
        """Make the whole grains of a range zeros; what is left of it at the edges stays as it is.

        Raises:
            HoldfastError: TARGET_UNWRITABLE.
        """
        end = offset + length
        start = -(-offset // GRAIN_BYTES) * GRAIN_BYTES
        stop = end if end == self.size_bytes else end // GRAIN_BYTES * GRAIN_BYTES
        if start < stop:
            await self.zero(start, stop - start, allocate=False)

    def _writable(self) -> LocalFile:
        assert self._written is not None, "the server refuses writes to what is read-only"
        return self._written

    def _mark(self, file: LocalFile, first: int, last: int) -> None:
        file.map.add(first, last)
        self._changes += 1

    async def _fill_edges(self, written: LocalFile, start: int, end: int) -> None:
        """Bring the rest of grains that a write covers in part, if they are still the point's."""
        edges = {at // GRAIN_BYTES for at in (start, end) if at % GRAIN_BYTES and at != self.size_bytes}
        for grain in edges:
            _, _, held = next(written.map.runs(grain, grain + 1))
            if not held:
                begin = grain * GRAIN_BYTES
                length = min(GRAIN_BYTES, self.size_bytes - begin)
                content = b"".join(await self._pieces(self._layers(begin, begin + length, below=True)))
                await self._in_thread(written.write, begin, content)
                self._mark(written, grain, grain + 1)

    async def flush(self) -> None:
        """Bring everything written so far to the disk; calls that wait for one another share the work.

        Raises:
            HoldfastError: TARGET_UNWRITABLE.
        """
        wanted = self._changes
        if self._written is None:
            return
        async with self._syncing:
            if self._synced < wanted:
                reached = self._changes
                await self._sync(self._written)
                self._synced = reached

    async def _sync(self, file: LocalFile) -> None:
        pages = file.map.take_changed()
        try:
            await self._in_thread(file.sync, pages)
        except BaseException:
            file.map.give_back(pages)
            raise

    async def keep_fetched(self, offset: int, pieces: list[bytes]) -> None:
        """Keep whole blocks of the point here; what is zero stays a hole.

        Raises:
            HoldfastError: TARGET_UNWRITABLE.
        """
        fetched = self._fetched
        assert fetched is not None, "only what has local files is fetched"

        def write() -> int:
            at = offset
            for piece in pieces:
                if piece != bytes(len(piece)):
                    fetched.write(at, piece)
                at += len(piece)
            return at

        end = await self._in_thread(write)
        fetched.map.add(offset // fetched.unit_bytes, -(-end // fetched.unit_bytes))

    async def sync_fetched(self) -> None:
        """Bring what has been fetched to the disk.

        Raises:
            HoldfastError: TARGET_UNWRITABLE.
        """
        if self._fetched is not None:
            await self._sync(self._fetched)

    def unfetched(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the ranges in bytes that no hydrate has brought yet."""
        assert self._fetched is not None, "only what has local files is fetched"
        return [(low, high) for low, high, file in _split(self._fetched, (start, end, None)) if file is None]

    async def spans(self, offset: int, length: int) -> list[Span]:
        """Say what is zero, for a gibibyte at most.

        Raises:
            HoldfastError: as `pieces`.
        """
        end = offset + min(length, _SPANS_BYTES_MAX)
        spans: list[Span] = []
        for start, stop, file in self._layers(offset, end):
            if file is not None:
                extents: Sequence[Extent] = await self._in_thread(file.extents, start, stop)
            else:
                extents = await self._patiently(partial(self.image.extents, start, stop))
            at = start
            for extent in extents:
                _append(spans, extent.start - at, zero=True)
                _append(spans, extent.end - extent.start, zero=False)
                at = extent.end
            _append(spans, stop - at, zero=True)
        return spans

    def fetch_ahead(self, offset: int, length: int) -> None:
        """Begin to fetch what is not here yet, some of it at least."""
        length = min(length, 4 * MIB)
        if self._fetched is None:
            self.image.fetch_ahead(offset, offset + length)
            return
        for start, end in self.unfetched(offset, offset + length):
            self.image.fetch_ahead(start, end)

    async def _in_thread(self, call: Callable[..., Answer], *arguments: Any) -> Answer:
        """Run a call in a thread; who is cancelled waits for it all the same, so that no write outlives its lock."""
        future = asyncio.get_running_loop().run_in_executor(self._executor, call, *arguments)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait((future,))
            raise


def _split(file: LocalFile, run: tuple[int, int, LocalFile | None]) -> list[tuple[int, int, LocalFile | None]]:
    """Return the parts of a run of the point that `file` has and has not."""
    start, end, unit = run[0], run[1], file.unit_bytes
    return [
        (max(start, first * unit), min(end, last * unit), file if held else None)
        for first, last, held in file.map.runs(start // unit, -(-end // unit))
    ]


def _append(spans: list[Span], length: int, *, zero: bool) -> None:
    if not length:
        return
    if spans and spans[-1].zero == zero:
        length += spans.pop().length
    spans.append(Span(length, zero))
