"""Where a point is restored to: a directory whose files get their names when all of them are whole and verified."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from holdfast_core.model.errors import ErrorCode, HoldfastError

PARTIAL_SUFFIX: Final = ".partial"


class Target:
    """A directory to restore into. Files have temporary names until `publish`; `discard` leaves nothing of ours."""

    def __init__(self, directory: Path) -> None:
        """Make the directory, or take it if it is there and empty.

        Raises:
            HoldfastError: TARGET_EXISTS if something is there; TARGET_UNWRITABLE if it cannot be made.
        """
        self.directory = directory
        self._files: dict[str, int] = {}
        self._made: list[Path] = []
        try:
            if directory.exists() or directory.is_symlink():
                if not directory.is_dir() or any(directory.iterdir()):
                    raise HoldfastError(
                        ErrorCode.TARGET_EXISTS,
                        f"the restore target {directory} is there and not an empty directory; name another one",
                    )
            else:
                self._make(directory)
        except OSError as error:
            raise unwritable(directory, error) from error

    def _make(self, directory: Path) -> None:
        if not directory.parent.exists():
            self._make(directory.parent)
        directory.mkdir()
        self._made.append(directory)

    def create(self, name: str, size_bytes: int) -> int:
        """Make the file `name`, a hole of its size; returns its descriptor, which stays the target's.

        Raises:
            HoldfastError: TARGET_UNWRITABLE.
        """
        path = self._partial(name)
        if name in self._files:
            raise HoldfastError(ErrorCode.TARGET_EXISTS, f"two files of the point would be named {name}")
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._files[name] = descriptor
            os.ftruncate(descriptor, size_bytes)
        except OSError as error:
            raise unwritable(path, error) from error
        return descriptor

    def write(self, name: str, data: bytes) -> None:
        """Make the file `name` with `data` in it.

        Raises:
            HoldfastError: TARGET_UNWRITABLE.
        """
        descriptor = self.create(name, 0)
        try:
            done = 0
            while done < len(data):
                done += os.write(descriptor, memoryview(data)[done:])
        except OSError as error:
            raise unwritable(self.directory / name, error) from error

    def publish(self, *, durable: bool) -> None:
        """Give all files their names; `durable` first brings them to the disk.

        Raises:
            HoldfastError: TARGET_UNWRITABLE.
        """
        try:
            for name, descriptor in list(self._files.items()):
                if durable:
                    os.fsync(descriptor)
                os.close(descriptor)
                self._files[name] = -1
            for name in self._files:
                os.rename(self._partial(name), self.directory / name)
            if durable:
                sync_directory(self.directory)
        except OSError as error:
            raise unwritable(self.directory, error) from error

    def discard(self) -> None:
        """Remove our files, and the directories that we made."""
        for name, descriptor in self._files.items():
            if descriptor >= 0:
                os.close(descriptor)
            self._partial(name).unlink(missing_ok=True)
            (self.directory / name).unlink(missing_ok=True)
        for directory in reversed(self._made):
            if any(directory.iterdir()):
                return
            directory.rmdir()

    def _partial(self, name: str) -> Path:
        return partial_path(self.directory / name)


def partial_path(path: Path) -> Path:
    """Return the name of a file that is not whole yet."""
    return path.with_name(f".{path.name}{PARTIAL_SUFFIX}")


def sync_directory(directory: Path) -> None:
    """Bring the names in a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unwritable(path: Path, error: OSError) -> HoldfastError:
    """Make the error for a target that cannot be written."""
    return HoldfastError(ErrorCode.TARGET_UNWRITABLE, f"the restore target {path} cannot be written: {error.strerror}")
