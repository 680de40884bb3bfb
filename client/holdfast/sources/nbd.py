"""Exports of NBD servers as volumes, and what is shared by all sources that are read over NBD.

A dirty bitmap in an export says what changed since the point in its name: `holdfast-` and the point's id. A bitmap of
another name is about something that Holdfast does not know, and is never used.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

from holdfast.descriptors import Extent
from holdfast.results import Consistency, VolumeSpec
from holdfast.sources.interface import BackupRun
from holdfast.sources.nbd_client import NbdAsked, NbdClient, NbdEndpoint
from holdfast_core.model import nbd
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import VOLUME_SIZE_BYTES_MAX
from holdfast_core.model.uris import parse_volume_uri

BITMAP_PREFIX: Final = "holdfast-"
_EXTENTS_MAX: Final = 1 << 20


def bitmap_name(point_id: str) -> str:
    """Return the name of the dirty bitmap that records what changes since a point."""
    return BITMAP_PREFIX + point_id


class ExportReader:
    """An export with what a source needs of it: bytes, where data is, and where a dirty bitmap is set."""

    def __init__(self, endpoint: NbdEndpoint, export: str = "", *, bitmap: str = "") -> None:
        """Connect; `bitmap` names the dirty bitmap to use if the export has it.

        Raises:
            HoldfastError: SOURCE_UNREADABLE; LIMIT_EXCEEDED if the export is larger than any volume.
        """
        self._bitmap = nbd.CONTEXT_BITMAP_PREFIX + bitmap
        contexts = (nbd.CONTEXT_ALLOCATION, self._bitmap) if bitmap else (nbd.CONTEXT_ALLOCATION,)
        self.client = NbdClient(endpoint, NbdAsked(export, contexts, (nbd.CONTEXT_BITMAP_PREFIX,)))
        if self.size_bytes > VOLUME_SIZE_BYTES_MAX:
            self.client.close()
            raise HoldfastError(
                ErrorCode.LIMIT_EXCEEDED,
                f"the export of {endpoint} has {self.size_bytes} bytes; a volume has {VOLUME_SIZE_BYTES_MAX} at most",
            )

    @property
    def size_bytes(self) -> int:
        """Size of the export."""
        return self.client.size_bytes

    @property
    def bitmaps(self) -> tuple[str, ...]:
        """Names of the dirty bitmaps that the export lists."""
        prefix = nbd.CONTEXT_BITMAP_PREFIX
        return tuple(name.removeprefix(prefix) for name in self.client.export.listed if name.startswith(prefix))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes at `offset`.

        Raises:
            HoldfastError: SOURCE_UNREADABLE.
        """
        self.client.read_into(offset, buffer)

    def allocated(self, start: int, end: int) -> Sequence[Extent]:
        """Return the extents that may hold other bytes than zero; all of it where the server does not tell.

        Raises:
            HoldfastError: SOURCE_UNREADABLE.
        """
        return self._extents(nbd.CONTEXT_ALLOCATION, start, end, lacking=nbd.Status.ZERO)

    def dirty(self) -> Sequence[Extent] | None:
        """Return the extents that the bitmap has set; None if the export does not have it.

        Raises:
            HoldfastError: SOURCE_UNREADABLE.
        """
        if self._bitmap not in self.client.export.contexts:
            return None
        return self._extents(self._bitmap, 0, self.size_bytes, having=nbd.BITMAP_DIRTY)

    def close(self) -> None:
        """Close the connections; may be called more than once."""
        self.client.close()

    def _extents(self, context: str, start: int, end: int, *, having: int = 0, lacking: int = 0) -> list[Extent]:
        """Return the extents with and without some flags, neighbours made one.

        Behind more of them than any disk should have all the rest is returned as one: both uses may read too much.
        """
        end = min(end, self.size_bytes)
        if context not in self.client.export.contexts:
            return [Extent(start, end)] if start < end else []
        found: list[Extent] = []
        for count, extent in enumerate(self.client.extents(context, start, end)):
            enough = count >= _EXTENTS_MAX
            if enough or (extent.flags & having == having and not extent.flags & lacking):
                begin = found.pop().start if found and found[-1].end == extent.start else extent.start
                found.append(Extent(begin, end if enough else extent.end))
            if enough:
                break
        return found


class ExportedVolume:
    """What all sources have in common that are read through an export: the reader, and the parent whose bitmap it has.

    Attributes set by whoever derives: `_reader`, and `_parent_id`, empty where no bitmap tells of the parent.
    """

    _reader: ExportReader
    _parent_id: str

    @property
    def size_bytes(self) -> int:
        """Size of the disk when it was opened."""
        return self._reader.size_bytes

    def allocated(self, start: int, end: int) -> Sequence[Extent]:
        """Return what the export does not call zero.

        Raises:
            HoldfastError: SOURCE_UNREADABLE.
        """
        return self._reader.allocated(start, end)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes at `offset`.

        Raises:
            HoldfastError: SOURCE_UNREADABLE.
        """
        self._reader.read_into(offset, buffer)

    def changed_since(self, point_id: str) -> Sequence[Extent] | None:
        """Return what the bitmap of that point has set; None about another point, or without a bitmap that is whole.

        Raises:
            HoldfastError: SOURCE_UNREADABLE.
        """
        return self._reader.dirty() if point_id and point_id == self._parent_id else None


class NbdSource(ExportedVolume):
    """An export of a server that others run. Its change tracker is theirs too: it is read and never touched."""

    def __init__(self, endpoint: NbdEndpoint, export: str, run: BackupRun, *, live: bool = False) -> None:
        """Connect.

        Raises:
            HoldfastError: SOURCE_UNREADABLE; LIMIT_EXCEEDED.
        """
        self._live = live
        self._parent_id = run.parent_id
        self._reader = ExportReader(endpoint, export, bitmap=bitmap_name(run.parent_id) if run.parent_id else "")

    def why_unknown(self) -> str:
        """Return which bitmaps there are instead of the one that was looked for."""
        if not self._parent_id or not (others := self._reader.bitmaps):
            return ""
        wanted = bitmap_name(self._parent_id)
        return "" if wanted in others else f"the export has the bitmap {others[0][:100]!r} and not {wanted}"

    def committed(self) -> None:
        """Do nothing: whoever keeps the bitmap hands it on."""

    def abandoned(self) -> None:
        """Do nothing: whoever keeps the bitmap goes on with it."""

    def finish(self) -> Consistency:
        """Return CRASH for an export that nobody writes through this server, and FUZZY for any other."""
        still = self._reader.client.export.read_only and not self._live
        return Consistency.CRASH if still else Consistency.FUZZY

    def close(self) -> None:
        """Close the connections; may be called more than once."""
        self._reader.close()


def open_nbd(spec: VolumeSpec, run: BackupRun) -> NbdSource:
    """Open the source of an `nbd:` or `nbd+unix:` URI.

    Raises:
        HoldfastError: SOURCE_UNREADABLE; INVALID_ARGUMENT; LIMIT_EXCEEDED.
    """
    uri = parse_volume_uri(os.fspath(spec.uri))
    return NbdSource(NbdEndpoint(uri.host, uri.port, uri.path), uri.export, run, live=spec.live)
