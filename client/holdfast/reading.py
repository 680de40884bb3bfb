"""The read operations: restore, verify, retrieve. Whatever turns out lost is reported, then told to the caller."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from holdfast.access import Access
from holdfast.content import ContentReader, DamageReport
from holdfast.index import IndexReader
from holdfast.objects import damage_of, read_object
from holdfast.remote import CoordinatorCalls
from holdfast.restoring.onto import LocalCopies, finished, restore_onto
from holdfast.restoring.points import ImageFormat, companions, restore_point
from holdfast.restoring.targets import Target, unwritable
from holdfast.restoring.volumes import Callback
from holdfast.results import ProgressCallback, RestoreReport, VerifyReport
from holdfast.verification import CopyCheck, verify_content
from holdfast.writing import Toolbox
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.records import check_object, check_point
from holdfast_proto.v1.common_pb2 import Grant
from holdfast_proto.v1.records_pb2 import ObjectRecord


class Reading:
    """Reads points and objects for a manager."""

    def __init__(self, tools: Toolbox, calls: CoordinatorCalls) -> None:
        """Bind to a manager's tools."""
        self._tools = tools
        self._calls = calls

    def _open(self, grant: Grant, resource_id: str) -> tuple[Access, IndexReader, ContentReader]:
        tools = self._tools
        access = Access(
            tools.endpoints,
            tools.pool,
            grant,
            clock=tools.clock,
            resource_id=resource_id,
            data_key=tools.data_key,
        )
        index = IndexReader(access.reader(tools.executor), access.ring.opener(), tools.executor)
        return access, index, ContentReader(access, tools.executor)

    async def restore(
        self,
        snapshot_id: str,
        backup_id: str,
        *,
        target: Path | None,
        restore_dir: Path | None,
        image_format: ImageFormat,
        durable: bool,
        progress: ProgressCallback | None,
    ) -> RestoreReport:
        """Restore a point into `target`, or below `restore_dir`.

        Raises:
            HoldfastError: see `AsyncStateManager.restore_vm`.
        """
        resolved = await self._calls.resolve_point(snapshot_id, backup_id)
        point = resolved.point
        access, index, content = self._open(resolved.grant, point.point_id)
        check_point(access.ring, point)
        if target is None:
            if restore_dir is None:
                raise HoldfastError(
                    ErrorCode.INVALID_ARGUMENT,
                    "there is no place to restore to; give target=, or restore_dir (HOLDFAST_RESTORE_DIR)",
                )
            target = restore_dir / point.vm_id / point.point_id
        loop = asyncio.get_running_loop()
        place = await loop.run_in_executor(self._tools.executor, Target, target)
        damage = DamageReport(f"point {point.point_id}")
        published = False
        try:
            fetched = await restore_point(index, content, point, place, damage, progress, image_format=image_format)
            await self._raise_damage(damage, point.point_id)
            publish = asyncio.ensure_future(
                loop.run_in_executor(self._tools.executor, lambda: place.publish(durable=durable))
            )
            await asyncio.shield(publish)
            published = True
        finally:
            if not published:
                await asyncio.shield(loop.run_in_executor(None, place.discard))
        return RestoreReport(point.point_id, target, fetched_bytes=fetched, kept_bytes=0)

    async def restore_onto(
        self,
        snapshot_id: str,
        backup_id: str,
        *,
        directory: Path,
        durable: bool,
        progress: ProgressCallback | None,
    ) -> RestoreReport:
        """Bring the copies in `directory` to the state of a point.

        Raises:
            HoldfastError: see `AsyncStateManager.restore_vm`.
        """
        copies = LocalCopies(directory)
        resolved = await self._calls.resolve_point(snapshot_id, backup_id)
        point = resolved.point
        access, index, content = self._open(resolved.grant, point.point_id)
        check_point(access.ring, point)
        executor = self._tools.executor
        loop = asyncio.get_running_loop()
        damage = DamageReport(f"point {point.point_id}")
        try:
            sums = await restore_onto(index, content, access.ring, executor, point, copies, damage, progress)
            await self._raise_damage(damage, point.point_id)
            beside = companions(point, "raw")
            await finished(loop.run_in_executor(executor, lambda: copies.publish(beside, durable=durable)))
        finally:
            copies.close()
        return RestoreReport(point.point_id, directory, fetched_bytes=sums.fetched_bytes, kept_bytes=sums.kept_bytes)

    async def verify(self, point_id: str, *, node_only: bool, progress: ProgressCallback | None) -> VerifyReport:
        """Verify a point; returns only if all of it is there.

        Raises:
            HoldfastError: CORRUPT or MISSING with ids and ranges; UNREACHABLE.
        """
        resolved = await self._calls.resolve_point(point_id, "")
        point = resolved.point
        access, index, content = self._open(resolved.grant, point.point_id)
        damage = DamageReport(f"point {point.point_id}")
        if access.ring.has_data:
            check_point(access.ring, point)
        if node_only:
            report = await CopyCheck(access, self._tools.pool).check(index, point, damage, progress)
        else:
            report = await verify_content(index, content, point, damage, progress)
        await self._raise_damage(damage, point.point_id)
        return report

    async def _raise_damage(self, damage: DamageReport, resource_id: str) -> None:
        error = damage.error()
        if error is not None:
            await self._tools.report_damage(damage.ids, resource_id)
            raise error

    async def pieces(
        self, storage_id: str, *, offset: int, length: int | None, progress: ProgressCallback | None
    ) -> AsyncGenerator[bytes, None]:
        """Yield bytes of an object, `offset` to the end or `length` of them.

        Raises:
            HoldfastError: NOT_FOUND, CORRUPT, MISSING, UNREACHABLE; INVALID_ARGUMENT for a negative offset or length.
        """
        if offset < 0 or (length is not None and length < 0):
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "offset and length may not be negative")
        opened = await self.open_object(storage_id)
        size = opened.record.size_bytes
        start = min(offset, size)
        end = size if length is None else min(size, start + length)
        callback = Callback("retrieve", end - start, progress)
        async with aclosing(opened.pieces(start, end)) as pieces:
            async for piece in pieces:
                callback(len(piece))
                yield piece

    async def open_object(self, storage_id: str) -> OpenedObject:
        """Resolve an object and check its record, to read any of its ranges.

        Raises:
            HoldfastError: NOT_FOUND, DENIED; CORRUPT if the record was tampered with.
        """
        resolved = await self._calls.resolve_object(storage_id)
        access, index, content = self._open(resolved.grant, resolved.object.storage_id)
        check_object(access.ring, resolved.object)
        return OpenedObject(resolved.object, index, content, self._tools)

    async def to_file(self, storage_id: str, path: Path, *, durable: bool, progress: ProgressCallback | None) -> Path:
        """Write an object to a file that must not exist yet.

        Raises:
            HoldfastError: TARGET_EXISTS, TARGET_UNWRITABLE, or as `pieces`.
        """
        loop = asyncio.get_running_loop()
        executor = self._tools.executor
        target = await loop.run_in_executor(executor, NewFile, path)
        try:
            async with aclosing(self.pieces(storage_id, offset=0, length=None, progress=progress)) as pieces:
                async for piece in pieces:
                    await loop.run_in_executor(executor, target.write, piece)
            await loop.run_in_executor(executor, lambda: target.publish(durable=durable))
        finally:
            await asyncio.shield(loop.run_in_executor(None, target.discard))
        return path


@dataclass(frozen=True, slots=True)
class OpenedObject:
    """An object whose record has been checked, and the right to read it."""

    record: ObjectRecord
    index: IndexReader
    content: ContentReader
    tools: Toolbox

    async def pieces(self, start: int, end: int) -> AsyncGenerator[bytes, None]:
        """Yield the bytes from `start` to before `end`, which lie within the object.

        Raises:
            HoldfastError: CORRUPT, MISSING, UNREACHABLE; what is lost is reported first.
        """
        done = 0
        try:
            async with aclosing(read_object(self.index, self.content, self.record, start=start, end=end)) as pieces:
                async for piece in pieces:
                    done += len(piece)
                    yield piece
        except HoldfastError as error:
            lost = damage_of(error)
            if lost:
                await self.tools.report_damage(lost, self.record.storage_id)
            raise
        if done != end - start:
            raise HoldfastError(
                ErrorCode.CORRUPT, f"object {self.record.storage_id} has another size than its record says"
            )


class NewFile:
    """A file that gets its name when it is whole. `discard` after `publish` does nothing."""

    def __init__(self, path: Path) -> None:
        """Make the temporary file beside `path`.

        Raises:
            HoldfastError: TARGET_EXISTS or TARGET_UNWRITABLE.
        """
        if path.exists() or path.is_symlink():
            raise HoldfastError(ErrorCode.TARGET_EXISTS, f"{path} exists; name another file")
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        try:
            self._descriptor = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise unwritable(path, error) from error

    def write(self, piece: bytes) -> None:
        """Append a piece.

        Raises:
            HoldfastError: TARGET_UNWRITABLE.
        """
        try:
            done = 0
            while done < len(piece):
                done += os.write(self._descriptor, memoryview(piece)[done:])
        except OSError as error:
            raise unwritable(self._path, error) from error

    def publish(self, *, durable: bool) -> None:
        """Give the file its name; never over another file.

        Raises:
            HoldfastError: TARGET_EXISTS or TARGET_UNWRITABLE.
        """
        try:
            if durable:
                os.fsync(self._descriptor)
            os.link(self._partial, self._path)
        except FileExistsError as error:
            raise HoldfastError(ErrorCode.TARGET_EXISTS, f"{self._path} exists; name another file") from error
        except OSError as error:
            raise unwritable(self._path, error) from error

    def discard(self) -> None:
        """Remove the temporary file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self._partial.unlink(missing_ok=True)
