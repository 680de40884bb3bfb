"""One volume of a recovery point, readable at any place without restoring it.

Blocks are fetched when they are asked for, verified and opened as everywhere, and kept in a bounded cache; a block that
several readers ask for at once is fetched once; readers that go forward get blocks ahead. The image has threads of its
own: who reads it from a manager's worker thread waits for them and not for himself.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Final

from holdfast.access import Access
from holdfast.content import ContentDamage, ContentReader, Entry
from holdfast.descriptors import Extent
from holdfast.images import CACHE_BYTES_DEFAULT, READ_AHEAD_BYTES_DEFAULT
from holdfast.images.block_cache import BlockCache
from holdfast.images.flights import Flight
from holdfast.images.leaves import GROUP_LEAVES, LeafMap
from holdfast.images.read_ahead import ReadAhead
from holdfast.index import DAMAGE, IndexReader, block_count_of
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import KIB, MIB, TREE_FAN_OUT
from holdfast_proto.v1.records_pb2 import VolumeRecord

THREADS: Final = 2

_AHEAD_FIRST_BYTES: Final = 256 * KIB
_FLIGHT_BYTES_MAX: Final = 8 * MIB
_LEAF_GROUP_BLOCKS: Final = GROUP_LEAVES * TREE_FAN_OUT

ReportDamage = Callable[[tuple[bytes, ...]], Awaitable[None]]
"""Told of block ids that no owner could give."""


class PointImage:
    """A volume of a point. Belongs to an event loop; calls may overlap. An async context manager, or call `close`.

    Attributes:
        name: the volume's name.
        size_bytes: size of the volume.
        block_bytes: bytes of a block; the last one may be shorter.
        fetched_blocks: how many blocks have been fetched so far.
    """

    def __init__(
        self,
        access: Access,
        volume: VolumeRecord,
        *,
        cache_bytes: int = CACHE_BYTES_DEFAULT,
        read_ahead_bytes: int = READ_AHEAD_BYTES_DEFAULT,
        report_damage: ReportDamage | None = None,
    ) -> None:
        """Take access to a point's content; nothing is fetched yet.

        Args:
            access: rights to the point, or to a session that builds on it.
            volume: the volume's record, whose point has been checked.
            cache_bytes: bound of the blocks that are kept.
            read_ahead_bytes: bound of what a reader that goes forward gets ahead; 0 turns it off.
            report_damage: told of blocks that turned out lost.
        """
        self.name = volume.name
        self.size_bytes = volume.size_bytes
        self.block_bytes = volume.block_bytes
        self.fetched_blocks = 0
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="holdfast-image")
        index = IndexReader(access.reader(self._executor), access.ring.opener(), self._executor)
        self._leaves = LeafMap(index, volume)
        self._content = ContentReader(access, self._executor)
        self._positions = block_count_of(volume)
        self._cache = BlockCache(cache_bytes)
        ahead_blocks = min(read_ahead_bytes, cache_bytes // 4) // volume.block_bytes
        first_blocks = max(1, _AHEAD_FIRST_BYTES // volume.block_bytes)
        self._ahead = ReadAhead(first_blocks=first_blocks, blocks_max=ahead_blocks, blocks_total=self._positions)
        self._flight_blocks = max(1, _FLIGHT_BYTES_MAX // volume.block_bytes)
        self._flying: dict[int, Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._report = report_damage
        self._closed = False

    async def __aenter__(self) -> PointImage:
        """Return the image."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the image."""
        await self.close()

    async def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`.

        Raises:
            HoldfastError: INVALID_ARGUMENT for a range that is not within the volume; CORRUPT, MISSING or UNREACHABLE.
        """
        pieces = await self.pieces(offset, length)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def pieces(self, offset: int, length: int) -> list[bytes]:
        """Return what `read` returns, as pieces that lie one after another, to spare the copy.

        Raises:
            HoldfastError: as `read`.
        """
        self._check(offset, length)
        if not length:
            return []
        block_bytes = self.block_bytes
        first, end = offset // block_bytes, -(-(offset + length) // block_bytes)
        blocks = await self._blocks(first, end)
        pieces = []
        for position, plain in zip(range(first, end), blocks, strict=True):
            begin = position * block_bytes
            low, high = max(0, offset - begin), min(self._length(position), offset + length - begin)
            if not plain:
                pieces.append(bytes(high - low))
            else:
                pieces.append(plain if high - low == len(plain) else plain[low:high])
        return pieces

    async def extents(self, start: int, end: int) -> list[Extent]:
        """Return the ranges within `start` to before `end` that may hold other bytes than zero, ascending.

        Raises:
            HoldfastError: as `read`.
        """
        self._check(start, end - start)
        block_bytes = self.block_bytes
        found: list[Extent] = []
        begin = last = -1
        async for number, leaf in self._leaves.slots(start // block_bytes, -(-end // block_bytes)):
            for slot in leaf.slots:
                position = number * TREE_FAN_OUT + slot
                if position != last:
                    if begin >= 0:
                        found.append(Extent(begin * block_bytes, last * block_bytes))
                    begin = position
                last = position + 1
        if begin >= 0:
            found.append(Extent(begin * block_bytes, last * block_bytes))
        clipped = (Extent(max(start, extent.start), min(end, extent.end)) for extent in found)
        return [extent for extent in clipped if extent.start < extent.end]

    def fetch_ahead(self, start: int, end: int) -> None:
        """Begin to fetch a range that will be read soon; returns at once, and what goes wrong shows when it is read."""
        self._check(start, end - start)
        self._start(self._unknown(range(start // self.block_bytes, -(-end // self.block_bytes))))

    async def close(self) -> None:
        """Stop fetching and release everything; may be called more than once."""
        if self._closed:
            return
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._leaves.close()
        self._cache.clear()
        await asyncio.get_running_loop().run_in_executor(None, self._executor.shutdown)

    def _check_open(self) -> None:
        if self._closed:
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"the image of volume {self.name} is closed")

    def _check(self, offset: int, length: int) -> None:
        self._check_open()
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT,
                f"bytes {offset} to {offset + length} are not within volume {self.name} of {self.size_bytes} bytes",
            )

    def _length(self, position: int) -> int:
        return min(self.block_bytes, self.size_bytes - position * self.block_bytes)

    async def _blocks(self, first: int, end: int) -> list[bytes]:
        """Return plaintexts of blocks; b"" for zeros."""
        found: dict[int, bytes] = {}
        ahead = range(*self._ahead.note(first, end))
        missing: Sequence[int] = range(first, end)
        while missing:
            self._check_open()
            missing = [position for position in missing if not self._known(position, found)]
            joined = self._flying.keys() & missing
            self._start(self._unknown(missing))
            self._start(self._unknown(ahead))
            ahead = range(0)
            failures = await self._collect(missing, found)
            for position, error in failures.items():
                if position not in joined:
                    raise error
            # What somebody else's fetch failed at is tried again as our own: it may have asked for more than we do.
            missing = list(failures)
        return [found[position] for position in range(first, end)]

    def _known(self, position: int, found: dict[int, bytes]) -> bool:
        plain = self._cache.get(position)
        if plain is None:
            return False
        found[position] = plain
        return True

    async def _collect(self, positions: Sequence[int], found: dict[int, bytes]) -> dict[int, HoldfastError]:
        """Wait for blocks that are on their way; returns which did not come, and why."""
        failures = {}
        waits = [(position, self._flying[position].wait(position)) for position in positions]
        try:
            for position, future in waits:
                try:
                    found[position] = await future
                except HoldfastError as error:
                    failures[position] = error
        finally:
            for _, future in waits:
                future.cancel()
        return failures

    def _unknown(self, positions: Iterable[int]) -> list[int]:
        return [position for position in positions if position not in self._flying and position not in self._cache]

    def _start(self, positions: Sequence[int]) -> None:
        """Begin to fetch blocks that are neither known nor on their way."""
        for at in range(0, len(positions), self._flight_blocks):
            flight = Flight(positions[at : at + self._flight_blocks])
            self._flying.update(dict.fromkeys(flight.pending, flight))
            task = asyncio.create_task(self._fly(flight))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _fly(self, flight: Flight) -> None:
        """Fetch a flight's blocks; what does not come is tried once more: guests take an error for a broken disk."""
        try:
            if not await self._answered(flight):
                damage = await self._fetch(flight)
                if damage is not None:
                    from holdfast.damage import DamageReport  # few images meet damage

                    report = DamageReport(f"volume {self.name}")
                    report.add(damage, "")
                    error = report.error()
                    assert error is not None, "damage has ids"
                    await self._fail(flight, [entry.key // self.block_bytes for entry in damage.entries], error)
        except HoldfastError as error:
            await self._fail(flight, flight.pending, error)
        finally:
            if flight.pending:  # cancelled: the image is being closed
                closed = HoldfastError(ErrorCode.CANCELLED, f"the image of volume {self.name} was closed")
                self._settle(flight, flight.pending, closed)

    async def _answered(self, flight: Flight) -> bool:
        try:
            return await self._fetch(flight) is None
        except HoldfastError as error:
            if error.code is not ErrorCode.UNREACHABLE and error.code not in DAMAGE:
                raise
            return False

    async def _entries(self, flight: Flight, positions: Sequence[int]) -> list[Entry]:
        """Look the blocks up, keyed by their byte offsets; those of zeros are delivered at once."""
        entries = []
        for position in positions:
            group = await self._leaves.group(position // _LEAF_GROUP_BLOCKS)
            number, slot = divmod(position, TREE_FAN_OUT)
            leaf = group.get(number)
            at = bisect_left(leaf.slots, slot) if leaf is not None else 0
            if leaf is None or at == len(leaf.slots) or leaf.slots[at] != slot:
                self._deliver(flight, [(position * self.block_bytes, b"")])
                continue
            offset, length = position * self.block_bytes, self._length(position)
            entries.append(Entry(offset, length, leaf.fingerprints[at], leaf.block_ids[at], leaf.base_ids[at]))
        return entries

    async def _fetch(self, flight: Flight) -> ContentDamage | None:
        """Fetch what a flight still waits for; returns what could not be read.

        Raises:
            HoldfastError: DENIED, UNREACHABLE, …, and for index nodes CORRUPT and MISSING.
        """
        loop = asyncio.get_running_loop()

        def sink(opened: Sequence[tuple[int, bytes]]) -> None:
            # The loop runs this before it hears that the worker thread is done.
            loop.call_soon_threadsafe(self._deliver, flight, opened)

        entries = await self._entries(flight, sorted(flight.pending))
        self.fetched_blocks += len(entries)
        return await self._content.read(entries, sink, block_bytes=self.block_bytes) if entries else None

    def _deliver(self, flight: Flight, opened: Iterable[tuple[int, bytes]]) -> None:
        for offset, plain in opened:
            position = offset // self.block_bytes
            if position in flight.pending:
                self._cache.put(position, plain)
                self._flying.pop(position, None)
                flight.deliver(position, plain)

    async def _fail(self, flight: Flight, positions: Iterable[int], error: HoldfastError) -> None:
        if self._report is not None and error.code in DAMAGE and error.block_ids:
            await self._report(error.block_ids)
        self._settle(flight, positions, error)

    def _settle(self, flight: Flight, positions: Iterable[int], error: HoldfastError) -> None:
        for position in tuple(positions):
            self._flying.pop(position, None)
            flight.fail(position, error)
