"""What changed in a VM's memory since a point: a sparse file, as Firecracker and others write it.

Its data are the pages that were dirtied; its holes stand for the point's bytes, not for zero.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from holdfast.descriptors import Extent
from holdfast.results import VolumeSpec
from holdfast.sources.interface import BackupRun
from holdfast.sources.raw import RawFileSource
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.names import check_id
from holdfast_core.model.uris import parse_volume_uri


class MemoryDiffSource(RawFileSource):
    """A sparse file of differences; a `DifferenceSource`."""

    def __init__(self, path: str | os.PathLike[str], *, since: str) -> None:
        """Open the file; `since` is the id of the point that its holes stand for.

        Raises:
            HoldfastError: SOURCE_UNREADABLE, also where the file system does not say which parts are holes;
                INVALID_ARGUMENT if `since` is no id.
        """
        self._since = check_id(since, "id of the point that a memory diff counts from")
        super().__init__(Path(path))
        try:
            self._check_holes(Path(path))
        except BaseException:
            self.close()
            raise

    def _check_holes(self, path: Path) -> None:
        """Refuse a file whose holes would be taken for data: the zeros in them would overwrite the point's bytes."""
        size = self.size_bytes
        if size and list(self.allocated(0, size)) == [Extent(0, size)] and self.data_bytes() < size:
            raise HoldfastError(
                ErrorCode.SOURCE_UNREADABLE,
                f"the file system of the memory diff {path} does not say which parts of it are holes; "
                "put it on ext4, XFS, Btrfs without compression or tmpfs",
            )

    @property
    def since(self) -> str:
        """Id of the point that the holes stand for."""
        return self._since

    def changed_since(self, point_id: str) -> Sequence[Extent] | None:
        """Return what the file has, if it counts from that point."""
        return self.allocated(0, self.size_bytes) if point_id == self._since else None


def open_memory_diff(spec: VolumeSpec, run: BackupRun) -> MemoryDiffSource:
    """Open the source of a `memdiff:` URI; that it counts from the parent is checked where it is used."""
    uri = parse_volume_uri(os.fspath(spec.uri))
    return MemoryDiffSource(Path(uri.path), since=uri.parameter("since"))
