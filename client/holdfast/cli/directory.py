"""The directory of `holdfast up`: one folder a service, their logs, keys, and a lock against a second `up`.

DIR/coordinator/   metadata (empty with --etcd)      DIR/master.key    32 random bytes, mode 0600
DIR/node-1/ …      blocks of each storage node       DIR/admin.token   what callers show, mode 0600, new at each start
DIR/run/           process ids while they run        DIR/node.token    what nodes show
DIR/logs/          one log a service
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from holdfast.cli.exits import say
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.credentials import home_token_file, new_token, write_token

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

    @property
    def admin_token(self) -> Path:
        """The file of the token that stands for an administrator."""
        return self.root / "admin.token"

    @property
    def node_token(self) -> Path:
        """The file of the token that storage nodes join with."""
        return self.root / "node.token"

    def draw_tokens(self, random_bytes: Callable[[int], bytes]) -> None:
        """Draw both tokens anew: one that got into other hands ends with the cluster's run.

        Raises:
            HoldfastError: INVALID_ARGUMENT if they cannot be written.
        """
        for path in (self.admin_token, self.node_token):
            try:
                write_token(path, new_token(random_bytes))
            except OSError as error:
                raise HoldfastError(
                    ErrorCode.INVALID_ARGUMENT, f"{path} cannot be written: {error.strerror}; choose another --data"
                ) from error

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


@contextmanager
def token_at_home(directory: UpDirectory, address: str) -> Iterator[None]:
    """Keep the admin's token in the user's home while the block runs, under the coordinator's address.

    Commands and the SDK find it there, for this user alone. Where the home cannot be written they have to be told.
    """
    text = directory.admin_token.read_text(encoding="ascii").strip()
    try:
        path = home_token_file(address)
        for folder in (path.parents[1], path.parent):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_token(path, text)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "this user has none"
        say(f"the token cannot be kept in the home ({reason}); use: --token-file {directory.admin_token}")
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError):
            # Another cluster that took the port since has put its own there.
            if path.read_text(encoding="ascii").strip() == text:
                path.unlink()
