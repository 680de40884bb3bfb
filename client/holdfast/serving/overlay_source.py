"""An overlay as the source of a backup: the point with a guest's writes over it, and which ranges those are."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.descriptors import Extent
from holdfast.images.blocking import BlockingImage
from holdfast.results import Consistency
from holdfast.serving.local_file import LocalFile


class OverlaySource:
    """One volume of an overlay that nobody serves now (`TrackingSource`). Image and file stay their owner's."""

    def __init__(self, image: BlockingImage, written: LocalFile, point_id: str) -> None:
        """Bind to the point's image and what was written over it."""
        self._image = image
        self._written = written
        self._point_id = point_id

    @property
    def size_bytes(self) -> int:
        """Size of the volume."""
        return self._image.size_bytes

    def allocated(self, start: int, end: int) -> Sequence[Extent]:
        """Return what is allocated in the overlay, and what the point has where nothing was written.

        Raises:
            HoldfastError: as `PointImage.read`.
        """
        extents: list[Extent] = []
        for low, high, held in self._runs(start, end):
            found = self._written.extents(low, high) if held else self._image.extents(low, high)
            for extent in found:
                if extents and extents[-1].end == extent.start:
                    extents[-1] = Extent(extents[-1].start, extent.end)
                else:
                    extents.append(extent)
        return extents

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with what the guest saw there.

        Raises:
            HoldfastError: SOURCE_UNREADABLE, and as `PointImage.read`.
        """
        for low, high, held in self._runs(offset, offset + len(buffer)):
            part = buffer[low - offset : high - offset]
            if held:
                part[:] = self._written.read(low, high - low)
            else:
                self._image.read_into(low, part)

    def changed_since(self, point_id: str) -> Sequence[Extent] | None:
        """Return what was written over the point, if it is that one."""
        if point_id != self._point_id:
            return None
        return [Extent(low, high) for low, high, held in self._runs(0, self.size_bytes) if held]

    def why_unknown(self) -> str:
        """Return why there is no answer."""
        return f"the overlay lies over {self._point_id}"

    def finish(self) -> Consistency:
        """Return CRASH: a guest may have been cut off, with its writes as far as it had flushed them, or further."""
        return Consistency.CRASH

    def committed(self) -> None:
        """Do nothing: the overlay goes on over its own point."""

    def abandoned(self) -> None:
        """Do nothing: the overlay is as it was."""

    def close(self) -> None:
        """Do nothing: the overlay is its owner's."""

    def _runs(self, start: int, end: int) -> list[tuple[int, int, bool]]:
        unit = self._written.unit_bytes
        return [
            (max(start, first * unit), min(end, last * unit), held)
            for first, last, held in self._written.map.runs(start // unit, -(-end // unit))
        ]
