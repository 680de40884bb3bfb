"""Images of points: any range at once, one fetch for a block, bounded memory, and what happens when blocks are lost."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import random
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast import AsyncStateManager, ErrorCode, Extent, HoldfastError, StateManager
from holdfast.images import CACHE_BYTES_DEFAULT, READ_AHEAD_BYTES_DEFAULT
from holdfast.images.block_cache import ENTRY_BYTES, BlockCache
from holdfast.images.blocking import BlockingImage, runner_on
from holdfast.images.point_image import PointImage
from holdfast.images.read_ahead import ReadAhead
from holdfast.testing import MemoryCluster
from holdfast_core.model.limits import CAPABILITY_TTL_S
from holdfast_core.runtime.clock import SystemClock
from tests.client.rig import BLOCK, Vm, data_ids, error_of, noise, rot

SIZE = 40 * BLOCK + 4321
PIECES = ((0, noise(5 * BLOCK, 1)), (9 * BLOCK + 100, noise(300, 2)), (20 * BLOCK, noise(SIZE - 20 * BLOCK, 3)))
DATA_EXTENTS = [Extent(0, 5 * BLOCK), Extent(9 * BLOCK, 10 * BLOCK), Extent(20 * BLOCK, SIZE)]


@pytest.fixture
def point(vm: Vm) -> str:
    """A point of one volume with holes and a short last block."""
    vm.volume(SIZE, PIECES)
    vm.register()
    return vm.snapshot()


@contextlib.asynccontextmanager
async def opened(
    cluster: MemoryCluster,
    point: str,
    *,
    cache_bytes: int = CACHE_BYTES_DEFAULT,
    read_ahead_bytes: int = READ_AHEAD_BYTES_DEFAULT,
) -> AsyncIterator[PointImage]:
    """An image on this event loop."""
    async with (
        AsyncStateManager(cluster.coordinator_address, token=cluster.token) as manager,
        await manager.open_image(point, cache_bytes=cache_bytes, read_ahead_bytes=read_ahead_bytes) as image,
    ):
        yield image


@pytest.mark.slow
async def test_any_range_is_what_the_volume_has_there(shared_cluster: MemoryCluster, vm: Vm, point: str) -> None:
    content = vm.path().read_bytes()
    rng = random.Random(7)
    async with opened(shared_cluster, point, cache_bytes=8 * BLOCK) as image:
        assert (image.size_bytes, image.block_bytes, image.name) == (SIZE, BLOCK, "root")
        assert await image.read(0, SIZE) == content
        assert await image.read(SIZE, 0) == b""
        for _ in range(200):
            start = rng.randrange(SIZE)
            length = min(rng.choice([1, 512, 4096, BLOCK, 3 * BLOCK + 1]), SIZE - start)
            assert await image.read(start, length) == content[start : start + length]


async def test_ranges_outside_the_volume_are_refused(shared_cluster: MemoryCluster, point: str) -> None:
    async with opened(shared_cluster, point) as image:
        for offset, length in ((SIZE, 1), (0, SIZE + 1), (-1, 2), (1 << 62, 1 << 62)):
            with pytest.raises(HoldfastError) as caught:
                await image.read(offset, length)
            assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    with pytest.raises(HoldfastError, match="closed"):
        await image.read(0, 1)


async def test_extents_are_the_blocks_that_are_not_zero(shared_cluster: MemoryCluster, point: str) -> None:
    async with opened(shared_cluster, point) as image:
        assert await image.extents(0, SIZE) == DATA_EXTENTS
        assert await image.extents(5 * BLOCK, 9 * BLOCK) == []
        assert await image.extents(4 * BLOCK + 7, 9 * BLOCK + 5) == [
            Extent(4 * BLOCK + 7, 5 * BLOCK),
            Extent(9 * BLOCK, 9 * BLOCK + 5),
        ]
        assert image.fetched_blocks == 0


async def test_small_reads_fetch_a_block_once(shared_cluster: MemoryCluster, vm: Vm, point: str) -> None:
    content = vm.path().read_bytes()
    places = [at for extent in DATA_EXTENTS for at in range(extent.start, extent.end, 4096)]
    random.Random(5).shuffle(places)
    async with opened(shared_cluster, point, read_ahead_bytes=0) as image:
        read = await asyncio.gather(*(image.read(at, min(4096, SIZE - at)) for at in places))
        assert read == [content[at : at + 4096] for at in places]
        assert image.fetched_blocks == sum(-(-(end - start) // BLOCK) for start, end in DATA_EXTENTS)
        again = await asyncio.gather(*(image.read(at, 16) for at in places))
        assert again == [content[at : at + 16] for at in places]
        assert image.fetched_blocks == sum(-(-(end - start) // BLOCK) for start, end in DATA_EXTENTS)


async def test_going_forward_fetches_ahead(shared_cluster: MemoryCluster, point: str) -> None:
    async with opened(shared_cluster, point) as image:
        for at in range(20 * BLOCK, 23 * BLOCK, BLOCK):
            await image.read(at, BLOCK)
        assert image.fetched_blocks > 3


async def test_a_reader_that_gives_up_takes_nothing_from_another(shared_cluster: MemoryCluster, point: str) -> None:
    async with opened(shared_cluster, point) as image:
        impatient = asyncio.create_task(image.read(0, 5 * BLOCK))
        patient = asyncio.create_task(image.read(0, 5 * BLOCK))
        await asyncio.sleep(0)
        impatient.cancel()
        assert await patient == PIECES[0][1]
        assert image.fetched_blocks == 5


def test_a_lost_block_fails_its_own_readers_alone(cluster: MemoryCluster, tmp_path: Path) -> None:
    with cluster.state_manager() as manager:
        vm = Vm(manager, "vm", tmp_path)
        vm.volume(16 * BLOCK, [(0, noise(16 * BLOCK, 4))])
        vm.register()
        point = vm.snapshot()
        lost = data_ids(cluster, 0)[0]
        for number in range(3):
            rot(cluster, number, lost)
        content = vm.path().read_bytes()
        failures = []
        with manager.open_volume(point) as file:
            for at in range(0, 16 * BLOCK, BLOCK):
                file.seek(at)
                try:
                    assert file.read(BLOCK) == content[at : at + BLOCK]
                except HoldfastError as error:
                    failures.append((error.code, error.block_ids, error.facts["ranges"]))
        assert len(failures) == 1
        code, block_ids, ranges = failures[0]
        assert (code, block_ids) == (ErrorCode.CORRUPT, (lost,))
        start, end = map(int, ranges.split("-"))
        assert end - start == BLOCK
        vm.assert_restores(point, manager.incremental_backup("vm", point))


def test_a_node_that_goes_away_is_not_missed(cluster: MemoryCluster, tmp_path: Path) -> None:
    with cluster.state_manager() as manager:
        vm = Vm(manager, "vm", tmp_path)
        vm.volume(16 * BLOCK, [(0, noise(16 * BLOCK, 4))])
        vm.register()
        with manager.open_volume(vm.snapshot()) as file:
            first = file.read(BLOCK)
            cluster.stop_node(1)
            assert first + file.read(15 * BLOCK) == vm.path().read_bytes()


class LaterClock(SystemClock):
    """The machine's clock, set forward at will."""

    __slots__ = ("later_ms",)

    def __init__(self) -> None:
        self.later_ms = 0

    def now_unix_ms(self) -> int:
        return super().now_unix_ms() + self.later_ms


def test_while_no_coordinator_answers_images_are_read_on(cluster: MemoryCluster, tmp_path: Path) -> None:
    clock = LaterClock()
    with cluster.state_manager(clock=clock) as manager:
        vm = Vm(manager, "vm", tmp_path)
        vm.volume(16 * BLOCK, [(0, noise(16 * BLOCK, 4))])
        vm.register()
        with manager.open_volume(vm.snapshot(), read_ahead_bytes=0) as file:
            first = file.read(BLOCK)
            coordinator = cluster._coordinator
            assert coordinator is not None
            cluster.run(coordinator.stop())
            for later_s in (CAPABILITY_TTL_S / 2 + 1, CAPABILITY_TTL_S - 60):
                clock.later_ms = round(later_s * 1000)
                first += file.read(BLOCK)
            assert first == vm.path().read_bytes()[: 3 * BLOCK]
            # Shortly before its end the capability has to be renewed.
            clock.later_ms = round((CAPABILITY_TTL_S - 10) * 1000)
            assert error_of(lambda: file.read(BLOCK)).code is ErrorCode.UNREACHABLE


def test_a_volume_is_a_file(manager: StateManager, vm: Vm, point: str) -> None:
    content = vm.path().read_bytes()
    with manager.open_volume(point, "root") as raw:
        assert raw.readable()
        assert raw.seekable()
        assert not raw.writable()
        file = io.BufferedReader(raw)
        assert file.seek(-10, os.SEEK_END) == SIZE - 10
        assert file.read() == content[-10:]
        assert file.seek(9 * BLOCK) == 9 * BLOCK
        assert file.read(400) == content[9 * BLOCK : 9 * BLOCK + 400]
        assert file.seek(SIZE + 5) == SIZE + 5
        assert file.read(1) == b""
        file.seek(0)
        assert file.read() == content
        with pytest.raises(ValueError, match="no place"):
            raw.seek(-1)
    with pytest.raises(ValueError, match="closed"):
        raw.read(1)


def test_volumes_that_are_not_there_are_told(manager: StateManager, vm: Vm, point: str) -> None:
    error = error_of(lambda: manager.open_volume(point, "data"))
    assert error.code is ErrorCode.NOT_FOUND
    assert "root" in error.message
    assert error_of(lambda: manager.open_volume(f"{point}x")).code is ErrorCode.NOT_FOUND
    assert error_of(lambda: manager.open_volume("../x")).code is ErrorCode.INVALID_ARGUMENT
    assert error_of(lambda: manager.open_volume(point, cache_bytes=-1)).code is ErrorCode.INVALID_ARGUMENT


def test_a_volume_of_zeros_reads_as_zeros(manager: StateManager, vm: Vm) -> None:
    vm.volume(3 * BLOCK + 1)
    vm.volume(0, name="empty")
    vm.register("root", "empty")
    point = vm.snapshot()
    with manager.open_volume(point, "root") as file:
        assert file.readall() == bytes(3 * BLOCK + 1)
    with manager.open_volume(point, "empty") as file:
        assert file.readall() == b""


def test_closing_the_manager_closes_its_images(shared_cluster: MemoryCluster, vm: Vm, point: str) -> None:
    manager = StateManager(shared_cluster.coordinator_address, token=shared_cluster.token)
    file = manager.open_volume(point)
    assert file.read(BLOCK) == PIECES[0][1][:BLOCK]
    manager.close()
    with pytest.raises(HoldfastError, match="closed"):
        file.read(BLOCK)
    file.close()


async def test_threads_read_an_image_at_the_same_time(shared_cluster: MemoryCluster, vm: Vm, point: str) -> None:
    content = vm.path().read_bytes()
    loop = asyncio.get_running_loop()
    async with opened(shared_cluster, point) as image:
        blocking = BlockingImage(image, runner_on(loop))

        def read(at: int) -> bytes:
            buffer = bytearray(min(BLOCK, SIZE - at))
            blocking.read_into(at, memoryview(buffer))
            return bytes(buffer)

        with ThreadPoolExecutor(4) as pool:
            parts = await asyncio.gather(*(loop.run_in_executor(pool, read, at) for at in range(0, SIZE, BLOCK)))
            assert b"".join(parts) == content
            assert await loop.run_in_executor(pool, blocking.extents, 0, SIZE) == DATA_EXTENTS
            assert await loop.run_in_executor(pool, blocking.read, SIZE - 5, 5) == content[-5:]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 1000)), max_size=60), st.integers(0, 8000))
def test_the_cache_keeps_what_was_used_last_within_its_bound(puts: list[tuple[int, int]], limit: int) -> None:
    cache = BlockCache(limit)
    kept: dict[int, bytes] = {}
    for position, size in puts:
        plain = bytes([position]) * size
        cache.put(position, plain)
        if size + ENTRY_BYTES <= limit:
            kept.pop(position, None)
            kept[position] = plain
        while sum(len(each) + ENTRY_BYTES for each in kept.values()) > limit:
            del kept[next(iter(kept))]
        assert cache.size_bytes <= limit
    assert {position: cache.get(position) for position in range(21) if position in cache} == kept


def test_what_is_fetched_ahead_grows_and_ends() -> None:
    ahead = ReadAhead(first_blocks=4, blocks_max=64, blocks_total=1000)
    fetched: set[int] = set()
    largest = 0
    for at in range(0, 1000, 2):
        begin, end = ahead.note(at, at + 2)
        assert at + 2 <= begin <= end <= 1000
        assert not fetched & set(range(begin, end)), "a block was asked for twice"
        fetched |= set(range(begin, end))
        largest = max(largest, end - begin)
        assert end - at <= 64 + 2
    assert fetched == set(range(min(fetched), 1000))
    assert min(fetched) <= 4
    assert largest >= 32


@given(st.lists(st.integers(0, 10**6), max_size=100, unique=True))
def test_scattered_reads_fetch_little_ahead(places: list[int]) -> None:
    ahead = ReadAhead(first_blocks=4, blocks_max=16, blocks_total=10**6 + 1)
    for place in places:
        begin, end = ahead.note(place, place + 1)
        assert end - begin <= 16


def test_interleaved_streams_are_told_apart() -> None:
    ahead = ReadAhead(first_blocks=4, blocks_max=32, blocks_total=1 << 20)
    fetched = dict.fromkeys((0, 10_000, 20_000, 30_000), 0)
    for step in range(64):
        for base in fetched:
            begin, end = ahead.note(base + step, base + step + 1)
            fetched[base] += end - begin
    assert all(count >= 64 for count in fetched.values())
