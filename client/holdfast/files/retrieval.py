"""Writing a tree of files below a directory, so that no entry can lead out of it and nothing half-done is left.

All is made in a folder of our own inside the target, which nobody else may enter, one name at a time relative to an
open directory; the top names are moved to their places when everything is there. Nothing that exists is replaced.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from holdfast.files.results import RetrievedFiles
from holdfast.files.trees import Item
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.files.patterns import os_text
from holdfast_core.model.files.sets import check_entry
from holdfast_proto.v1 import files_pb2
from holdfast_proto.v1.files_pb2 import FileEntry

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DEVICES: Final = {
    files_pb2.FILE_KIND_CHARACTER_DEVICE: 0o020000,
    files_pb2.FILE_KIND_BLOCK_DEVICE: 0o060000,
}
_SPECIAL_BITS: Final = 0o6000


@dataclass(frozen=True, slots=True)
class _Open:
    """A directory that is being filled."""

    path: bytes
    descriptor: int


class TargetTree:
    """A directory that files are retrieved into. To be used as a context manager, by one thread."""

    def __init__(
        self, directory: Path, *, durable: bool = False, wrote: Callable[[int], None] = lambda _: None
    ) -> None:
        """Make the directory, with those above it, if it is missing; `wrote` is told of bytes that were written.

        Raises:
            HoldfastError: TARGET_UNWRITABLE.
        """
        self.directory = directory
        self._durable = durable
        self._wrote = wrote
        self._root_user = os.geteuid() == 0
        self._made = [each for each in (directory, *directory.parents) if not each.exists()]
        self._published: list[bytes] = []
        self._left_out: list[str] = []
        self._stack: list[_Open] = []
        self._directories: list[FileEntry] = []
        self._file_count = self._data_bytes = 0
        self._staging = b""
        self._target = -1
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._target = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            name = f".holdfast-{secrets.token_hex(8)}.partial".encode()
            os.mkdir(name, 0o700, dir_fd=self._target)
            self._staging = name
            self._stack.append(_Open(b"", os.open(name, _DIRECTORY, dir_fd=self._target)))
        except OSError as error:
            self.__exit__()
            raise self._unwritable(b"", error) from error

    def __enter__(self) -> TargetTree:
        """Return the target."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove what has not been published, and the directories that were made if they are empty."""
        for level in self._stack:
            os.close(level.descriptor)
        self._stack.clear()
        if self._target < 0:
            return
        if self._staging:
            _open_up(self._staging, self._target)
            shutil.rmtree(self._staging, dir_fd=self._target, ignore_errors=True)
        os.close(self._target)
        self._target = -1
        if not self._published:
            for each in self._made:
                if each.is_dir() and not any(each.iterdir()):
                    each.rmdir()

    def write(self, items: Iterable[Item]) -> RetrievedFiles:
        """Make every entry, then give all of them their names.

        Raises:
            HoldfastError: TARGET_EXISTS if a name is taken; TARGET_UNWRITABLE; CORRUPT if an entry is none that a set
                can have; what reading raises. Nothing is left behind then.
        """
        for item in items:
            entry = item.entry
            check_entry(entry)
            folder, _, name = entry.path.rpartition(b"/")
            self._climb(folder)
            if not folder:
                self._check_free(name)
            try:
                self._make(item, name)
            except OSError as error:
                raise self._unwritable(entry.path, error) from error
        self._climb(b"")
        self._finish_directories()
        self._publish()
        return RetrievedFiles(self.directory, self._file_count, self._data_bytes, tuple(self._left_out))

    def _climb(self, folder: bytes) -> None:
        """Leave directories until `folder` is the one that is open."""
        while self._stack[-1].path != folder:
            if len(self._stack) == 1:
                raise HoldfastError(
                    ErrorCode.CORRUPT, f"the set names {os_text(folder)!r} as a directory and does not hold it"
                )
            os.close(self._stack.pop().descriptor)

    def _check_free(self, name: bytes) -> None:
        try:
            os.stat(name, dir_fd=self._target, follow_symlinks=False)
        except FileNotFoundError:
            return
        raise self._exists(name)

    def _make(self, item: Item, name: bytes) -> None:
        entry = item.entry
        folder = self._stack[-1].descriptor
        if entry.kind == files_pb2.FILE_KIND_REGULAR:
            self._file(item, name, folder)
        elif entry.kind == files_pb2.FILE_KIND_DIRECTORY:
            os.mkdir(name, 0o700, dir_fd=folder)
            self._directories.append(entry)
            self._stack.append(_Open(entry.path, os.open(name, _DIRECTORY, dir_fd=folder)))
        elif entry.kind == files_pb2.FILE_KIND_HARD_LINK:
            self._link(entry, name, folder)
        elif entry.kind == files_pb2.FILE_KIND_SYMBOLIC_LINK:
            os.symlink(entry.target, name, dir_fd=folder)
            self._stamp(name, folder, entry)
        elif entry.kind == files_pb2.FILE_KIND_FIFO:
            os.mkfifo(name, 0o600, dir_fd=folder)
            self._stamp(name, folder, entry)
        elif self._root_user:
            device = os.makedev(entry.device_major, entry.device_minor)
            os.mknod(name, _DEVICES[entry.kind] | 0o600, device, dir_fd=folder)
            self._stamp(name, folder, entry)
        else:
            self._left_out.append(os_text(entry.path))
            return
        self._file_count += 1

    def _file(self, item: Item, name: bytes, folder: int) -> None:
        entry = item.entry
        descriptor = os.open(name, _NEW_FILE, 0o600, dir_fd=folder)
        try:
            os.ftruncate(descriptor, entry.size_bytes)
            for offset, piece in item.read():
                self._data_bytes += len(piece)
                done = 0
                while done < len(piece):
                    done += os.pwrite(descriptor, memoryview(piece)[done:], offset + done)
                self._wrote(len(piece))
            self._finish(descriptor, entry)
        finally:
            os.close(descriptor)

    def _link(self, entry: FileEntry, name: bytes, folder: int) -> None:
        """Give a file that was written a second name, found step by step from the staging folder."""
        at = os.dup(self._stack[0].descriptor)
        try:
            *folders, last = entry.target.split(b"/")
            for each in folders:
                below = os.open(each, _DIRECTORY, dir_fd=at)
                os.close(at)
                at = below
            os.link(last, name, src_dir_fd=at, dst_dir_fd=folder, follow_symlinks=False)
        finally:
            os.close(at)

    def _finish_directories(self) -> None:
        """Give directories what their entries say, from the bottom up: filling one changes its time, and its mode may
        close it."""
        for entry in reversed(self._directories):
            try:
                descriptor = os.open(entry.path, _DIRECTORY, dir_fd=self._stack[0].descriptor)
                try:
                    self._finish(descriptor, entry)
                finally:
                    os.close(descriptor)
            except OSError as error:
                raise self._unwritable(entry.path, error) from error

    def _finish(self, descriptor: int, entry: FileEntry) -> None:
        """Give an open file or directory its owner, mode and time, the owner first because it clears special bits."""
        if self._root_user:
            os.fchown(descriptor, entry.uid, entry.gid)
        os.fchmod(descriptor, self._mode(entry))
        os.utime(descriptor, ns=_times(entry))
        if self._durable:
            os.fsync(descriptor)

    def _stamp(self, name: bytes, folder: int, entry: FileEntry) -> None:
        """Do the same to what cannot be opened; nobody else can reach the name."""
        if self._root_user:
            os.chown(name, entry.uid, entry.gid, dir_fd=folder, follow_symlinks=False)
        if entry.kind != files_pb2.FILE_KIND_SYMBOLIC_LINK:
            os.chmod(name, self._mode(entry), dir_fd=folder)
        os.utime(name, ns=_times(entry), dir_fd=folder, follow_symlinks=False)

    def _mode(self, entry: FileEntry) -> int:
        """Return the mode; who cannot give a file its owner does not run it as somebody else's either."""
        return entry.mode if self._root_user else entry.mode & ~_SPECIAL_BITS

    def _publish(self) -> None:
        """Move the top names to their places; on any failure back."""
        staging = self._stack[0].descriptor
        try:
            for name in sorted(os.fsencode(each) for each in os.listdir(staging)):
                self._move(name, staging, self._target)
                self._published.append(name)
            if self._durable:
                os.fsync(self._target)
        except (OSError, HoldfastError) as error:
            for name in self._published:
                self._move_back(name)
            self._published.clear()
            if isinstance(error, OSError):
                raise self._unwritable(b"", error) from error
            raise

    def _move(self, name: bytes, source: int, target: int) -> None:
        """Move a name and replace nothing: a link refuses by itself, a directory replaces no more than an empty one."""
        status = os.stat(name, dir_fd=source, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            self._check_free(name)
            # To move a directory is to write in it; its owner may do so whatever its mode says, after changing that.
            os.chmod(name, 0o700, dir_fd=source)
            os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)
            os.chmod(name, stat.S_IMODE(status.st_mode), dir_fd=target)
            return
        try:
            os.link(name, name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
        except FileExistsError as error:
            raise self._exists(name) from error
        os.unlink(name, dir_fd=source)

    def _move_back(self, name: bytes) -> None:
        staging = self._stack[0].descriptor
        if stat.S_ISDIR(os.stat(name, dir_fd=self._target, follow_symlinks=False).st_mode):
            os.chmod(name, 0o700, dir_fd=self._target)
        os.rename(name, name, src_dir_fd=self._target, dst_dir_fd=staging)

    def _exists(self, name: bytes) -> HoldfastError:
        return HoldfastError(
            ErrorCode.TARGET_EXISTS,
            f"{os_text(name)!r} is in {self.directory} already; name another directory, or move it away",
        )

    def _unwritable(self, path: bytes, error: OSError) -> HoldfastError:
        what = f"{os_text(path)!r} below {self.directory}" if path else f"the target {self.directory}"
        if error.errno == errno.EEXIST and path:
            return HoldfastError(ErrorCode.CORRUPT, f"the set holds {os_text(path)!r} twice")
        return HoldfastError(ErrorCode.TARGET_UNWRITABLE, f"{what} cannot be written: {error.strerror}")


def _open_up(name: bytes, folder: int) -> None:
    """Let the directories of a tree of ours be emptied, whatever their modes are."""
    for _, names, _, descriptor in os.fwalk(name, dir_fd=folder):
        for each in names:
            if stat.S_ISDIR(os.stat(each, dir_fd=descriptor, follow_symlinks=False).st_mode):
                os.chmod(each, 0o700, dir_fd=descriptor)


def _times(entry: FileEntry) -> tuple[int, int]:
    stamp = entry.mtime_s * 10**9 + entry.mtime_ns
    return stamp, stamp
