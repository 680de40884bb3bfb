"""A directory of this machine as a tree of files.

Nothing is followed: every directory is opened relative to the one above it and must be what it was when it was
listed, so that whoever can write in the tree cannot lead the walk out of it. A file that changes while it is read ends
the walk.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from holdfast.files.trees import READ_BYTES, Child, Item, Pieces, Walk
from holdfast.sources.identity import FileIdentity, rested_identity
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.files.patterns import Selection, os_text
from holdfast_core.model.files.sets import HOLE_BYTES
from holdfast_proto.v1 import files_pb2
from holdfast_proto.v1.files_pb2 import FileEntry

_KINDS: Final = {
    stat.S_IFREG: files_pb2.FILE_KIND_REGULAR,
    stat.S_IFDIR: files_pb2.FILE_KIND_DIRECTORY,
    stat.S_IFLNK: files_pb2.FILE_KIND_SYMBOLIC_LINK,
    stat.S_IFIFO: files_pb2.FILE_KIND_FIFO,
    stat.S_IFCHR: files_pb2.FILE_KIND_CHARACTER_DEVICE,
    stat.S_IFBLK: files_pb2.FILE_KIND_BLOCK_DEVICE,
}
_OPEN: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


@dataclass(slots=True)
class _Place:
    """A file or directory: where it was found, and what it was then. `descriptor` is that of an entered directory."""

    name: bytes
    status: os.stat_result
    descriptor: int = -1


class DirectoryTree:
    """The files below a directory."""

    def __init__(self, path: Path) -> None:
        """Open the directory; a symbolic link to one is followed, as whoever names it says so.

        Raises:
            HoldfastError: SOURCE_UNREADABLE if it is missing, cannot be read or is no directory.
        """
        self._path = path
        try:
            self._root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise HoldfastError(
                ErrorCode.SOURCE_UNREADABLE, f"the directory {path} cannot be read: {error.strerror}"
            ) from error
        self._stack: list[int] = []

    def items(self, selection: Selection, *, depth: int | None = None, content: bool = False) -> Iterator[Item]:
        """Yield what is selected, in the order of a set; sockets are left out.

        Raises:
            HoldfastError: SOURCE_UNREADABLE or VOLUME_CHANGED, naming the file.
        """
        return Walk(self).items(_Place(b"", os.fstat(self._root)), selection, depth=depth)

    def enter(self, place: _Place) -> list[Child[_Place]]:
        """Open a directory of the one that was entered last, and list it."""
        if self._stack:
            place.descriptor = self._open(place, os.O_DIRECTORY)
        else:
            place.descriptor = os.dup(self._root)
        self._stack.append(place.descriptor)
        try:
            # A directory given by its descriptor lists its names as text, bytes that are no UTF-8 as surrogates.
            return [child for name in os.listdir(place.descriptor) if (child := self._child(os.fsencode(name)))]
        except OSError as error:
            raise self._unreadable(place.name, error) from error

    def leave(self, place: _Place) -> None:
        """Close a directory."""
        if place.descriptor >= 0:
            self._stack.remove(place.descriptor)
            os.close(place.descriptor)
            place.descriptor = -1

    def expect(self, child: Child[_Place]) -> None:
        """Prepare nothing: the kernel reads ahead by itself."""

    def read(self, child: Child[_Place], path: bytes) -> Pieces:
        """Return the content of a file of the directory that was entered last, holes left out.

        Raises:
            HoldfastError: SOURCE_UNREADABLE or VOLUME_CHANGED.
        """
        place = child.place
        # A change in the same tick as the one before leaves no trace: that tick is let pass before reading.
        rested_identity(lambda: FileIdentity.of(place.status))
        descriptor = self._open(place, 0)
        try:
            size = place.status.st_size
            at = 0
            while at < size:
                start, end = _next_extent(descriptor, at, size)
                for offset in range(start, end, READ_BYTES):
                    yield offset, self._read(descriptor, offset, min(READ_BYTES, end - offset), path)
                at = end
            if FileIdentity.of(os.fstat(descriptor)) != FileIdentity.of(place.status):
                raise _changed(path)
        except OSError as error:
            raise self._unreadable(path, error) from error
        finally:
            os.close(descriptor)

    def _read(self, descriptor: int, offset: int, length: int, path: bytes) -> bytes:
        data = os.pread(descriptor, length, offset)
        while len(data) < length:
            more = os.pread(descriptor, length - len(data), offset + len(data))
            if not more:
                raise _changed(path)
            data += more
        return data

    def _child(self, name: bytes) -> Child[_Place] | None:
        """Return what a name stands for; None for sockets, which are of a process and not of a tree."""
        folder = self._stack[-1]
        try:
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            kind = _KINDS.get(stat.S_IFMT(status.st_mode))
            if kind is None:
                return None
            target = os.readlink(name, dir_fd=folder) if kind == files_pb2.FILE_KIND_SYMBOLIC_LINK else b""
        except FileNotFoundError as error:
            raise _changed(name) from error
        seconds, nanoseconds = divmod(status.st_mtime_ns, 10**9)
        entry = FileEntry(
            kind=kind,
            mode=stat.S_IMODE(status.st_mode),
            uid=status.st_uid,
            gid=status.st_gid,
            mtime_s=seconds,
            mtime_ns=nanoseconds,
            target=target,
        )
        if kind == files_pb2.FILE_KIND_REGULAR:
            entry.size_bytes = status.st_size
        elif kind in (files_pb2.FILE_KIND_CHARACTER_DEVICE, files_pb2.FILE_KIND_BLOCK_DEVICE):
            entry.device_major, entry.device_minor = os.major(status.st_rdev), os.minor(status.st_rdev)
        identity = (status.st_dev, status.st_ino) if status.st_nlink > 1 else None
        return Child(name, entry, _Place(name, status), identity)

    def _open(self, place: _Place, flags: int) -> int:
        try:
            descriptor = os.open(place.name, _OPEN | flags, dir_fd=self._stack[-1])
        except OSError as error:
            raise self._unreadable(place.name, error) from error
        now = os.fstat(descriptor)
        directory = bool(flags & os.O_DIRECTORY)
        same = (now.st_dev, now.st_ino) == (place.status.st_dev, place.status.st_ino)
        if not same or not (directory or FileIdentity.of(now) == FileIdentity.of(place.status)):
            os.close(descriptor)
            raise _changed(place.name)
        return descriptor

    def _unreadable(self, path: bytes, error: OSError) -> HoldfastError:
        if isinstance(error, FileNotFoundError):
            return _changed(path)
        return HoldfastError(
            ErrorCode.SOURCE_UNREADABLE,
            f"{os_text(path)!r} below {self._path} cannot be read: {error.strerror}",
        )

    def close(self) -> None:
        """Close the directory."""
        if self._root >= 0:
            os.close(self._root)
            self._root = -1


def _next_extent(descriptor: int, at: int, size: int) -> tuple[int, int]:
    """Return the next range that may have data, widened to whole units; (size, size) where there is none."""
    try:
        start = os.lseek(descriptor, at, os.SEEK_DATA)
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
    except OSError as error:
        # ENXIO: nothing but a hole is left. Where holes cannot be asked for, all of a file is data.
        return (size, size) if error.errno == errno.ENXIO else (at, size)
    start = max(at, start // HOLE_BYTES * HOLE_BYTES)
    return start, min(size, -(-end // HOLE_BYTES) * HOLE_BYTES)


def _changed(path: bytes) -> HoldfastError:
    return HoldfastError(
        ErrorCode.VOLUME_CHANGED, f"{os_text(path)!r} changed while the files were read; try again when nothing writes"
    )
