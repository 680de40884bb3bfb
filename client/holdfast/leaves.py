"""Leaves of a volume's tree while they are put together, and what waits its turn for the tree builder."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Sequence
from dataclasses import dataclass, field

from holdfast.spans import SealedSpan
from holdfast_core.model.tree import VolumeLeaf
from holdfast_core.model.tree.walk import VolumeRef

SlotRange = tuple[int, int]
"""First slot of a leaf, and the slot behind the last."""


@dataclass(slots=True)
class GrowingLeaf:
    """A leaf that is being put together from its spans.

    Attributes:
        index: its place.
        parent_id, parent: the parent's leaf there; the id is empty where it may not be named again.
        changed: slots that are read; all other entries are the parent's. None reads all.
    """

    index: int
    parent_id: bytes
    parent: VolumeLeaf | None
    changed: Sequence[SlotRange] | None = None
    _slots: list[int] = field(default_factory=list)
    _fingerprints: list[bytes] = field(default_factory=list)
    _block_ids: list[bytes] = field(default_factory=list)
    _base_ids: list[bytes] = field(default_factory=list)

    def reads(self, first: int, end: int) -> bool:
        """Tell whether any slot from `first` to before `end` is read."""
        return self.changed is None or any(low < end and first < high for low, high in self.changed)

    def share(self, first: int, end: int) -> float:
        """Return the share of the slots from `first` to before `end` that is read."""
        if self.changed is None:
            return 1.0
        return sum(max(0, min(end, high) - max(first, low)) for low, high in self.changed) / (end - first)

    def add(self, span: SealedSpan) -> None:
        """Take the next span's part."""
        self._slots.extend(span.slots)
        self._fingerprints.extend(span.fingerprints)
        for block_id, base_id in span.references:
            self._block_ids.append(block_id)
            self._base_ids.append(base_id)

    def made(self) -> VolumeLeaf | None:
        """Return the leaf as it is now, or None where all of it is zero."""
        if self.changed is not None and self.parent is not None:
            self._keep(self.parent, self.changed)
        if not self._slots:
            return None
        return VolumeLeaf(tuple(self._slots), tuple(self._fingerprints), tuple(self._block_ids), tuple(self._base_ids))

    def _keep(self, parent: VolumeLeaf, changed: Sequence[SlotRange]) -> None:
        """Put the parent's entries between those that were read."""
        read = {slot for first, end in changed for slot in range(first, end)}
        own = zip(self._slots, self._fingerprints, self._block_ids, self._base_ids, strict=True)
        theirs = zip(parent.slots, parent.fingerprints, parent.block_ids, parent.base_ids, strict=True)
        entries = sorted([*own, *(entry for entry in theirs if entry[0] not in read)])
        self._slots = [entry[0] for entry in entries]
        self._fingerprints = [entry[1] for entry in entries]
        self._block_ids = [entry[2] for entry in entries]
        self._base_ids = [entry[3] for entry in entries]


@dataclass(frozen=True, slots=True)
class PendingSpan:
    """A span that is being sealed.

    Attributes:
        leaf: the leaf that it is part of.
        future: the sealer's; the source is in use until it is done.
        sealed: the same for the event loop. Some blocks may still wait for what they could be coded against.
        span: the span with none of its blocks waiting.
        end_offset: where it ends in the volume, in bytes.
        last: whether it is the last one of its leaf.
        weight: how much it holds, in full spans.
    """

    leaf: GrowingLeaf
    future: concurrent.futures.Future[SealedSpan]
    sealed: asyncio.Future[SealedSpan]
    span: asyncio.Future[SealedSpan]
    end_offset: int
    last: bool
    weight: float


@dataclass(frozen=True, slots=True)
class KeptSubtrees:
    """Subtrees of the parent that are named again as they are, in order."""

    refs: list[VolumeRef]
