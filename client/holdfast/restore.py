"""Restoring a recovery point: whole, verified, then under its name.

Volumes are read in windows, several at once, and written where they belong by the worker threads that opened them;
zeros are never written, so the files come out sparse. Until every byte of every volume is there and checked, files have
temporary names; on any failure they are removed.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Final

from holdfast.content import WINDOW_BYTES, ContentReader, DamageReport, Entry, Sink
from holdfast.index import DAMAGE, IndexReader, LeafAt, volume_leaves
from holdfast.results import Progress, ProgressCallback
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import MIB, TREE_FAN_OUT
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_proto.v1.records_pb2 import PointRecord, VolumeRecord

WINDOWS_IN_FLIGHT: Final = 4
DROP_LAG_BYTES: Final = 64 * MIB
_PARTIAL_SUFFIX: Final = ".partial"
_IOV_MAX: Final = 512


def leaf_windows(leaves: Sequence[LeafAt], volume: VolumeRecord) -> list[list[Entry]]:
    """Return the entries of some leaves in windows of about `WINDOW_BYTES`; keys are byte offsets in the volume."""
    block_bytes, size = volume.block_bytes, volume.size_bytes
    per_window = max(1, WINDOW_BYTES // block_bytes)
    entries: list[Entry] = []
    for index, _, leaf in leaves:
        first = index * TREE_FAN_OUT
        for slot, fingerprint, block_id, base_id in zip(
            leaf.slots, leaf.fingerprints, leaf.block_ids, leaf.base_ids, strict=True
        ):
            offset = (first + slot) * block_bytes
            entries.append(Entry(offset, min(block_bytes, size - offset), fingerprint, block_id, base_id))
    return [entries[at : at + per_window] for at in range(0, len(entries), per_window)]


async def read_volume(
    index: IndexReader,
    content: ContentReader,
    volume: VolumeRecord,
    sink: Sink,
    damage: DamageReport,
    progress: Callback,
) -> int:
    """Read all of a volume into `sink`; returns the number of blocks. Damage is collected, not raised.

    Raises:
        HoldfastError: UNREACHABLE, DENIED, KEY_MISMATCH, or what the sink raises.
    """
    count = 0
    slots = asyncio.Semaphore(WINDOWS_IN_FLIGHT)

    async def read(entries: Sequence[Entry]) -> None:
        try:
            found = await content.read(entries, sink, block_bytes=volume.block_bytes)
            if found is not None:
                damage.add(found, volume.name)
            progress(sum(entry.length for entry in entries))
        finally:
            slots.release()

    async with plain_task_group() as group:
        try:
            async with aclosing(volume_leaves(index, volume)) as groups:
                async for leaves in groups:
                    for entries in leaf_windows(leaves, volume):
                        count += len(entries)
                        await slots.acquire()
                        group.create_task(read(entries))
        except HoldfastError as error:
            if error.code not in DAMAGE:
                raise
            damage.add_index(error, volume.name, [(0, volume.size_bytes)])
    return count


class Callback:
    """Counts bytes and tells a progress callback."""

    def __init__(self, phase: str, total: int, progress: ProgressCallback | None) -> None:
        """Begin at zero of `total` bytes."""
        self._phase = phase
        self._total = total
        self._progress = progress
        self.done = 0

    def __call__(self, count: int) -> None:
        """Count `count` more bytes."""
        self.done += count
        if self._progress is not None:
            self._progress(Progress(self._phase, min(self.done, self._total), self._total))

    def finish(self) -> None:
        """Tell that all is done; holes are not counted one by one."""
        self(self._total - self.done)


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
        """Make the file of a volume, a hole of its size; returns its descriptor, which stays the target's.

        Raises:
            HoldfastError: TARGET_UNWRITABLE.
        """
        path = self._partial(name)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._files[name] = descriptor
            os.ftruncate(descriptor, size_bytes)
        except OSError as error:
            raise unwritable(path, error) from error
        return descriptor

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
                os.rename(self._partial(name), self.directory / f"{name}.raw")
            if durable:
                _sync_directory(self.directory)
        except OSError as error:
            raise unwritable(self.directory, error) from error

    def discard(self) -> None:
        """Remove our files, and the directories that we made."""
        for name, descriptor in self._files.items():
            if descriptor >= 0:
                os.close(descriptor)
            self._partial(name).unlink(missing_ok=True)
            (self.directory / f"{name}.raw").unlink(missing_ok=True)
        for directory in reversed(self._made):
            if any(directory.iterdir()):
                return
            directory.rmdir()

    def _partial(self, name: str) -> Path:
        return self.directory / f".{name}.raw{_PARTIAL_SUFFIX}"


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unwritable(path: Path, error: OSError) -> HoldfastError:
    """Make the error for a target that cannot be written."""
    return HoldfastError(ErrorCode.TARGET_UNWRITABLE, f"the restore target {path} cannot be written: {error.strerror}")


class DropBehind:
    """Hands written pages back to the kernel, so that a restore does not push everything else out of its cache.

    The first advice on a range begins to write it back and does not wait; the second, once so much more has been
    written that it should be clean, frees the pages, which the next writes then take. Pages that are still dirty
    simply stay. Where fresh pages are dear this is most of a restore's cost (ADR 0053). Safe to share between threads.
    """

    def __init__(self, descriptor: int) -> None:
        """Bind to an open file."""
        self._descriptor = descriptor
        self._recent: deque[tuple[int, int]] = deque()
        self._lock = threading.Lock()
        self._recent_bytes = 0

    def wrote(self, offset: int, length: int) -> None:
        """Take note of a range that has just been written."""
        due: list[tuple[int, int]] = []
        with self._lock:
            self._recent.append((offset, length))
            self._recent_bytes += length
            while self._recent_bytes > DROP_LAG_BYTES:
                oldest = self._recent.popleft()
                self._recent_bytes -= oldest[1]
                due.append(oldest)
        for start, count in [(offset, length), *due]:
            os.posix_fadvise(self._descriptor, start, count, os.POSIX_FADV_DONTNEED)


def file_sink(descriptor: int, path: Path) -> Sink:
    """Return a sink that writes plaintexts at their keys, neighbours in one call."""
    behind = DropBehind(descriptor)

    def write(opened: Sequence[tuple[int, bytes]]) -> None:
        try:
            for run in _runs(opened):
                behind.wrote(run[0][0], _write_all(descriptor, run))
        except OSError as error:
            raise unwritable(path, error) from error

    return write


def _runs(opened: Sequence[tuple[int, bytes]]) -> list[list[tuple[int, bytes]]]:
    """Return groups of pieces that lie one after another."""
    runs: list[list[tuple[int, bytes]]] = []
    end = -1
    for offset, plain in sorted(opened, key=lambda piece: piece[0]):
        if offset == end and len(runs[-1]) < _IOV_MAX:
            runs[-1].append((offset, plain))
        else:
            runs.append([(offset, plain)])
        end = offset + len(plain)
    return runs


def _write_all(descriptor: int, run: Sequence[tuple[int, bytes]]) -> int:
    """Write a run of neighbours; returns its length."""
    offset = run[0][0]
    total = sum(len(plain) for _, plain in run)
    written = os.pwritev(descriptor, [plain for _, plain in run], offset)
    while written < total:
        rest = b"".join(plain for _, plain in run)[written:]
        written += os.pwrite(descriptor, rest, offset + written)
    return total


async def restore_point(
    index: IndexReader,
    content: ContentReader,
    point: PointRecord,
    target: Target,
    damage: DamageReport,
    progress: ProgressCallback | None,
) -> None:
    """Write every volume of a point into `target` and check it whole; publishing is the caller's.

    Raises:
        HoldfastError: UNREACHABLE, DENIED, TARGET_UNWRITABLE, …; damage is collected in `damage`.
    """
    callback = Callback("restore", sum(volume.size_bytes for volume in point.volumes), progress)
    for volume in point.volumes:
        path = target.directory / f"{volume.name}.raw"
        descriptor = target.create(volume.name, volume.size_bytes)
        await read_volume(index, content, volume, file_sink(descriptor, path), damage, callback)
    callback.finish()
