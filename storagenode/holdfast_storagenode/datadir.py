"""A node's data directory: who the node is, what it last knew of its cluster, and a lock against a second process."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.names import check_name
from holdfast_proto.v1.cluster_pb2 import HeartbeatResponse
from holdfast_storagenode.durable import write_durably
from holdfast_storagenode.healing.scrub_place import ScrubPlace, decode_place, encode_place
from holdfast_storagenode.segments.record import INCARNATION_BYTES

IDENTITY_NAME: Final = "node.json"
CLUSTER_NAME: Final = "cluster.pb"
SCRUB_NAME: Final = "scrub.json"
LOCK_NAME: Final = "lock"

_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Identity:
    """A node's name, and the 16 random bytes that tell its directory from every other."""

    node_id: str
    incarnation: bytes


class DataDirectory:
    """A locked directory; `open` makes what is not there."""

    def __init__(self, path: Path, identity: Identity, lock_fd: int) -> None:
        self.path = path
        self.identity = identity
        self._lock_fd = lock_fd

    @classmethod
    def open(cls, path: Path, *, node_id: str | None, random_bytes: Callable[[int], bytes]) -> DataDirectory:
        """Lock the directory and read or make the node's identity; a new one without a name takes the machine's.

        Raises:
            HoldfastError: CONFLICT if another process holds it; MISMATCH if it belongs to another node than
                `node_id`; INVALID_ARGUMENT if it cannot be used; CORRUPT if its identity is unreadable.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock_fd = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT, f"the data directory {path} cannot be used: {error.strerror}"
            ) from error
        try:
            _lock(lock_fd, path)
            identity = _identity(path, node_id, random_bytes)
        except HoldfastError:
            os.close(lock_fd)
            raise
        return cls(path, identity, lock_fd)

    def load_cluster(self) -> HeartbeatResponse | None:
        """Return the last coordinator's answer that was saved, or None.

        Raises:
            HoldfastError: CORRUPT if the file is unreadable.
        """
        file = self.path / CLUSTER_NAME
        if not file.exists():
            return None
        try:
            return HeartbeatResponse.FromString(file.read_bytes())
        except DecodeError as error:
            raise HoldfastError(
                ErrorCode.CORRUPT, f"{file} is damaged; remove it, the next heartbeat makes it anew"
            ) from error

    def save_cluster(self, response: HeartbeatResponse) -> None:
        """Save a coordinator's answer durably."""
        write_durably(self.path / CLUSTER_NAME, response.SerializeToString())

    def load_scrub(self) -> ScrubPlace:
        """Return how far scrubbing came; the beginning where nothing was saved, or what was cannot be read.

        A file that is damaged costs a round of reading, and nothing else.
        """
        file = self.path / SCRUB_NAME
        try:
            return decode_place(file.read_bytes()) if file.exists() else ScrubPlace()
        except HoldfastError:
            return ScrubPlace()

    def save_scrub(self, place: ScrubPlace) -> None:
        """Save how far scrubbing came, durably."""
        write_durably(self.path / SCRUB_NAME, encode_place(place))

    def close(self) -> None:
        """Let go of the lock."""
        os.close(self._lock_fd)


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise HoldfastError(
            ErrorCode.CONFLICT, f"another storage node runs on {path}; give each a directory of its own"
        ) from error


def _identity(path: Path, node_id: str | None, random_bytes: Callable[[int], bytes]) -> Identity:
    file = path / IDENTITY_NAME
    if not file.exists():
        if (path / "segments").exists():
            raise HoldfastError(ErrorCode.CORRUPT, f"{path} holds blocks, but {IDENTITY_NAME} is gone; put it back")
        identity = Identity(check_name(node_id or socket.gethostname(), "node name"), random_bytes(INCARNATION_BYTES))
        fields = {"version": _VERSION, "node_id": identity.node_id, "incarnation": identity.incarnation.hex()}
        write_durably(file, json.dumps(fields).encode())
        return identity
    try:
        fields = json.loads(file.read_bytes())
        version = fields["version"]
        identity = Identity(str(fields["node_id"]), bytes.fromhex(fields["incarnation"]))
    except (ValueError, KeyError, TypeError) as error:
        raise HoldfastError(ErrorCode.CORRUPT, f"{file} is damaged; put it back from a backup") from error
    if version != _VERSION:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"{path} has version {version}; this program knows {_VERSION}")
    if node_id is not None and node_id != identity.node_id:
        raise HoldfastError(
            ErrorCode.MISMATCH, f"{path} belongs to the node {identity.node_id}, not {node_id}; check --data"
        )
    return identity
