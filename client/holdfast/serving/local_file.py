"""A sparse local file, and the durable map of which units of it mean anything.

What a unit holds counts only once its bit is in the map, and the map is written after the data, so that after a crash
the file means what it meant at the last `sync`, or more. Blocking; the caller brings the threads. The map in memory
belongs to the caller's event loop: `sync` is given the pages to write.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from holdfast.descriptors import Extent, RawReader
from holdfast.holes import clear
from holdfast.serving.unit_map import PAGE_BYTES, UnitMap
from holdfast_core.model.errors import ErrorCode, HoldfastError


class LocalFile:
    """One data file NAME and its map NAME.map. Reads and writes may overlap between threads; `sync` may not.

    Attributes:
        size_bytes: size of the data file.
        unit_bytes: what one bit of the map stands for; the last unit may be shorter.
        map: which units mean anything.
    """

    def __init__(self, path: Path, *, size_bytes: int, unit_bytes: int) -> None:
        """Open both files, or make them.

        Raises:
            HoldfastError: TARGET_UNWRITABLE if they cannot be made or read; MISMATCH if the data file has another size.
        """
        self._path = path
        self.size_bytes = size_bytes
        self.unit_bytes = unit_bytes
        self.map = UnitMap(-(-size_bytes // unit_bytes))
        self._failed = False
        self._descriptors: list[int] = []
        try:
            self._data = self._opened(path)
            self._map = self._opened(path.with_name(f"{path.name}.map"))
            present = os.fstat(self._data).st_size
            if present == 0:
                os.ftruncate(self._data, size_bytes)
            elif present != size_bytes:
                raise HoldfastError(
                    ErrorCode.MISMATCH, f"{path} has {present} bytes and not {size_bytes}; it belongs to something else"
                )
            self._load_map()
        except OSError as error:
            self.close()
            raise unusable(path, error) from error
        except HoldfastError:
            self.close()
            raise

    def _opened(self, path: Path) -> int:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._descriptors.append(descriptor)
        return descriptor

    def _load_map(self) -> None:
        size = os.fstat(self._map).st_size
        reader = RawReader(self._map, name=str(self._path), size_bytes=size, live=True)
        for extent in reader.allocated(0, size):
            first = extent.start // PAGE_BYTES
            for number in range(first, -(-extent.end // PAGE_BYTES)):
                self.map.load(number, os.pread(self._map, PAGE_BYTES, number * PAGE_BYTES))

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes of the data file.

        Raises:
            HoldfastError: SOURCE_UNREADABLE.
        """
        pieces = []
        while length:
            try:
                piece = os.pread(self._data, length, offset)
            except OSError as error:
                raise HoldfastError(
                    ErrorCode.SOURCE_UNREADABLE, f"{self._path} cannot be read: {error.strerror}"
                ) from error
            if not piece:
                raise HoldfastError(ErrorCode.SOURCE_UNREADABLE, f"{self._path} has become shorter")
            pieces.append(piece)
            offset += len(piece)
            length -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write bytes of the data file; they mean nothing before their units are in the map.

        Raises:
            HoldfastError: TARGET_UNWRITABLE, e.g. because the disk is full.
        """
        view = memoryview(data)
        try:
            while view:
                count = os.pwrite(self._data, view, offset)
                offset += count
                view = view[count:]
        except OSError as error:
            raise unusable(self._path, error) from error

    def zero(self, offset: int, length: int, *, allocate: bool) -> None:
        """Make a range zeros: a hole, or allocated space if a later write must find room.

        Raises:
            HoldfastError: TARGET_UNWRITABLE.
        """
        try:
            clear(self._data, offset, offset + length)
            if allocate:
                os.posix_fallocate(self._data, offset, length)
        except OSError as error:
            raise unusable(self._path, error) from error

    def extents(self, start: int, end: int) -> Sequence[Extent]:
        """Return what is allocated of a range; all else is zero."""
        return RawReader(self._data, name=str(self._path), size_bytes=self.size_bytes, live=True).allocated(start, end)

    def sync(self, pages: Mapping[int, bytes]) -> None:
        """Bring the data to the disk, and then the given pages of the map.

        Raises:
            HoldfastError: TARGET_UNWRITABLE. A system that failed at this once may have dropped what it could not
                write, so every later call fails too.
        """
        if self._failed:
            raise HoldfastError(
                ErrorCode.TARGET_UNWRITABLE,
                f"{self._path} could not be brought to the disk before; what it lost is unknown",
            )
        self._failed = True
        try:
            os.fdatasync(self._data)
            for number, page in pages.items():
                if os.pwrite(self._map, page, number * PAGE_BYTES) != len(page):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if pages:
                os.fdatasync(self._map)
        except OSError as error:
            raise unusable(self._path, error) from error
        self._failed = False

    def close(self) -> None:
        """Close both files; may be called more than once."""
        while self._descriptors:
            os.close(self._descriptors.pop())


def unusable(path: Path, error: OSError) -> HoldfastError:
    """Return the error for a file of an overlay that cannot be written."""
    return HoldfastError(
        ErrorCode.TARGET_UNWRITABLE,
        f"the overlay's {path} cannot be written: {error.strerror}",
        facts={"errno": errno.errorcode.get(error.errno or 0, "")},
    )
