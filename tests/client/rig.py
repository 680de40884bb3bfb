"""What the tests share: VMs with files to change, and damage done behind the cluster's back."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from holdfast import Codec, Consistency, Extent, HoldfastError, StateManager, VolumeSpec
from holdfast.testing import MemoryCluster
from holdfast_storagenode.memory import MemoryStore

BLOCK = 64 * 1024
TENANT = 1


def noise(size: int, seed: int = 0) -> bytes:
    """Bytes that do not compress, the same for one seed."""
    return blake3(b"noise %d" % seed).digest(length=size)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def allocated_bytes(path: Path) -> int:
    """Bytes that a file occupies."""
    return path.stat().st_blocks * 512


def write_at(path: Path, offset: int, data: bytes) -> None:
    """Change a file in place."""
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def make_sparse(path: Path, size: int, pieces: Sequence[tuple[int, bytes]] = ()) -> Path:
    """Make a sparse file of `size` with some pieces in it."""
    with path.open("wb") as stream:
        stream.truncate(size)
        for offset, data in pieces:
            stream.seek(offset)
            stream.write(data)
    return path


@dataclass
class Vm:
    """A VM whose volumes are files in a folder."""

    manager: StateManager
    name: str
    folder: Path

    def path(self, volume: str = "root") -> Path:
        """The file of a volume."""
        return self.folder / f"{self.name}-{volume}.raw"

    def volume(self, size: int, pieces: Sequence[tuple[int, bytes]] = (), *, name: str = "root") -> Path:
        """Make a volume's file."""
        return make_sparse(self.path(name), size, pieces)

    def register(self, *names: str, block_bytes: int = BLOCK, live: bool = False, codec: Codec = Codec.DEFAULT) -> None:
        """Register the files as volumes."""
        volumes = {
            name: VolumeSpec(self.path(name), block_bytes=block_bytes, live=live, codec=codec)
            for name in names or ("root",)
        }
        self.manager.register_vm(self.name, volumes, replace=True)

    def snapshot(self) -> str:
        """Take a snapshot."""
        return self.manager.create_snapshot(self.name)

    def restored(self, snapshot: str, backup: str = "") -> Path:
        """Restore a point into a fresh folder."""
        return self.manager.restore_vm(snapshot, backup, target=self.folder / f"restored-{os.urandom(4).hex()}")

    def assert_restores(self, snapshot: str, backup: str = "", *, names: Sequence[str] = ("root",)) -> None:
        """A restore gives the files as they are now, holes and all."""
        target = self.restored(snapshot, backup)
        assert sorted(path.name for path in target.iterdir()) == sorted(["vm.json", *(f"{name}.raw" for name in names)])
        for name in names:
            restored, source = target / f"{name}.raw", self.path(name)
            assert restored.stat().st_size == source.stat().st_size
            assert digest(restored) == digest(source)


def store_of(cluster: MemoryCluster, number: int) -> MemoryStore:
    """The blocks of a node in memory, behind the service's back."""
    store = cluster.node(number)._memory._store  # type: ignore[attr-defined]
    assert isinstance(store, MemoryStore)
    return store


def data_ids(cluster: MemoryCluster, number: int, kind: int = 0) -> list[bytes]:
    """Ids of a kind of blocks that a node holds."""
    entries = store_of(cluster, number).scan(TENANT, partition=None, after=b"", limit=1_000_000)
    return [entry.block_id for entry in entries if entry.kind == kind]


def rot(cluster: MemoryCluster, number: int, block_id: bytes) -> None:
    """Flip a bit of a block on one node."""
    store = store_of(cluster, number)
    found = store.get(TENANT, [block_id], bytes_max=1 << 30)[0]
    data = bytearray(found.data)  # type: ignore[union-attr]
    data[-1] ^= 1
    store.overwrite(TENANT, block_id, bytes(data))


class MemorySource:
    """A volume in memory, with a hook that runs before the read at an offset: to change things in mid-read."""

    def __init__(self, data: bytes, *, at_read: Callable[[int], None] | None = None) -> None:
        self.data = bytearray(data)
        self.closed = False
        self.reads = 0
        self._at_read = at_read

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    def allocated(self, start: int, end: int) -> Sequence[Extent]:
        return [Extent(start, end)] if start < end else []

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.reads += 1
        if self._at_read is not None:
            self._at_read(offset)
        buffer[:] = self.data[offset : offset + len(buffer)]

    def changed_since(self, point_id: str) -> Sequence[Extent] | None:
        return None

    def finish(self) -> Consistency:
        return Consistency.OFFLINE

    def close(self) -> None:
        self.closed = True


def error_of(call: Callable[[], object]) -> HoldfastError:
    """Run a call that must fail; return its error."""
    try:
        call()
    except HoldfastError as error:
        return error
    raise AssertionError("the call did not fail")
