"""Restoring over an older local copy: what the copy has already is compared by fingerprint, the rest is fetched.

While it is neither the old nor the new state, a file has a temporary name, and keeps it when the restore fails: the
next one goes on from there. So no file is ever under its own name and half-done, and what was fetched is not lost.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from holdfast.content import ContentReader, Entry
from holdfast.damage import DamageReport
from holdfast.descriptors import data_extents
from holdfast.holes import clear
from holdfast.index import IndexReader, volume_leaves
from holdfast.restoring.files import file_sink
from holdfast.restoring.targets import partial_path, sync_directory, unwritable
from holdfast.restoring.volumes import WINDOWS_IN_FLIGHT, Callback, leaf_windows
from holdfast.results import ProgressCallback
from holdfast_core.model.block import Buffer
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_proto.v1.records_pb2 import PointRecord, VolumeRecord

Result = TypeVar("Result")


class Fingerprints(Protocol):
    """The tenant's keys, as far as comparing needs them."""

    def fingerprint(self, plain: Buffer) -> bytes:
        """Return what tells whether this plaintext is the one that an index names."""
        ...


@dataclass(slots=True)
class OntoSums:
    """Plaintext bytes that were fetched, and those that the local copy had."""

    fetched_bytes: int = 0
    kept_bytes: int = 0


class LocalCopies:
    """The files NAME.raw of a directory, taken for a restore over them."""

    def __init__(self, directory: Path) -> None:
        """Take a directory that is there.

        Raises:
            HoldfastError: INVALID_ARGUMENT if it is not.
        """
        if not directory.is_dir():
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT,
                f"there is no directory {directory} with an older copy; restore to a new one instead",
            )
        self.directory = directory
        self._files: dict[str, int] = {}

    def check(self, volumes: Sequence[VolumeRecord]) -> None:
        """Check that no file is in two states, before anything is touched.

        Raises:
            HoldfastError: TARGET_EXISTS.
        """
        for volume in volumes:
            path = self.directory / f"{volume.name}.raw"
            if path.exists() and partial_path(path).exists():
                raise HoldfastError(
                    ErrorCode.TARGET_EXISTS,
                    f"{path} and the unfinished {partial_path(path).name} are both there; remove one of them",
                )

    def take(self, volume: VolumeRecord) -> int:
        """Give a volume's file its temporary name, or make it; returns its descriptor, which stays this object's.

        Raises:
            HoldfastError: TARGET_UNWRITABLE, also for one that another program has locked, as QEMU does.
        """
        path = self.directory / f"{volume.name}.raw"
        partial = partial_path(path)
        try:
            existing = path if path.exists() else partial
            descriptor = os.open(existing, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            self._files[volume.name] = descriptor
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise HoldfastError(
                    ErrorCode.TARGET_UNWRITABLE, f"{path} is in use by another program; stop the VM that runs on it"
                ) from error
            if existing is path:
                os.rename(path, partial)
            os.ftruncate(descriptor, volume.size_bytes)
        except OSError as error:
            raise unwritable(path, error) from error
        return descriptor

    def publish(self, beside: dict[str, bytes], *, durable: bool) -> None:
        """Write the small files beside the volumes, and give these their names back.

        Raises:
            HoldfastError: TARGET_UNWRITABLE.
        """
        try:
            for name, data in beside.items():
                path = self.directory / name
                partial_path(path).write_bytes(data)
                os.replace(partial_path(path), path)
            for name, descriptor in self._files.items():
                if durable:
                    os.fsync(descriptor)
                path = self.directory / f"{name}.raw"
                os.rename(partial_path(path), path)
            if durable:
                sync_directory(self.directory)
        except OSError as error:
            raise unwritable(self.directory, error) from error

    def close(self) -> None:
        """Close the files, whatever their names are by now."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()


class _Comparison:
    """Compares one local file with windows of an index, in a worker thread."""

    def __init__(self, descriptor: int, path: Path, keys: Fingerprints) -> None:
        self._descriptor = descriptor
        self._path = path
        self._keys = keys

    def differing(self, entries: Sequence[Entry], start: int, end: int) -> list[Entry]:
        """Clear what the index has as zero between `start` and `end`, and return the entries to fetch.

        Raises:
            HoldfastError: TARGET_UNWRITABLE.
        """
        try:
            allocated = list(data_extents(self._descriptor, start, end))
            at = start
            for entry in entries:
                self._clear(allocated, at, entry.key)
                at = entry.key + entry.length
            self._clear(allocated, at, end)
            return [entry for entry in entries if not self._has(allocated, entry)]
        except OSError as error:
            raise unwritable(self._path, error) from error

    def _clear(self, allocated: Sequence[tuple[int, int]], start: int, end: int) -> None:
        for data_start, data_end in allocated:
            clear(self._descriptor, max(start, data_start), min(end, data_end))

    def _has(self, allocated: Sequence[tuple[int, int]], entry: Entry) -> bool:
        end = entry.key + entry.length
        if not any(data_start < end and data_end > entry.key for data_start, data_end in allocated):
            return False
        local = os.pread(self._descriptor, entry.length, entry.key)
        return len(local) == entry.length and self._keys.fingerprint(local) == entry.fingerprint


async def finished(work: asyncio.Future[Result]) -> Result:
    """Wait for work in a thread to its end, even when cancelled: it uses files that are closed next."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise


async def restore_onto(
    index: IndexReader,
    content: ContentReader,
    keys: Fingerprints,
    executor: Executor,
    point: PointRecord,
    copies: LocalCopies,
    damage: DamageReport,
    progress: ProgressCallback | None,
) -> OntoSums:
    """Bring every volume's local copy to the state of the point; publishing is the caller's.

    Raises:
        HoldfastError: CORRUPT, MISSING, UNREACHABLE, TARGET_EXISTS, TARGET_UNWRITABLE, …; damage is collected.
    """
    callback = Callback("restore", sum(volume.size_bytes for volume in point.volumes), progress)
    sums = OntoSums()
    windows = asyncio.Semaphore(WINDOWS_IN_FLIGHT)
    loop = asyncio.get_running_loop()
    copies.check(point.volumes)

    async def restore(volume: VolumeRecord) -> None:
        path = copies.directory / f"{volume.name}.raw"
        descriptor = await finished(loop.run_in_executor(executor, copies.take, volume))
        comparison = _Comparison(descriptor, path, keys)
        sink = file_sink(descriptor, path)

        async def bring(entries: Sequence[Entry], start: int, end: int) -> None:
            try:
                wanted = await finished(loop.run_in_executor(executor, comparison.differing, entries, start, end))
                found = await content.read(wanted, sink, block_bytes=volume.block_bytes) if wanted else None
                if found is not None:
                    damage.add(found, volume.name)
                fetched = sum(entry.length for entry in wanted)
                sums.fetched_bytes += fetched
                sums.kept_bytes += sum(entry.length for entry in entries) - fetched
                callback(end - start)
            finally:
                windows.release()

        async with plain_task_group() as group:
            at = 0
            async with aclosing(volume_leaves(index, volume)) as groups:
                async for leaves in groups:
                    for entries in leaf_windows(leaves, volume):
                        end = entries[-1].key + entries[-1].length
                        await windows.acquire()
                        group.create_task(bring(entries, at, end))
                        at = end
            await windows.acquire()
            group.create_task(bring((), at, volume.size_bytes))

    for volume in point.volumes:
        await restore(volume)
    callback.finish()
    return sums
