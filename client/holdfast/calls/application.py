"""Application data: bytes, streams and files that outlive every VM."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

from holdfast import convert
from holdfast.calls.core import NONCE_BYTES, AsyncCore
from holdfast.pieces import Pieces, pieces_of
from holdfast.results import ObjectInfo, ProgressCallback
from holdfast.writing import ObjectJob
from holdfast_core.model.names import check_name
from holdfast_proto.v1 import state_pb2


class AsyncApplicationCalls(AsyncCore):
    """Calls about stored objects."""

    async def persist_application_data(
        self, task_id: str, data: bytes, *, progress: ProgressCallback | None = None
    ) -> str:
        """Store bytes for a task; returns the storage id once they are durable.

        Raises:
            HoldfastError: as `create_snapshot`.
        """
        return await self.persist_stream(task_id, (data,), progress=progress)

    async def persist_stream(self, task_id: str, stream: Pieces, *, progress: ProgressCallback | None = None) -> str:
        """Store what a file object or an iterable of bytes yields, however much; returns the storage id.

        Raises:
            HoldfastError: as `create_snapshot`. Errors of the stream itself pass through, and nothing is stored.
        """
        request = state_pb2.BeginObjectRequest(
            task_id=check_name(task_id, "task name"), nonce=self._random_bytes(NONCE_BYTES)
        )
        tools, _ = self._open()
        job = ObjectJob(tools, progress)
        stored: ObjectInfo = await self._run(job, job.run(request, pieces_of(stream)))
        return stored.storage_id

    async def retrieve_application_data(
        self,
        storage_id: str,
        *,
        offset: int = 0,
        length: int | None = None,
        progress: ProgressCallback | None = None,
    ) -> bytes:
        """Return an object's bytes, verified; all of them, or `length` from `offset` (what lies behind the end is cut).

        Raises:
            HoldfastError: NOT_FOUND, CORRUPT, MISSING, UNREACHABLE.
        """
        pieces = self._reading.pieces(storage_id, offset=offset, length=length, progress=progress)
        async with aclosing(pieces):
            return b"".join([piece async for piece in pieces])

    async def retrieve_stream(
        self, storage_id: str, *, offset: int = 0, length: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Yield an object's bytes in pieces, each verified before it is yielded.

        Raises:
            HoldfastError: as `retrieve_application_data`, at the first piece or at a later one.
        """
        pieces = self._reading.pieces(storage_id, offset=offset, length=length, progress=None)
        async with aclosing(pieces):
            async for piece in pieces:
                yield piece

    async def retrieve_to_file(
        self,
        storage_id: str,
        path: str | os.PathLike[str],
        *,
        durable: bool = False,
        progress: ProgressCallback | None = None,
    ) -> Path:
        """Write an object to a new file, which gets its name when it is whole; returns the path.

        Raises:
            HoldfastError: TARGET_EXISTS, TARGET_UNWRITABLE, and as `retrieve_application_data`.
        """
        return await self._reading.to_file(storage_id, Path(path), durable=durable, progress=progress)

    async def application_data(self, storage_id: str) -> ObjectInfo:
        """Return what is known of an object; NOT_FOUND if there is none."""
        return convert.object_info((await self._remote.resolve_object(storage_id)).object)

    async def list_application_data(self, task_id: str) -> list[ObjectInfo]:
        """Return a task's objects, oldest first."""
        return await self._remote.list_objects(task_id)

    async def forget_application_data(self, storage_id: str) -> None:
        """Forget an object."""
        await self._remote.forget_object(storage_id)
