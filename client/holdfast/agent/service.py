"""The service `holdfast.agent.v1.StateManager`: each call is one of `AsyncStateManager`, with its progress streamed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc.aio

from holdfast.agent.paths import AllowedPaths
from holdfast.agent.streams import with_progress
from holdfast.aio import AsyncStateManager
from holdfast.files.results import PointFiles
from holdfast.results import Progress, VolumeSpec
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import MIB, VOLUME_BLOCK_BYTES_DEFAULT
from holdfast_proto.v1 import agent_pb2 as pb
from holdfast_proto.v1.agent_pb2_grpc import StateManagerServicer

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

SERVICE_NAME = "holdfast.agent.v1.StateManager"
CHUNK_BYTES_MAX = 8 * MIB


class AgentService(StateManagerServicer):
    """Serves one manager's cluster and tenant, under the agent's own credential."""

    def __init__(self, manager: AsyncStateManager, paths: AllowedPaths) -> None:
        """Bind to a manager, which the caller closes."""
        self._manager = manager
        self._paths = paths

    async def RegisterVm(self, request: pb.RegisterVmRequest, context: Context) -> pb.RegisterVmResponse:
        """Register a VM; the same again changes nothing."""
        volumes = {
            volume.name: VolumeSpec(
                self._paths.check_volume(volume.uri),
                block_bytes=volume.block_bytes or VOLUME_BLOCK_BYTES_DEFAULT,
                live=volume.live,
            )
            for volume in request.volumes
        }
        if len(volumes) != len(request.volumes):
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"a volume of {request.vm_id} is named twice")
        await self._manager.register_vm(
            request.vm_id,
            volumes,
            replace=request.replace,
            labels={label.name: label.value for label in request.labels},
            template=request.template_id,
        )
        return pb.RegisterVmResponse()

    async def CreateSnapshot(
        self, request: pb.CreateSnapshotRequest, context: Context
    ) -> AsyncGenerator[pb.CreateSnapshotResponse, None]:
        """Save a VM's first point."""
        events = with_progress(
            lambda progress: self._manager.create_snapshot(
                request.vm_id, base=request.base_id, takeover=request.takeover, progress=progress
            )
        )
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Progress):
                    yield pb.CreateSnapshotResponse(progress=_progress(event))
                else:
                    yield pb.CreateSnapshotResponse(snapshot_id=event[0])

    async def IncrementalBackup(
        self, request: pb.IncrementalBackupRequest, context: Context
    ) -> AsyncGenerator[pb.IncrementalBackupResponse, None]:
        """Save what changed."""
        changed: dict[str, list[tuple[int, int]]] = {}
        for extent in request.changed:
            changed.setdefault(extent.volume, []).append((extent.offset, extent.length))
        events = with_progress(
            lambda progress: self._manager.incremental_backup(
                request.vm_id,
                request.snapshot_id,
                parent=request.parent_id,
                base=request.base_id,
                takeover=request.takeover,
                changed=changed if request.since_point_id else None,
                since=request.since_point_id,
                progress=progress,
            )
        )
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Progress):
                    yield pb.IncrementalBackupResponse(progress=_progress(event))
                else:
                    yield pb.IncrementalBackupResponse(backup_id=event[0], notices=await self._notices(event[0]))

    async def RestoreVm(
        self, request: pb.RestoreVmRequest, context: Context
    ) -> AsyncGenerator[pb.RestoreVmResponse, None]:
        """Rebuild a VM's volumes."""
        target = self._paths.check(request.target) if request.target else None
        onto = self._paths.check(request.onto) if request.onto else None
        events = with_progress(
            lambda progress: self._manager.restore_vm(
                request.snapshot_id,
                request.backup_id,
                target=target,
                onto=onto,
                image_format=request.image_format or "raw",
                durable=request.durable,
                progress=progress,
            )
        )
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Progress):
                    yield pb.RestoreVmResponse(progress=_progress(event))
                else:
                    yield pb.RestoreVmResponse(directory=str(event[0]))

    async def PersistApplicationData(
        self, request_iterator: AsyncIterator[pb.PersistApplicationDataRequest], context: Context
    ) -> AsyncGenerator[pb.PersistApplicationDataResponse, None]:
        """Store bytes for a task."""
        first = await anext(request_iterator, None)
        if first is None or not first.task_id:
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "the first message names the task that the data is of")
        events = with_progress(
            lambda progress: self._manager.persist_stream(
                first.task_id, _pieces(first, request_iterator), progress=progress
            )
        )
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Progress):
                    yield pb.PersistApplicationDataResponse(progress=_progress(event))
                else:
                    yield pb.PersistApplicationDataResponse(storage_id=event[0])

    async def RetrieveApplicationData(
        self, request: pb.RetrieveApplicationDataRequest, context: Context
    ) -> AsyncGenerator[pb.RetrieveApplicationDataResponse, None]:
        """Return an object's bytes."""
        pieces = self._manager.retrieve_stream(request.storage_id, offset=request.offset, length=request.length or None)
        async with aclosing(pieces):
            async for piece in pieces:
                for at in range(0, len(piece), CHUNK_BYTES_MAX):
                    yield pb.RetrieveApplicationDataResponse(data=piece[at : at + CHUNK_BYTES_MAX])

    async def ListPoints(self, request: pb.ListPointsRequest, context: Context) -> pb.ListPointsResponse:
        """List a VM's points."""
        points = await self._manager.points(request.vm_id)
        return pb.ListPointsResponse(
            points=[
                pb.Point(
                    point_id=point.point_id,
                    parent_id=point.parent_id,
                    created_unix_ms=point.created_unix_ms,
                    size_bytes=point.size_bytes,
                    stored_bytes=point.stats.stored_bytes,
                )
                for point in points
            ]
        )

    async def PersistFiles(
        self, request: pb.PersistFilesRequest, context: Context
    ) -> AsyncGenerator[pb.PersistFilesResponse, None]:
        """Keep files as application data."""
        if bool(request.point_id) == bool(request.directory):
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "files come from a point or from a directory: name one")
        source = (
            PointFiles(request.point_id, volume=request.volume)
            if request.point_id
            else self._paths.check(request.directory)
        )
        events = with_progress(
            lambda progress: self._manager.persist_files(
                request.task_id,
                source,
                include=list(request.include),
                exclude=list(request.exclude),
                exclude_secrets=request.exclude_secrets,
                progress=progress,
            )
        )
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Progress):
                    yield pb.PersistFilesResponse(progress=_progress(event))
                else:
                    yield pb.PersistFilesResponse(storage_id=event[0])

    async def DiscardVm(
        self, request: pb.DiscardVmRequest, context: Context
    ) -> AsyncGenerator[pb.DiscardVmResponse, None]:
        """End a VM's life; its application data stays."""
        events = with_progress(lambda progress: self._manager.discard_vm(request.vm_id, progress=progress))
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Progress):
                    yield pb.DiscardVmResponse(progress=_progress(event))
                else:
                    receipt = event[0]
                    yield pb.DiscardVmResponse(
                        receipt=pb.Receipt(
                            vm_id=receipt.vm_id,
                            point_count=receipt.point_count,
                            released_bytes=receipt.released_bytes,
                            storage_ids=[kept.storage_id for kept in receipt.kept],
                        )
                    )

    async def _notices(self, point_id: str) -> list[str]:
        """Return what is to be said of the write that has just ended, if it is this one."""
        transfer = self._manager.last_transfer
        return list(transfer.notices) if transfer is not None and transfer.resource_id == point_id else []


def _progress(progress: Progress) -> pb.Progress:
    return pb.Progress(phase=progress.phase, bytes_done=progress.bytes_done, bytes_total=progress.bytes_total)


async def _pieces(
    first: pb.PersistApplicationDataRequest, rest: AsyncIterator[pb.PersistApplicationDataRequest]
) -> AsyncIterator[bytes]:
    """Yield the bytes of a stream of messages.

    Raises:
        HoldfastError: INVALID_ARGUMENT if a later message names a task, LIMIT_EXCEEDED for one that is too long.
    """
    message = first
    while True:
        if len(message.data) > CHUNK_BYTES_MAX:
            raise HoldfastError(
                ErrorCode.LIMIT_EXCEEDED, f"a message brings at most {CHUNK_BYTES_MAX} bytes, not {len(message.data)}"
            )
        yield message.data
        following = await anext(rest, None)
        if following is None:
            return
        if following.task_id:
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "only the first message names the task")
        message = following
