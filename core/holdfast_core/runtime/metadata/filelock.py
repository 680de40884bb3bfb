"""The lock that keeps a second coordinator off an embedded metadata store.

It is a `flock` on a file beside the database, not on the database itself: SQLite keeps POSIX locks there, and closing
any other descriptor of the same file would silently drop those. The kernel frees a `flock` when its holder dies, so
nothing stays behind after kill -9. The file is never removed: removing it would let two holders lock two files.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from holdfast_core.model.errors import ErrorCode, HoldfastError


class FileLock:
    """An exclusive lock on `path`, held from construction until `release` or the end of the process."""

    def __init__(self, path: Path, *, subject: str) -> None:
        """Take the lock on `path`; `subject` names for the message what it protects.

        Raises:
            HoldfastError: BUSY, with the holder's process id in facts["pid"] where it could be read.
            OSError: the file cannot be opened or locked.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            holder = f"process {pid}" if pid else "another process"
            raise HoldfastError(
                ErrorCode.BUSY,
                f"{subject} is in use by {holder}; stop that coordinator first, or use etcd to run several",
                facts={"pid": pid} if pid else {},
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        # For the message above only; the lock itself is the kernel's.
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """Give the lock up; a second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
