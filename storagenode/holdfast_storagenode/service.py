"""The gRPC service of a storage node: every verb under a capability, confined to its tenant and its kinds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias

import grpc.aio
from google.protobuf.message import Message

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import (
    BATCH_BLOCKS_MAX,
    BATCH_BYTES_TARGET,
    BLOCK_ID_BYTES,
    IDS_PER_REQUEST_MAX,
    IN_FLIGHT_BYTES_PER_NODE,
    PARTITIONS_MAX,
)
from holdfast_core.model.names import split_ids
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.capability import Capability
from holdfast_proto.v1 import blocks_pb2 as pb
from holdfast_proto.v1.common_pb2 import NodeStatus
from holdfast_storagenode.access import AccessControl, sees_all_kinds
from holdfast_storagenode.metrics import NodeMetrics
from holdfast_storagenode.putting import ByteWindow, PutStream
from holdfast_storagenode.store import BlockEntry, BlockStore, Found, PartitionOf, Verdict, kind_of
from holdfast_storagenode.wire import PutMessage, encode_get
from holdfast_storagenode.workers import Workers

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

# All streams together; one client keeps IN_FLIGHT_BYTES_PER_NODE in flight.
_WINDOW_BYTES: Final = 2 * IN_FLIGHT_BYTES_PER_NODE


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """What the service asks of its node, each time anew: the store (NOT_READY before there is one), epoch, status.

    `partition_of` never changes; it may be asked where there is a store.
    """

    store: Callable[[], BlockStore]
    partition_of: PartitionOf
    layout_epoch: Callable[[], int]
    status: Callable[[], NodeStatus]


@dataclass(frozen=True, slots=True)
class _ScanPart:
    """What is left to list: from `partition` on to below `end`, or all where it is None, above the id `after`."""

    partition: int | None
    end: int
    after: bytes


@dataclass(frozen=True, slots=True)
class _GetBatch:
    """One message of an answer to GetBlocks: how many ids it answers, the blocks in it, and its bytes."""

    id_count: int
    block_count: int
    block_bytes: int
    message: bytes


class BlockService:
    """Serves one node's store. Streams answer by `context.write`, so that their tasks can live in a task group."""

    def __init__(self, node: NodeView, access: AccessControl, workers: Workers, metrics: NodeMetrics) -> None:
        self._node = node
        self._access = access
        self._workers = workers
        self._metrics = metrics
        self._window = ByteWindow(_WINDOW_BYTES)

    async def PutBlocks(self, requests: AsyncIterator[PutMessage], context: Context) -> None:
        """Store batches; see `PutStream`."""
        capability = self._access.enter(context, "put")
        stream = PutStream(
            store=self._node.store(),
            capability=capability,
            workers=self._workers,
            window=self._window,
            metrics=self._metrics,
            newest_epoch=self._node.layout_epoch,
            recheck=self._access.recheck,
            send=partial(_send, context),
            sending=asyncio.Lock(),
        )
        await stream.run(requests)

    async def GetBlocks(self, request: pb.GetBlocksRequest, context: Context) -> None:
        """Send blocks in the order asked, reading the next batch while one is being sent."""
        capability = self._access.enter(context, "get")
        store, ids = self._node.store(), _ids(request.block_ids)
        position = 0
        async with plain_task_group() as group:
            reading = group.create_task(self._read(store, capability, ids, 0))
            while position < len(ids):
                count, response = await reading
                following = position + count
                if following < len(ids):
                    self._access.recheck(capability)
                    reading = group.create_task(self._read(store, capability, ids, following))
                await _send(context, response)
                position = following

    async def HasBlocks(self, request: pb.HasBlocksRequest, context: Context) -> pb.HasBlocksResponse:
        """Say which blocks are held."""
        capability = self._access.enter(context, "has")
        store, ids = self._node.store(), _ids(request.block_ids)
        newest = self._node.layout_epoch()
        if request.layout_epoch and request.layout_epoch < newest:
            raise HoldfastError(
                ErrorCode.WRONG_EPOCH,
                f"the layout of epoch {request.layout_epoch} is older than epoch {newest}, which this node knows",
                facts={"newest_epoch": str(newest)},
            )
        return pb.HasBlocksResponse(verdicts=await self._workers.run(_has, store, capability, ids, request.verify))

    async def ScanBlocks(self, request: pb.ScanBlocksRequest, context: Context) -> None:
        """List what is held of the kinds that the capability names."""
        capability = self._access.enter(context, "scan")
        store = self._node.store()
        if request.after and len(request.after) != BLOCK_ID_BYTES:
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"an id takes {BLOCK_ID_BYTES} bytes")
        part = self._scanned(request)
        left = request.limit or None
        while left is None or left > 0:
            page = BATCH_BLOCKS_MAX if left is None else min(left, BATCH_BLOCKS_MAX)
            entries, rest = await self._workers.run(_scan, store, capability.tenant, part, page)
            listed = [entry for entry in entries if entry.kind in capability.kinds]
            if listed:
                await _send(
                    context,
                    pb.ScanBlocksResponse(
                        block_ids=b"".join(entry.block_id for entry in listed),
                        lengths=[entry.length for entry in listed],
                        stamps=[entry.stamp for entry in listed],
                    ),
                )
            if rest is None:
                return
            self._access.recheck(capability)
            part = rest
            left = None if left is None else left - len(listed)

    def _scanned(self, request: pb.ScanBlocksRequest) -> _ScanPart:
        """Return what a request means to list."""
        if not request.HasField("partition"):
            return _ScanPart(None, 0, request.after)
        first = request.partition
        end = min(PARTITIONS_MAX, first + max(1, request.partition_count))
        # The order is that of partitions, so an id of a later one lies above all of those before it.
        at = self._node.partition_of(request.after) if request.after else first
        return _ScanPart(max(first, at), end, request.after if at >= first else b"")

    async def DeleteBlocks(self, request: pb.DeleteBlocksRequest, context: Context) -> pb.DeleteBlocksResponse:
        """Remove blocks that are stamped below the cut-off, without which nothing is removed."""
        capability = self._access.enter(context, "delete")
        store, ids = self._node.store(), _ids(request.block_ids)
        if not request.cutoff:
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "a delete names its cut-off; no block is stamped below 0")
        verdicts = await self._workers.run(_delete, store, capability, ids, request.cutoff)
        return pb.DeleteBlocksResponse(verdicts=verdicts)

    async def GetNodeStatus(self, request: pb.GetNodeStatusRequest, context: Context) -> pb.GetNodeStatusResponse:
        """Report space and counts."""
        self._access.enter(context, "status")
        return pb.GetNodeStatusResponse(status=await self._workers.run(self._node.status))

    async def _read(
        self, store: BlockStore, capability: Capability, ids: Sequence[bytes], first: int
    ) -> tuple[int, bytes]:
        """Read one batch; return how many ids it answers, and the answer."""
        batch = await self._workers.run(_get, store, capability, ids, first)
        self._metrics.moved("out", blocks=batch.block_count, size_bytes=batch.block_bytes)
        return batch.id_count, batch.message


async def _send(context: Context, message: Message | bytes) -> None:
    """Send one message of a stream, which may be in its serialised form.

    Raises:
        HoldfastError: CANCELLED if the client is gone; gRPC then fails the write before it cancels the call.
    """
    try:
        await context.write(message)
    except grpc.aio.InternalError as error:
        raise HoldfastError(ErrorCode.CANCELLED, "the client went away before it was answered") from error


def _ids(packed: bytes) -> list[bytes]:
    if len(packed) > IDS_PER_REQUEST_MAX * BLOCK_ID_BYTES:
        raise HoldfastError(ErrorCode.LIMIT_EXCEEDED, f"a request takes at most {IDS_PER_REQUEST_MAX} ids")
    return split_ids(packed)


# What follows runs in worker threads.


def _get(store: BlockStore, capability: Capability, ids: Sequence[bytes], first: int) -> _GetBatch:
    found = store.get(capability.tenant, ids[first : first + BATCH_BLOCKS_MAX], bytes_max=BATCH_BYTES_TARGET)
    seen = [_confined(item, capability) for item in found]
    blocks = [item.data for item in seen if not isinstance(item, Verdict)]
    message = encode_get(
        first=first,
        verdicts=bytes(item if isinstance(item, Verdict) else Verdict.OK for item in seen),
        lengths=[0 if isinstance(item, Verdict) else len(item.data) for item in seen],
        blocks=blocks,
    )
    return _GetBatch(len(found), len(blocks), sum(map(len, blocks)), message)


def _confined(item: Found, capability: Capability) -> Found:
    if isinstance(item, Verdict) or kind_of(item.data) in capability.kinds_for("get"):
        return item
    return Verdict.DENIED


def _has(store: BlockStore, capability: Capability, ids: Sequence[bytes], verify: bool) -> bytes:
    # Who only looks keeps nothing alive; who works under a collection epoch leans on what it finds.
    epoch = capability.collection_epoch
    verdicts = store.has(capability.tenant, ids, verify=verify, stamp=max(store.epoch, epoch) if epoch else 0)
    return bytes(_confine_verdicts(store, capability, ids, verdicts))


def _scan(store: BlockStore, tenant: int, part: _ScanPart, limit: int) -> tuple[list[BlockEntry], _ScanPart | None]:
    """List up to `limit` entries of a part; return them and what is left, None where that is nothing."""
    if part.partition is None:
        entries = store.scan(tenant, partition=None, after=part.after, limit=limit)
        return entries, _ScanPart(None, 0, entries[-1].block_id) if len(entries) == limit else None
    listed: list[BlockEntry] = []
    after = part.after
    for partition in range(part.partition, part.end):
        wanted = limit - len(listed)
        entries = store.scan(tenant, partition=partition, after=after, limit=wanted)
        listed.extend(entries)
        if len(entries) == wanted:
            return listed, _ScanPart(partition, part.end, entries[-1].block_id)
        after = b""
    return listed, None


def _delete(store: BlockStore, capability: Capability, ids: Sequence[bytes], cutoff: int) -> bytes:
    if sees_all_kinds(capability):
        return bytes(store.delete(capability.tenant, ids, cutoff=cutoff))
    kinds = store.kinds(capability.tenant, ids)
    allowed = [block_id for block_id, kind in zip(ids, kinds, strict=True) if kind is None or kind in capability.kinds]
    deleted = iter(store.delete(capability.tenant, allowed, cutoff=cutoff))
    return bytes(next(deleted) if kind is None or kind in capability.kinds else Verdict.DENIED for kind in kinds)


def _confine_verdicts(
    store: BlockStore, capability: Capability, ids: Sequence[bytes], verdicts: Sequence[Verdict]
) -> list[Verdict]:
    if sees_all_kinds(capability):
        return list(verdicts)
    kinds = store.kinds(capability.tenant, ids)
    return [
        verdict if kind is None or kind in capability.kinds else Verdict.DENIED
        for verdict, kind in zip(verdicts, kinds, strict=True)
    ]
