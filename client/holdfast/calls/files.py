"""Files: kept as sets that outlive every VM, listed and retrieved from sets and from recovery points alike."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from holdfast.calls.core import NONCE_BYTES, AsyncCore, BlockingCore
from holdfast.files.results import FileInfo, FileKind, PointFiles, RetrievedFiles, file_info
from holdfast.files.threads import ImageAhead, Interruptible, Told, in_thread, pulled
from holdfast.images.blocking import runner_on
from holdfast.images.opening import OpenedPoint, open_point
from holdfast.pieces import pieces_of
from holdfast.results import ObjectInfo, ProgressCallback
from holdfast.writing import ObjectJob
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.files.patterns import Selection, exactly, os_bytes, select
from holdfast_core.model.files.sets import TRAILER_BYTES, decode_manifest, decode_trailer
from holdfast_core.model.lifecycle import keep_digest
from holdfast_core.model.limits import GIB
from holdfast_core.model.names import OBJECT_PREFIX, check_id, check_name
from holdfast_proto.v1 import state_pb2
from holdfast_proto.v1.files_pb2 import FileEntry
from holdfast_proto.v1.records_pb2 import OBJECT_FORM_FILES, KeepRule, ObjectOrigin

if TYPE_CHECKING:
    from holdfast.files.image_tree import ImageTree
    from holdfast.files.trees import FileTree, Item
    from holdfast.reading import OpenedObject

READ_FILE_BYTES_MAX: Final = 1 * GIB

FileSource = str | os.PathLike[str] | PointFiles
"""A directory of this machine, or files inside a volume of a recovery point."""

Answer = TypeVar("Answer")


class AsyncFileCalls(AsyncCore):
    """Calls about files."""

    async def persist_files(
        self,
        task_id: str,
        source: FileSource,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        exclude_secrets: bool = False,
        progress: ProgressCallback | None = None,
    ) -> str:
        """Store files for a task as one set; returns its storage id once they are durable.

        Args:
            task_id: task that the files belong to.
            source: a directory, or files inside a volume of a recovery point, which are read from the cluster without
                restoring the volume.
            include: patterns of what to keep, as in `.gitignore`; everything, if none are given.
            exclude: patterns of what to leave out; they win over `include`.
            exclude_secrets: leave out files that usually hold secrets too.
            progress: told how far it is.

        Raises:
            HoldfastError: NOT_FOUND if no file matches `include`, or there is no such point, volume, partition or root;
                SOURCE_UNREADABLE; VOLUME_CHANGED if a file changes while it is read; INVALID_ARGUMENT for patterns;
                LIMIT_EXCEEDED for too many files; and as `create_snapshot`. Nothing is stored then.
        """
        selection = select(include, exclude, exclude_secrets=exclude_secrets)
        return (await self._persist(task_id, source, selection, fulfils=None, progress=progress)).storage_id

    async def _persist_rule(
        self, vm_id: str, point_id: str, rule: KeepRule, *, progress: ProgressCallback | None = None
    ) -> str:
        """Store what a keep rule names, from a point of its VM; raises as `persist_files`."""
        selection = select(rule.include, rule.exclude, exclude_secrets=rule.exclude_secrets)
        source = PointFiles(point_id, volume=rule.volume, partition=rule.partition)
        return (await self._persist(rule.task_id, source, selection, fulfils=rule, progress=progress)).storage_id

    async def _persist(
        self,
        task_id: str,
        source: FileSource,
        selection: Selection,
        *,
        fulfils: KeepRule | None,
        progress: ProgressCallback | None,
    ) -> ObjectInfo:
        from holdfast.files.writing import SetWriter

        request = state_pb2.BeginObjectRequest(
            task_id=check_name(task_id, "task name"), nonce=self._random_bytes(NONCE_BYTES)
        )
        async with self._source_tree(source) as (tree, origin):
            if fulfils is not None:
                origin.keep_rule, origin.keep_digest = fulfils.name, keep_digest(fulfils)
            writer = SetWriter(tree, selection)

            def made() -> Iterator[bytes]:
                yield from writer.pieces()
                origin.file_count = writer.file_count

            pieces = Interruptible(made())
            try:
                job = ObjectJob(self._open()[0], progress)
                return await self._run(job, job.run(request, pieces_of(pieces), origin=origin))
            finally:
                await asyncio.to_thread(pieces.end)

    @asynccontextmanager
    async def _source_tree(self, source: FileSource) -> AsyncIterator[tuple[FileTree, ObjectOrigin]]:
        if isinstance(source, PointFiles):
            opened = await open_point(*self._open(), check_id(source.point_id, "point id"))
            async with self._image_tree(opened, source) as tree:
                volume = opened.volume(source.volume).name
                yield tree, ObjectOrigin(vm_id=opened.point.vm_id, point_id=opened.point.point_id, volume=volume)
            return
        from holdfast.files.directory import DirectoryTree  # here and below: most processes look at no files

        directory = await asyncio.to_thread(DirectoryTree, Path(source))
        try:
            yield directory, ObjectOrigin()
        finally:
            directory.close()

    @asynccontextmanager
    async def _image_tree(self, opened: OpenedPoint, source: PointFiles) -> AsyncIterator[ImageTree]:
        from holdfast.files.image_tree import ImageTree

        # The image guesses nothing ahead: what is read next is known from the file system, and often lies elsewhere.
        async with opened.image(source.volume, read_ahead_bytes=0) as image:
            blocking = ImageAhead(image, asyncio.get_running_loop())
            yield await asyncio.to_thread(ImageTree, blocking, partition=source.partition, root=source.root)

    @asynccontextmanager
    async def _tree(self, resource_id: str, volume: str, partition: int) -> AsyncIterator[FileTree]:
        """Open the files of a stored set, or of a volume of a point."""
        check_id(resource_id, "id")
        if not resource_id.startswith(OBJECT_PREFIX):
            opened = await open_point(*self._open(), resource_id)
            async with self._image_tree(opened, PointFiles(resource_id, volume, partition)) as files:
                yield files
            return
        if volume or partition:
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "a stored set of files has neither volumes nor partitions")
        from holdfast.files.stored import StoredTree

        stored = await self._reading.open_object(resource_id)
        run = runner_on(asyncio.get_running_loop())
        tree = StoredTree(await _manifest(stored), lambda start, end: pulled(stored.pieces(start, end), run))
        try:
            yield tree
        finally:
            await asyncio.to_thread(tree.close)

    async def list_files(
        self, resource_id: str, path: str = "", *, recursive: bool = False, volume: str = "", partition: int = 0
    ) -> list[FileInfo]:
        """Return the files of a stored set or of a volume of a recovery point, in order.

        Args:
            resource_id: id of a stored set, a snapshot or a backup.
            path: a directory, whose files are listed, or a file; "" is the root. Links are not followed.
            recursive: list what is in directories below too.
            volume, partition: where the files of a recovery point are, as in `PointFiles`.

        Raises:
            HoldfastError: NOT_FOUND if there is no such id, path, volume or partition; INVALID_ARGUMENT if the object
                holds no files; SOURCE_UNREADABLE if the volume has no file system that can be read; CORRUPT, MISSING,
                UNREACHABLE.
        """
        exact = exactly(path)
        names = exact.count("/")
        selection = select([exact] if exact else [])
        own = os_bytes(path.strip("/"))

        def listed(items: Iterator[Item]) -> list[FileInfo]:
            found = [file_info(item.entry) for item in items if item.wanted]
            if exact and not found:
                raise _no_such_path(path, resource_id)
            return [each for each in found if each.kind is not FileKind.DIRECTORY or os_bytes(each.path) != own]

        async with self._tree(resource_id, volume, partition) as tree:
            return await self._walk(tree.items(selection, depth=None if recursive else names + 1), listed)

    async def read_file(self, resource_id: str, path: str, *, volume: str = "", partition: int = 0) -> bytes:
        """Return the content of one file of a stored set or of a recovery point, of 1 GiB at most.

        Raises:
            HoldfastError: INVALID_ARGUMENT if it is no regular file; LIMIT_EXCEEDED if it is larger; and as
                `list_files`.
        """
        exact = exactly(path)
        if not exact:
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "the root is a directory; name a file")
        own = os_bytes(path.strip("/"))

        def content(items: Iterator[Item]) -> bytes:
            for item in items:
                if item.wanted and item.entry.path == own:
                    return _content(item)
            raise _no_such_path(path, resource_id)

        async with self._tree(resource_id, volume, partition) as tree:
            return await self._walk(tree.items(select([exact]), depth=exact.count("/")), content)

    async def retrieve_files(
        self,
        resource_id: str,
        target: str | os.PathLike[str],
        *,
        paths: Sequence[str] = (),
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        volume: str = "",
        partition: int = 0,
        durable: bool = False,
        progress: ProgressCallback | None = None,
    ) -> RetrievedFiles:
        """Write files of a stored set or of a recovery point below a directory, under the paths that they have there.

        Owners are given back by root alone; for others the files are theirs, without set-user-id and set-group-id.

        Args:
            resource_id: id of a stored set, a snapshot or a backup.
            target: directory to write into; made if it is missing. Nothing in it is replaced.
            paths: files, or directories with all that is in them; each of them must be there.
            include: patterns of further files. Without paths and patterns everything is retrieved.
            exclude: patterns of what to leave out.
            volume, partition: where the files of a recovery point are, as in `PointFiles`.
            durable: flush the files to the disk before returning.
            progress: told how far it is.

        Raises:
            HoldfastError: TARGET_EXISTS if a name is taken; TARGET_UNWRITABLE; NOT_FOUND if a path is not there or
                nothing matches the patterns; and as `list_files`. Nothing is left behind then.
        """
        from holdfast.files.retrieval import TargetTree

        selection = select([*(exactly(path) or "*" for path in paths), *include], exclude)
        told = Told("retrieve", progress, runner_on(asyncio.get_running_loop()))

        def written(items: Iterator[Item]) -> RetrievedFiles:
            with TargetTree(Path(target), durable=durable, wrote=told) as place:
                return place.write(_all_there(items, paths, resource_id, patterns=bool(include)))

        async with self._tree(resource_id, volume, partition) as tree:
            return await self._walk(tree.items(selection, content=True), written)

    async def _verify_files(self, storage_id: str) -> int:
        """Read all of a stored set back, every byte of it; returns the number of its entries.

        Raises:
            HoldfastError: CORRUPT or MISSING with what is lost; as `list_files`.
        """

        def checked(items: Iterator[Item]) -> int:
            count = 0
            for item in items:
                count += 1
                for _ in item.read():
                    pass
            return count

        async with self._tree(storage_id, "", 0) as tree:
            return await self._walk(tree.items(select()), checked)

    async def _walk(self, items: Iterator[Item], use: Callable[[Iterator[Item]], Answer]) -> Answer:
        """Let a thread use items, and end that when the caller gives up."""
        interruptible = Interruptible(items)
        try:
            return await in_thread(lambda: use(interruptible), cancel=interruptible.end)
        finally:
            await asyncio.to_thread(interruptible.end)


async def _manifest(stored: OpenedObject) -> list[FileEntry]:
    """Return the entries of a stored set."""
    record = stored.record
    if record.form != OBJECT_FORM_FILES or record.size_bytes < TRAILER_BYTES:
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT, f"{record.storage_id} holds no files; retrieve it as application data"
        )

    async def read(start: int, end: int) -> bytes:
        return b"".join([piece async for piece in stored.pieces(start, end)])

    size = record.size_bytes
    trailer = decode_trailer(await read(size - TRAILER_BYTES, size), object_bytes=size)
    packed = await read(trailer.content_bytes, trailer.content_bytes + trailer.manifest_bytes)
    return await asyncio.to_thread(decode_manifest, packed, trailer)


def _content(item: Item) -> bytes:
    info = file_info(item.entry)
    if info.kind is not FileKind.REGULAR:
        more = f" to {info.target!r}" if info.target else ""
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"{info.path!r} is no file but a {info.kind.value}{more}")
    if info.size_bytes > READ_FILE_BYTES_MAX:
        raise HoldfastError(
            ErrorCode.LIMIT_EXCEEDED,
            f"{info.path!r} has {info.size_bytes} bytes; up to {READ_FILE_BYTES_MAX} are read at once. Retrieve it",
        )
    content = bytearray(info.size_bytes)
    for offset, piece in item.read():
        content[offset : offset + len(piece)] = piece
    return bytes(content)


def _all_there(items: Iterator[Item], paths: Sequence[str], resource_id: str, *, patterns: bool) -> Iterator[Item]:
    """Yield items, and fail at the end if a path was not among them, or nothing matched the patterns."""
    missing = {os_bytes("/".join(name for name in path.split("/") if name)): path for path in paths}
    missing.pop(b"", None)
    any_wanted = False
    for item in items:
        any_wanted = any_wanted or item.wanted
        missing.pop(item.entry.path, None)
        yield item
    if missing:
        raise _no_such_path(next(iter(missing.values())), resource_id)
    if patterns and not any_wanted:
        raise HoldfastError(ErrorCode.NOT_FOUND, f"nothing in {resource_id} matches the patterns")


def _no_such_path(path: str, resource_id: str) -> HoldfastError:
    return HoldfastError(ErrorCode.NOT_FOUND, f"there is no {path!r} in {resource_id}")


class FileCalls(BlockingCore):
    """The blocking face of `AsyncFileCalls`."""

    def persist_files(
        self,
        task_id: str,
        source: FileSource,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        exclude_secrets: bool = False,
        progress: ProgressCallback | None = None,
    ) -> str:
        """Store files of a directory, or of a recovery point's volume, for a task; returns the storage id."""
        return self._loop.run(
            self._core.persist_files(
                task_id,
                source,
                include=include,
                exclude=exclude,
                exclude_secrets=exclude_secrets,
                progress=progress,
            )
        )

    def list_files(
        self, resource_id: str, path: str = "", *, recursive: bool = False, volume: str = "", partition: int = 0
    ) -> list[FileInfo]:
        """Return the files of a stored set, or of a volume of a recovery point."""
        return self._loop.run(
            self._core.list_files(resource_id, path, recursive=recursive, volume=volume, partition=partition)
        )

    def read_file(self, resource_id: str, path: str, *, volume: str = "", partition: int = 0) -> bytes:
        """Return the content of one file, of 1 GiB at most."""
        return self._loop.run(self._core.read_file(resource_id, path, volume=volume, partition=partition))

    def retrieve_files(
        self,
        resource_id: str,
        target: str | os.PathLike[str],
        *,
        paths: Sequence[str] = (),
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        volume: str = "",
        partition: int = 0,
        durable: bool = False,
        progress: ProgressCallback | None = None,
    ) -> RetrievedFiles:
        """Write files of a stored set or of a recovery point below a directory."""
        return self._loop.run(
            self._core.retrieve_files(
                resource_id,
                target,
                paths=paths,
                include=include,
                exclude=exclude,
                volume=volume,
                partition=partition,
                durable=durable,
                progress=progress,
            )
        )
