"""A difference over the point that its holes stand for: one volume that can be read anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from holdfast.descriptors import Extent
from holdfast.results import Consistency
from holdfast.sources.interface import DifferenceSource, TrackingSource


class Lower(Protocol):
    """The volume of the point below; see `holdfast.images.blocking.BlockingImage`."""

    @property
    def size_bytes(self) -> int:
        """Size of the volume."""
        ...

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes at `offset`."""
        ...

    def extents(self, start: int, end: int) -> Sequence[Extent]:
        """Return the ranges that may hold other bytes than zero, ascending."""
        ...


class LayeredSource:
    """What a difference has, and below it the point that it counts from. Itself a `DifferenceSource`.

    The difference stays its owner's: it is finished here, and neither told how the session ended nor closed.
    """

    def __init__(self, upper: DifferenceSource, lower: Lower) -> None:
        """Lay a difference over a point's volume; beyond that volume's end its holes are zero."""
        self._upper = upper
        self._lower = lower

    @property
    def size_bytes(self) -> int:
        """Size of the difference."""
        return self._upper.size_bytes

    @property
    def since(self) -> str:
        """Id of the point below."""
        return self._upper.since

    def allocated(self, start: int, end: int) -> Sequence[Extent]:
        """Return what either layer may have."""
        own = self._upper.allocated(start, end)
        if own and own[0].start <= start and own[0].end >= end:
            return own
        below_end = min(end, self._lower.size_bytes)
        below = self._lower.extents(start, below_end) if start < below_end else ()
        merged: list[Extent] = []
        for extent in sorted([*own, *below]):
            if merged and extent.start <= merged[-1].end:
                merged[-1] = Extent(merged[-1].start, max(merged[-1].end, extent.end))
            else:
                merged.append(extent)
        return merged

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from both layers.

        Raises:
            HoldfastError: what the layers raise; CORRUPT, MISSING or UNREACHABLE come from the point.
        """
        end = offset + len(buffer)
        at = offset
        for extent in self._upper.allocated(offset, end):
            self._read_below(at, buffer[at - offset : extent.start - offset])
            self._upper.read_into(extent.start, buffer[extent.start - offset : extent.end - offset])
            at = extent.end
        self._read_below(at, buffer[at - offset :])

    def _read_below(self, offset: int, buffer: memoryview) -> None:
        length = max(0, min(len(buffer), self._lower.size_bytes - offset))
        if length:
            self._lower.read_into(offset, buffer[:length])
        buffer[length:] = bytes(len(buffer) - length)

    def changed_since(self, point_id: str) -> Sequence[Extent] | None:
        """Return what the difference has, if it counts from that point."""
        if point_id != self.since:
            return None
        changed = self._upper.changed_since(point_id)
        return self._upper.allocated(0, self.size_bytes) if changed is None else changed

    def why_unknown(self) -> str:
        """Return why the difference cannot tell what changed."""
        return self._upper.why_unknown() if isinstance(self._upper, TrackingSource) else ""

    def finish(self) -> Consistency:
        """Finish the difference.

        Raises:
            HoldfastError: VOLUME_CHANGED.
        """
        return self._upper.finish()

    def close(self) -> None:
        """Do nothing: both layers have owners."""
