"""The gRPC service that a storage node offers to clients and coordinators: a shell over `NodeCore`.

Every verb goes under a capability, and is confined to its tenant and its kinds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias

import grpc.aio
from google.protobuf.message import Message

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import (
    BATCH_BLOCKS_MAX,
    BLOCK_ID_BYTES,
    IDS_PER_REQUEST_MAX,
    IN_FLIGHT_BYTES_PER_NODE,
    PARTITIONS_MAX,
)
from holdfast_core.model.names import split_ids
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.calls import write_message
from holdfast_proto.v1 import blocks_pb2 as pb
from holdfast_proto.v1.common_pb2 import NodeStatus
from holdfast_storagenode.access import AccessControl
from holdfast_storagenode.core import NodeCore
from holdfast_storagenode.listing import ScanPart
from holdfast_storagenode.metrics import NodeMetrics
from holdfast_storagenode.putting import ByteWindow, PutStream
from holdfast_storagenode.store import Found, Verdict
from holdfast_storagenode.wire import PutMessage, encode_get

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

# All streams together; one client keeps IN_FLIGHT_BYTES_PER_NODE in flight.
_WINDOW_BYTES: Final = 2 * IN_FLIGHT_BYTES_PER_NODE


@dataclass(frozen=True, slots=True)
class GetMessage:
    """One message of an answer: the blocks in it, their bytes, and the message in its serialised form."""

    block_count: int
    block_bytes: int
    message: bytes


class BlockService:
    """Serves one node's blocks. Streams answer by `context.write`, so that their tasks can live in a task group."""

    def __init__(
        self,
        core: NodeCore,
        access: AccessControl,
        metrics: NodeMetrics,
        status: Callable[[], Awaitable[NodeStatus]],
    ) -> None:
        self._core = core
        self._access = access
        self._metrics = metrics
        self._status = status
        self._window = ByteWindow(_WINDOW_BYTES)

    async def PutBlocks(self, requests: AsyncIterator[PutMessage], context: Context) -> None:
        """Store batches; see `PutStream`."""
        capability = self._access.enter(context, "put")
        stream = PutStream(
            core=self._core,
            capability=capability,
            window=self._window,
            metrics=self._metrics,
            recheck=self._access.recheck,
            send=partial(send_message, context),
            sending=asyncio.Lock(),
        )
        await stream.run(requests)

    async def GetBlocks(self, request: pb.GetBlocksRequest, context: Context) -> None:
        """Send blocks in the order asked, reading the next batch while one is being sent."""
        capability = self._access.enter(context, "get")
        ids = ids_of(request.block_ids)

        async def read(first: int) -> tuple[int, bytes]:
            count, answer = await self._core.get(
                capability, ids[first : first + BATCH_BLOCKS_MAX], partial(shape_get, first)
            )
            self._metrics.moved("out", blocks=answer.block_count, size_bytes=answer.block_bytes)
            return count, answer.message

        await send_while_reading(context, read, id_count=len(ids), recheck=partial(self._access.recheck, capability))

    async def HasBlocks(self, request: pb.HasBlocksRequest, context: Context) -> pb.HasBlocksResponse:
        """Say which blocks are held."""
        capability = self._access.enter(context, "has")
        verdicts = await self._core.has(
            capability, ids_of(request.block_ids), layout_epoch=request.layout_epoch, verify=request.verify
        )
        return pb.HasBlocksResponse(verdicts=bytes(verdicts))

    async def ScanBlocks(self, request: pb.ScanBlocksRequest, context: Context) -> None:
        """List what is held of the kinds that the capability names; what is set aside as corrupt only if asked."""
        capability = self._access.enter(context, "scan")
        if request.after and len(request.after) != BLOCK_ID_BYTES:
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"an id takes {BLOCK_ID_BYTES} bytes")
        part: ScanPart | None = self._scanned(request)
        left = request.limit or None
        while part is not None and (left is None or left > 0):
            page = BATCH_BLOCKS_MAX if left is None else min(left, BATCH_BLOCKS_MAX)
            listed, part = await self._core.scan(capability, part, limit=page)
            if listed:
                await send_message(
                    context,
                    pb.ScanBlocksResponse(
                        block_ids=b"".join(entry.block_id for entry in listed),
                        lengths=[entry.length for entry in listed],
                        stamps=[entry.stamp for entry in listed],
                        quarantined=[at for at, entry in enumerate(listed) if entry.quarantined],
                    ),
                )
            self._access.recheck(capability)
            left = None if left is None else left - len(listed)

    def _scanned(self, request: pb.ScanBlocksRequest) -> ScanPart:
        """Return what a request means to list."""
        if not request.HasField("partition"):
            return ScanPart(None, 0, request.after, request.with_quarantined)
        first = request.partition
        end = min(PARTITIONS_MAX, first + max(1, request.partition_count))
        # The order is that of partitions, so an id of a later one lies above all of those before it.
        at = self._core.cluster.partition_of(request.after) if request.after else first
        return ScanPart(max(first, at), end, request.after if at >= first else b"", request.with_quarantined)

    async def DeleteBlocks(self, request: pb.DeleteBlocksRequest, context: Context) -> pb.DeleteBlocksResponse:
        """Remove blocks that are stamped below the cut-off, without which nothing is removed."""
        capability = self._access.enter(context, "delete")
        verdicts = await self._core.delete(capability, ids_of(request.block_ids), cutoff=request.cutoff)
        return pb.DeleteBlocksResponse(verdicts=bytes(verdicts))

    async def GetNodeStatus(self, request: pb.GetNodeStatusRequest, context: Context) -> pb.GetNodeStatusResponse:
        """Report space and counts."""
        self._access.enter(context, "status")
        return pb.GetNodeStatusResponse(status=await self._status())


async def send_message(context: Context, message: Message | bytes) -> None:
    """Send one message of a stream, which may be in its serialised form.

    Raises:
        HoldfastError: CANCELLED if the client is gone; gRPC then fails the write before it cancels the call.
    """
    try:
        await write_message(context, message)
    except grpc.aio.InternalError as error:
        raise HoldfastError(ErrorCode.CANCELLED, "the client went away before it was answered") from error


async def send_while_reading(
    context: Context,
    read: Callable[[int], Awaitable[tuple[int, bytes]]],
    *,
    id_count: int,
    recheck: Callable[[], None],
) -> None:
    """Answer for `id_count` ids: `read(first)` returns how many it read from there on, and the message for those.

    The next is read while one is being sent. Raises what they raise.
    """
    position = 0
    async with plain_task_group() as group:
        reading = group.create_task(_awaited(read, 0)) if id_count else None
        while reading is not None:
            count, message = await reading
            position += count
            reading = None
            if position < id_count:
                recheck()
                reading = group.create_task(_awaited(read, position))
            await send_message(context, message)


async def _awaited(read: Callable[[int], Awaitable[tuple[int, bytes]]], first: int) -> tuple[int, bytes]:
    return await read(first)


def ids_of(packed: bytes) -> list[bytes]:
    """Return the ids of a request.

    Raises:
        HoldfastError: LIMIT_EXCEEDED for too many, INVALID_ARGUMENT if they are no whole number of ids.
    """
    if len(packed) > IDS_PER_REQUEST_MAX * BLOCK_ID_BYTES:
        raise HoldfastError(ErrorCode.LIMIT_EXCEEDED, f"a request takes at most {IDS_PER_REQUEST_MAX} ids")
    return split_ids(packed)


# What follows runs in worker threads.


def shape_get(first: int, found: Sequence[Found]) -> GetMessage:
    """Return the message that answers for `found`, whose first item has the position `first` in the request."""
    blocks = [item.data for item in found if not isinstance(item, Verdict)]
    message = encode_get(
        first=first,
        verdicts=bytes(item if isinstance(item, Verdict) else Verdict.OK for item in found),
        lengths=[0 if isinstance(item, Verdict) else len(item.data) for item in found],
        blocks=blocks,
    )
    return GetMessage(len(blocks), sum(map(len, blocks)), message)
