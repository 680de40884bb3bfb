"""Trust but verify: some of what a change tracker calls unchanged is read all the same and compared with the parent.

Places are drawn at random: leaves of the parent's tree, by descending it, and windows of the volume where the parent
may have nothing at all; then positions within each. One difference is enough to distrust the tracker for this run.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Final

from holdfast.hints import BlockRanges, ParentIndex
from holdfast.sources import VolumeSource
from holdfast.spans import Fingerprinter
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import SAMPLE_BYTES_MAX, TREE_FAN_OUT
from holdfast_core.model.tree import VolumeLeaf
from holdfast_core.model.tree.shape import leaf_count, leaf_span
from holdfast_core.model.tree.walk import VolumeRef

_LEAVES_MAX: Final = 64
_PROBES: Final = 16


def check_sample(share: float) -> float:
    """Return the share of unchanged blocks to sample.

    Raises:
        HoldfastError: INVALID_ARGUMENT if it is not from 0 to 1.
    """
    if not 0 <= share <= 1:
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT, f"the share of unchanged blocks to sample is from 0 to 1, and not {share}"
        )
    return share


@dataclass(frozen=True, slots=True)
class Sample:
    """What came of a sample.

    Attributes:
        read_bytes: plaintext that was compared.
        differs_at: byte offset of the first block that is not the parent's; None if none is.
    """

    read_bytes: int
    differs_at: int | None


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A leaf's place and what the parent has there."""

    index: int
    leaf: VolumeLeaf | None


class Sampler:
    """Samples volumes of one run."""

    def __init__(self, ring: Fingerprinter, executor: Executor, *, fraction: float, seed: bytes) -> None:
        """Take the share of the parent's blocks to read, from 0 to 1; 0 never reads any."""
        self._ring = ring
        self._executor = executor
        self._fraction = fraction
        self._random = random.Random(seed)

    async def take(self, parent: ParentIndex, source: VolumeSource, changed: BlockRanges) -> Sample:
        """Compare a sample of a volume with its parent.

        Raises:
            IndexDamaged: a node of the parent that was drawn cannot be read.
            HoldfastError: UNREACHABLE, or what the source raises.
        """
        budget = self._positions(parent)
        if not budget:
            return Sample(0, None)
        drawn = await self._draw(parent, min(budget, _LEAVES_MAX), source.size_bytes)
        block_bytes = parent.record.block_bytes
        return await asyncio.get_running_loop().run_in_executor(
            self._executor, self._compare, drawn, block_bytes, source, changed, budget
        )

    def _positions(self, parent: ParentIndex) -> int:
        if self._fraction <= 0:
            return 0
        wanted = max(1, round(self._fraction * parent.record.block_count))
        return min(wanted, max(1, SAMPLE_BYTES_MAX // parent.record.block_bytes))

    async def _draw(self, parent: ParentIndex, leaves: int, size_bytes: int) -> list[_Drawn]:
        """Descend the parent's tree to leaves drawn at random, and to those of the probes that are there."""
        leaves_now = leaf_count(-(-size_bytes // parent.record.block_bytes))
        probes = {self._random.randrange(leaves_now) for _ in range(_PROBES)} if leaves_now else set()
        refs = parent.root()
        while refs and refs[0].level:
            plain = await parent.nodes(ref.node_id for ref in refs)
            probed: list[VolumeRef] = []
            others: list[VolumeRef] = []
            for ref in refs:
                for child in parent.children(ref, plain[ref.node_id]):
                    (probed if _leads_to(child, probes) else others).append(child)
            refs = probed + self._random.sample(others, min(leaves, len(others)))
        plain = await parent.nodes(ref.node_id for ref in refs)
        found = {ref.place: parent.leaf(ref, plain[ref.node_id]) for ref in refs}
        places = [*found, *sorted(probes - found.keys())]
        self._random.shuffle(places)
        return [_Drawn(place, found.get(place)) for place in places]

    def _compare(
        self, drawn: Sequence[_Drawn], block_bytes: int, source: VolumeSource, changed: BlockRanges, budget: int
    ) -> Sample:
        """Read positions of the places until the budget is spent or one differs."""
        read = 0
        buffer = bytearray(block_bytes)
        # Places that have nothing to compare leave their share to those behind them.
        for number, place in enumerate(drawn):
            each = -(-budget // (len(drawn) - number))
            for position in self._choose(place, block_bytes, source, changed, each):
                budget -= 1
                start = position * block_bytes
                plain = memoryview(buffer)[: min(block_bytes, source.size_bytes - start)]
                plain[:] = bytes(len(plain))
                for extent in source.allocated(start, start + len(plain)):
                    source.read_into(extent.start, plain[extent.start - start : extent.end - start])
                read += len(plain)
                if not self._same(plain, place.leaf, position % TREE_FAN_OUT):
                    return Sample(read, start)
        return Sample(read, None)

    def _choose(
        self, place: _Drawn, block_bytes: int, source: VolumeSource, changed: BlockRanges, count: int
    ) -> list[int]:
        """Draw positions of a leaf that are not zero in the parent or may not be in the source, and do not count as
        changed."""
        first = place.index * TREE_FAN_OUT
        if first * block_bytes >= source.size_bytes:
            return []
        end = min(first + TREE_FAN_OUT, -(-source.size_bytes // block_bytes))
        candidates = {first + slot for slot in place.leaf.slots} if place.leaf is not None else set()
        for extent in source.allocated(first * block_bytes, min(end * block_bytes, source.size_bytes)):
            candidates.update(range(extent.start // block_bytes, -(-extent.end // block_bytes)))
        for low, high in changed.within(first, first + TREE_FAN_OUT):
            candidates.difference_update(range(low, high))
        return self._random.sample(sorted(candidates), min(count, len(candidates)))

    def _same(self, plain: memoryview, leaf: VolumeLeaf | None, slot: int) -> bool:
        if leaf is None or slot not in leaf.slots:
            return not bytes(plain).strip(b"\0")
        return leaf.fingerprints[leaf.slots.index(slot)] == self._ring.fingerprint(plain)


def _leads_to(ref: VolumeRef, leaf_indexes: set[int]) -> bool:
    span = leaf_span(ref.level)
    return any(index // span == ref.place for index in leaf_indexes)
