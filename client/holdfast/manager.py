"""`StateManager`: the blocking face of `AsyncStateManager`. No logic of its own: each call runs there and waits."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from holdfast.aio import AsyncStateManager
from holdfast.background import LoopThread
from holdfast.calls.cluster import ClusterCalls
from holdfast.calls.collection import CollectionCalls
from holdfast.calls.files import FileCalls
from holdfast.calls.lifecycle import LifecycleCalls
from holdfast.calls.retention import RetentionCalls
from holdfast.calls.serving import ServingCalls
from holdfast.calls.verifying import VerifyCalls
from holdfast.results import ObjectInfo, PointInfo, ProgressCallback, Stats, Transfer
from holdfast.sealers import Sealing
from holdfast.sources import GivenSource
from holdfast.sources.told import Changed
from holdfast_core.model.limits import REPLICA_SETTLE_S, SAMPLE_DEFAULT
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.options import TlsFiles

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from holdfast.findings import RestoreReport


class StateManager(LifecycleCalls, RetentionCalls, FileCalls, CollectionCalls, ServingCalls, ClusterCalls, VerifyCalls):
    """Keeps and restores the state of VMs, and the data of their tasks, in a Holdfast cluster.

    Safe to share between threads. A context manager; otherwise call `close`. Progress callbacks run in the manager's
    own thread and must not call the manager. Each method does what the one of `AsyncStateManager` does, and raises the
    same.
    """

    def __init__(
        self,
        coordinator: str | None = None,
        *,
        token: str | None = None,
        token_file: str | os.PathLike[str] | None = None,
        tenant: str | None = None,
        key_file: str | os.PathLike[str] | None = None,
        restore_dir: str | os.PathLike[str] | None = None,
        tls: TlsFiles | None = None,
        replica_wait_s: float = REPLICA_SETTLE_S,
        workers: int | None = None,
        sealing: Sealing | None = None,
        sample: float = SAMPLE_DEFAULT,
        clock: Clock | None = None,
    ) -> None:
        """Bind to a cluster; see `AsyncStateManager` for the arguments.

        Raises:
            HoldfastError: INVALID_ARGUMENT if no coordinator is named or an address is malformed.
        """
        self._core = AsyncStateManager(
            coordinator,
            token=token,
            token_file=token_file,
            tenant=tenant,
            key_file=key_file,
            restore_dir=restore_dir,
            tls=tls,
            replica_wait_s=replica_wait_s,
            workers=workers,
            sealing=sealing,
            sample=sample,
            clock=clock,
        )
        self._loop = LoopThread()

    def __enter__(self) -> StateManager:
        """Return the manager."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the manager."""
        self.close()

    def close(self) -> None:
        """Cancel what is under way and release everything. Further calls do nothing."""
        self._loop.close(self._core.close())

    def settle(self, timeout_s: float | None = None) -> bool:
        """Wait for copies that go on behind committed writes; returns whether none is left."""
        return self._loop.run(self._core.settle(timeout_s))

    @property
    def last_transfer(self) -> Transfer | None:
        """Times and counters of the write that committed last, of any thread."""
        return self._core.last_transfer

    # The five calls

    def create_snapshot(
        self,
        vm_id: str,
        *,
        base: str = "",
        takeover: bool = False,
        sources: Mapping[str, GivenSource] | None = None,
        progress: ProgressCallback | None = None,
    ) -> str:
        """Save all volumes of a VM as its first point; returns the snapshot's id once it is durable and visible."""
        return self._loop.run(
            self._core.create_snapshot(vm_id, base=base, takeover=takeover, sources=sources, progress=progress)
        )

    def incremental_backup(
        self,
        vm_id: str,
        snapshot_id: str,
        *,
        parent: str = "",
        base: str = "",
        takeover: bool = False,
        sources: Mapping[str, GivenSource] | None = None,
        changed: Changed | None = None,
        since: str = "",
        sample: float | None = None,
        progress: ProgressCallback | None = None,
    ) -> str:
        """Save what changed since the newest living point that descends from `snapshot_id`, or since `parent`."""
        return self._loop.run(
            self._core.incremental_backup(
                vm_id,
                snapshot_id,
                parent=parent,
                base=base,
                takeover=takeover,
                sources=sources,
                changed=changed,
                since=since,
                sample=sample,
                progress=progress,
            )
        )

    def restore_vm(
        self,
        snapshot_id: str,
        backup_id: str = "",
        *,
        target: str | os.PathLike[str] | None = None,
        onto: str | os.PathLike[str] | None = None,
        image_format: str = "raw",
        durable: bool = False,
        partial: bool = False,
        progress: ProgressCallback | None = None,
    ) -> Path:
        """Write all volumes of a point, verified; returns their directory."""
        return self._loop.run(
            self._core.restore_vm(
                snapshot_id,
                backup_id,
                target=target,
                onto=onto,
                image_format=image_format,
                durable=durable,
                partial=partial,
                progress=progress,
            )
        )

    @property
    def last_restore(self) -> RestoreReport | None:
        """What the restore that ended last brought, of any thread."""
        return self._core.last_restore

    def persist_application_data(self, task_id: str, data: bytes, *, progress: ProgressCallback | None = None) -> str:
        """Store bytes for a task; returns the storage id once they are durable."""
        return self._loop.run(self._core.persist_application_data(task_id, data, progress=progress))

    def retrieve_application_data(
        self,
        storage_id: str,
        *,
        offset: int = 0,
        length: int | None = None,
        progress: ProgressCallback | None = None,
    ) -> bytes:
        """Return an object's bytes, verified; all of them, or `length` from `offset`."""
        return self._loop.run(
            self._core.retrieve_application_data(storage_id, offset=offset, length=length, progress=progress)
        )

    # VMs and their points

    def points(self, vm_id: str, *, include_forgotten: bool = False) -> list[PointInfo]:
        """Return a VM's points, oldest first."""
        return self._loop.run(self._core.points(vm_id, include_forgotten=include_forgotten))

    def point(self, point_id: str) -> PointInfo:
        """Return a point."""
        return self._loop.run(self._core.point(point_id))

    def forget(self, point_id: str) -> None:
        """Forget a point; its id stays known as a link of its lineage."""
        self._loop.run(self._core.forget(point_id))

    def stats(self, vm_id: str = "") -> Stats:
        """Return sums over a VM's points, or over the tenant."""
        return self._loop.run(self._core.stats(vm_id))

    # Application data beyond bytes

    def persist_stream(
        self, task_id: str, stream: BinaryIO | Iterable[bytes], *, progress: ProgressCallback | None = None
    ) -> str:
        """Store what a file object or an iterable of bytes yields; it is read in another thread."""
        return self._loop.run(self._core.persist_stream(task_id, stream, progress=progress))

    def retrieve_stream(self, storage_id: str, *, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        """Yield an object's bytes in pieces, each verified before it is yielded."""
        pieces = self._core.retrieve_stream(storage_id, offset=offset, length=length)

        async def following() -> bytes | None:
            return await anext(pieces, None)

        try:
            while (piece := self._loop.run(following())) is not None:
                yield piece
        finally:
            self._loop.run(pieces.aclose())

    def retrieve_to_file(
        self,
        storage_id: str,
        path: str | os.PathLike[str],
        *,
        durable: bool = False,
        progress: ProgressCallback | None = None,
    ) -> Path:
        """Write an object to a new file, which gets its name when it is whole; returns the path."""
        return self._loop.run(self._core.retrieve_to_file(storage_id, path, durable=durable, progress=progress))

    def open_application_data(self, storage_id: str) -> io.BufferedReader:
        """Open an object as a seekable binary file, read on demand."""
        size_bytes = self.application_data(storage_id).size_bytes
        return io.BufferedReader(_ObjectFile(self, storage_id, size_bytes), buffer_size=_READ_AHEAD_BYTES)

    def application_data(self, storage_id: str) -> ObjectInfo:
        """Return what is known of an object."""
        return self._loop.run(self._core.application_data(storage_id))

    def list_application_data(self, task_id: str) -> list[ObjectInfo]:
        """Return a task's objects, oldest first."""
        return self._loop.run(self._core.list_application_data(task_id))

    def forget_application_data(self, storage_id: str) -> None:
        """Forget an object."""
        self._loop.run(self._core.forget_application_data(storage_id))


_READ_AHEAD_BYTES = 1024 * 1024


class _ObjectFile(io.RawIOBase):
    """A stored object as a raw file: every read asks for its range."""

    def __init__(self, manager: StateManager, storage_id: str, size_bytes: int) -> None:
        self._manager = manager
        self._storage_id = storage_id
        self._size = size_bytes
        self._at = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; returns the new position, which may lie behind the end.

        Raises:
            ValueError: a position before the beginning, or an unknown `whence`.
        """
        origins = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}
        if whence not in origins or origins[whence] + offset < 0:
            raise ValueError("a file position is counted from start, current position or end, and not negative")
        self._at = origins[whence] + offset
        return self._at

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Read into `buffer`; returns how many bytes, 0 at the end."""
        view = memoryview(buffer).cast("B")
        if not len(view) or self._at >= self._size:
            return 0
        piece = self._manager.retrieve_application_data(self._storage_id, offset=self._at, length=len(view))
        view[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)
