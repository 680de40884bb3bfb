"""One span: what it reads, skips, reuses and seals, whatever the extents."""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from holdfast import Extent
from holdfast.spans import FingerprintCache, SpanContext, leaf_entries, seal_cuts, seal_volume_span, spans_of_leaf
from holdfast_core.model.block import Codec, Kind, SealedBlock
from holdfast_core.model.keys import KeyRing, generate_secrets
from holdfast_core.model.limits import MIB, VOLUME_BLOCK_BYTES_MAX, VOLUME_BLOCK_BYTES_MIN
from holdfast_core.model.tree import VolumeLeaf
from tests.client.rig import MemorySource, noise

RING = KeyRing(generate_secrets(1, lambda size: noise(size, 1)))
SMALL = VOLUME_BLOCK_BYTES_MIN


def context(damaged: frozenset[bytes] = frozenset()) -> SpanContext[SealedBlock]:
    return SpanContext(RING, RING.sealer(Kind.VOLUME, 1), Codec.ZSTD, FingerprintCache(), damaged)


class PatchySource(MemorySource):
    """Only the given pages are allocated; reading outside them is an error."""

    def __init__(self, size: int, extents: Sequence[tuple[int, int]]) -> None:
        data = bytearray(size)
        for start, end in extents:
            data[start:end] = noise(end - start, start)
        super().__init__(bytes(data))
        self._extents = [Extent(start, end) for start, end in extents]

    def allocated(self, start: int, end: int) -> Sequence[Extent]:
        cut = [Extent(max(start, low), min(end, high)) for low, high in self._extents]
        return [extent for extent in cut if extent.start < extent.end]


def span(source: MemorySource, first: int, end: int, *, parent: VolumeLeaf | None = None) -> VolumeLeaf | None:
    """Seal a span of small blocks and check its blocks against the source."""
    shared = context()
    result = seal_volume_span(
        shared,
        source,
        leaf_offset=0,
        first_slot=first,
        end_slot=end,
        block_bytes=SMALL,
        parent=leaf_entries(parent, ()),
        base={},
    )
    blocks = {block.id: block for block, _ in result.new}
    for slot, fingerprint, (block_id, base_id) in zip(
        result.slots, result.fingerprints, result.references, strict=True
    ):
        plain = bytes(source.data[slot * SMALL : (slot + 1) * SMALL])
        assert base_id == b""
        assert fingerprint == RING.fingerprint(plain)
        if parent is None:
            assert RING.opener().open(blocks[block_id]) == plain
    zero = [
        slot
        for slot in range(first, end)
        if slot not in result.slots and any(source.data[slot * SMALL : (slot + 1) * SMALL])
    ]
    assert zero == []
    if not result.slots:
        return None
    ids = tuple(reference[0] for reference in result.references)
    return VolumeLeaf(tuple(result.slots), tuple(result.fingerprints), ids, (b"",) * len(ids))


ranges = st.lists(st.tuples(st.integers(0, 160_000), st.integers(1, 40_000)), max_size=8)


@given(st.integers(1, 180_000), ranges, st.integers(0, 12), st.integers(0, 12))
def test_a_span_is_the_source_whatever_the_extents(size: int, pieces: list[tuple[int, int]], a: int, b: int) -> None:
    extents: list[tuple[int, int]] = []
    for start, length in sorted(pieces):
        low, high = max(start, extents[-1][1] if extents else 0), min(size, start + length)
        if low < high:
            extents.append((low, high))
    first, end = sorted((a, b))
    span(PatchySource(size, extents), first, end)


def test_a_buffer_that_is_used_again_leaks_nothing() -> None:
    span(PatchySource(10 * SMALL, [(0, 10 * SMALL)]), 0, 10)
    source = PatchySource(
        10 * SMALL, [(SMALL + 100, SMALL + 200), (SMALL + 900, SMALL + 901), (5 * SMALL, 5 * SMALL + 1)]
    )
    leaf = span(source, 0, 10)
    assert leaf is not None
    assert leaf.slots == (1, 5)


def test_a_span_is_read_in_pieces() -> None:
    data = noise(2 * MIB + 5000)
    reads: list[tuple[int, int]] = []

    class Watched(PatchySource):
        """Tells what is read."""

        def read_into(self, offset: int, buffer: memoryview) -> None:
            reads.append((offset, len(buffer)))
            super().read_into(offset, buffer)

    source = Watched(len(data), [(MIB - 3000, MIB + 3000), (2 * MIB - 1, len(data))])
    result = seal_volume_span(
        context(),
        source,
        leaf_offset=0,
        first_slot=0,
        end_slot=128,
        block_bytes=65_536,
        parent={},
        base={},
    )
    assert result.slots == [15, 16, 31, 32]
    assert reads == [(MIB - 3000, 3000), (MIB, 3000), (2 * MIB - 1, 1), (2 * MIB, 5000)]
    assert result.read_bytes == 11_001
    for slot, fingerprint in zip(result.slots, result.fingerprints, strict=True):
        assert fingerprint == RING.fingerprint(bytes(source.data[slot * 65_536 : (slot + 1) * 65_536]))


def test_what_begins_a_page_of_the_source_begins_a_page_in_memory() -> None:
    """Where a copy out of the page cache goes 16 bytes into a page, as into malloc's, it takes many times as long."""
    starts: set[int] = set()

    class Watched(PatchySource):
        """Tells where in a page it is read to."""

        def read_into(self, offset: int, buffer: memoryview) -> None:
            at = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
            starts.add((at - offset) % mmap.PAGESIZE)
            super().read_into(offset, buffer)

    for block_bytes in (65_536, VOLUME_BLOCK_BYTES_MAX):  # the larger takes a larger buffer
        source = Watched(3 * VOLUME_BLOCK_BYTES_MAX, [(0, 3 * VOLUME_BLOCK_BYTES_MAX)])
        seal_volume_span(
            context(),
            source,
            leaf_offset=0,
            first_slot=0,
            end_slot=3 * VOLUME_BLOCK_BYTES_MAX // block_bytes,
            block_bytes=block_bytes,
            parent={},
            base={},
        )
    assert starts == {0}


def test_what_the_parent_has_is_not_sealed() -> None:
    source = MemorySource(noise(4 * SMALL))
    leaf = span(source, 0, 4)
    assert leaf is not None
    source.data[SMALL] ^= 1
    again = seal_volume_span(
        context(),
        source,
        leaf_offset=0,
        first_slot=0,
        end_slot=4,
        block_bytes=SMALL,
        parent=leaf_entries(leaf, ()),
        base={},
    )
    assert [block.id for block, _ in again.new] == [again.references[1][0]]
    assert again.changed_bytes == SMALL
    assert again.changed_blocks == 1
    assert [again.references[at][0] for at in (0, 2, 3)] == [leaf.block_ids[at] for at in (0, 2, 3)]


def test_a_damaged_entry_of_the_parent_is_sealed_again() -> None:
    source = MemorySource(noise(4 * SMALL))
    leaf = span(source, 0, 4)
    assert leaf is not None
    damaged = frozenset([leaf.block_ids[2]])
    again = seal_volume_span(
        context(damaged),
        source,
        leaf_offset=0,
        first_slot=0,
        end_slot=4,
        block_bytes=SMALL,
        parent=leaf_entries(leaf, damaged),
        base={},
    )
    assert [block.id for block, _ in again.new] == [leaf.block_ids[2]]


def test_the_base_and_the_session_are_reused() -> None:
    twice = noise(SMALL)
    source = MemorySource(twice + noise(SMALL, 1) + twice)
    base = {1: (RING.fingerprint(noise(SMALL, 1)), (b"b" * 32, b"d" * 32))}
    result = seal_volume_span(
        context(), source, leaf_offset=0, first_slot=0, end_slot=3, block_bytes=SMALL, parent={}, base=base
    )
    assert len(result.new) == 1
    assert result.references[0] == result.references[2]
    assert result.references[1] == (b"b" * 32, b"d" * 32)
    assert result.reused_bytes == 2 * SMALL


def test_cuts_keep_their_order() -> None:
    cuts = [noise(1000, 1), noise(500, 2), noise(1000, 1)]
    result = seal_cuts(context(), cuts)
    assert result.fingerprints == [RING.fingerprint(cut) for cut in cuts]
    assert result.references[0] == result.references[2]
    assert len(result.new) == 2


def test_spans_cover_a_leaf_in_at_most_eight_mebibytes() -> None:
    size = VOLUME_BLOCK_BYTES_MIN
    while size <= VOLUME_BLOCK_BYTES_MAX:
        spans = spans_of_leaf(size)
        assert spans[0][0] == 0
        assert spans[-1][1] == 128
        assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
        assert max(end - first for first, end in spans) * size <= 8 << 20
        size *= 2


def test_the_cache_is_bounded_and_remembers_the_recent() -> None:
    cache = FingerprintCache(entries_max=10)
    for number in range(100):
        cache.put(b"%d" % number, (b"id%d" % number, b""))
    assert cache.get(b"99") == (b"id99", b"")
    assert cache.get(b"0") is None
    assert sum(cache.get(b"%d" % number) is not None for number in range(100)) <= 20
