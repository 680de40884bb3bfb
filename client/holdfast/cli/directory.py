"""The directory of `holdfast up`: one folder a service, their logs, the master key, and a lock against a second `up`.

DIR/coordinator/   metadata (empty with --etcd)      DIR/master.key   32 random bytes, mode 0600
DIR/node-1/ …      blocks of each storage node       DIR/logs/        one log a service
    DIR/run/           process ids while they run
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from holdfast_core.model.errors import ErrorCode, HoldfastError

# A log this large is set aside (one generation) when a service starts.
_LOG_BYTES_MAX: Final = 16 * 1024 * 1024
_NODE_NAME: Final = re.compile(r"node-([1-9][0-9]*)\Z")


@dataclass(frozen=True, slots=True)
class UpDirectory:
    """Paths below the directory `root`."""

    root: Path

    @property
    def master_key(self) -> Path:
        """The file of the master key."""
        return self.root / "master.key"

    def service(self, name: str) -> Path:
        """The folder of a service: "coordinator" or "node-1" and so on."""
        return self.root / name

    def pid_file(self, name: str) -> Path:
        """The file with a running service's process id, for scripts that want to stop one."""
        return self.root / "run" / f"{name}.pid"

    def log(self, name: str) -> Path:
        """The log file of a service."""
        return self.root / "logs" / f"{name}.log"

    def node_count(self) -> int:
        """The highest number of a node that has a folder; 0 in a new directory."""
        found = (_NODE_NAME.match(entry.name) for entry in self.root.iterdir())
        return max((int(match.group(1)) for match in found if match), default=0)

    def is_new(self) -> bool:
        """Whether nothing was kept here yet, so that a new master key may be made.

        Raises:
            HoldfastError: KEY_MISMATCH if state is here but its key is not.
        """
        names = ("coordinator", *(f"node-{number}" for number in range(1, self.node_count() + 1)))
        folders = [self.service(name) for name in names]
        used = any(folder.is_dir() and any(folder.iterdir()) for folder in folders)
        if used and not self.master_key.exists():
            raise HoldfastError(
                ErrorCode.KEY_MISMATCH,
                f"{self.master_key} is gone, and what {self.root} holds cannot be read without it; put it back",
            )
        return not used

    def open_log(self, name: str) -> int:
        """Open a service's log for appending and return its file descriptor; a large one is set aside first."""
        path = self.log(name)
        if path.exists() and path.stat().st_size > _LOG_BYTES_MAX:
            path.replace(path.with_suffix(".log.1"))
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


@contextmanager
def opened(root: Path) -> Iterator[UpDirectory]:
    """Make the directory if it is missing, readable by its owner alone, and hold it while the block runs.

    Raises:
        HoldfastError: CONFLICT if another `up` holds it, INVALID_ARGUMENT if it cannot be made or written.
    """
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(root / "up.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT, f"{root} cannot be used: {error.strerror}; choose another --data"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise HoldfastError(
                ErrorCode.CONFLICT, f"another `holdfast up` runs on {root}; stop it, or choose another --data"
            ) from error
        for folder in ("logs", "run"):
            (root / folder).mkdir(exist_ok=True)
        yield UpDirectory(root)
    finally:
        os.close(descriptor)
