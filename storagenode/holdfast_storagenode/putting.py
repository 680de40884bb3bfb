"""One PutBlocks stream: batches are verified and stored side by side, and each is acknowledged once it is durable.

The next batches are read while earlier ones wait for the disk, up to a window of bytes that all streams of the node
share. Acknowledgements leave in the order in which batches complete. The first batch that is refused ends the stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass

from holdfast_core.model.block import SealedView, check_form, unchanging_view, verify_view
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import BATCH_BLOCKS_MAX, BATCH_BYTES_MAX, BLOCK_ID_BYTES, SEALED_BYTES_MAX
from holdfast_core.model.names import split_ids
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.capability import Capability
from holdfast_proto.v1.blocks_pb2 import PutBlocksResponse
from holdfast_storagenode.metrics import NodeMetrics
from holdfast_storagenode.store import BlockStore, SubmittingStore, Verdict
from holdfast_storagenode.wire import PutMessage
from holdfast_storagenode.workers import Workers


class ByteWindow:
    """A bound on bytes in flight; who would pass it waits in line."""

    def __init__(self, bytes_max: int) -> None:
        self._free = bytes_max
        self._changed = asyncio.Condition()

    async def enter(self, size: int) -> None:
        """Wait until `size` bytes fit."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._free >= size)
            self._free -= size

    async def leave(self, size: int) -> None:
        """Give `size` bytes back."""
        async with self._changed:
            self._free += size
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch whose form was checked: number, ids, and the bytes with the length of each block in them."""

    sequence: int
    ids: list[bytes]
    lengths: list[int]
    data: memoryview


def check_batch(message: PutMessage, *, newest_epoch: int) -> Batch:
    """Return the batch if its form is right.

    Raises:
        HoldfastError: NOT_READY without a layout, WRONG_EPOCH for an older one, LIMIT_EXCEEDED above the limits,
            INVALID_ARGUMENT if ids, lengths and bytes do not fit together.
    """
    if not newest_epoch:
        raise HoldfastError(ErrorCode.NOT_READY, "the cluster has no layout yet; this node takes no blocks until then")
    request = message.head
    if request.layout_epoch < newest_epoch:
        raise HoldfastError(
            ErrorCode.WRONG_EPOCH,
            f"the layout of epoch {request.layout_epoch} is older than epoch {newest_epoch}, which this node knows; "
            "refresh it",
            facts={"newest_epoch": str(newest_epoch)},
        )
    packed, data, lengths = request.block_ids, message.blocks, list(request.lengths)
    if len(packed) > BATCH_BLOCKS_MAX * BLOCK_ID_BYTES:
        raise HoldfastError(ErrorCode.LIMIT_EXCEEDED, f"a batch takes at most {BATCH_BLOCKS_MAX} blocks")
    if len(data) > BATCH_BYTES_MAX:
        raise HoldfastError(ErrorCode.LIMIT_EXCEEDED, f"a batch takes at most {BATCH_BYTES_MAX} bytes of blocks")
    ids = split_ids(packed)
    if not ids:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "the batch is empty")
    if len(lengths) != len(ids) or sum(lengths) != len(data):
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT,
            f"the batch has {len(ids)} ids, {len(lengths)} lengths that sum to {sum(lengths)}, and {len(data)} bytes",
        )
    if max(lengths) > SEALED_BYTES_MAX:
        raise HoldfastError(ErrorCode.LIMIT_EXCEEDED, f"a sealed block has at most {SEALED_BYTES_MAX} bytes")
    return Batch(request.sequence, ids, lengths, data)


def verified_blocks(batch: Batch, kinds: frozenset[int]) -> list[SealedView]:
    """Return the batch's blocks, each hashed and its form checked, where they lie in the message.

    Raises:
        HoldfastError: CORRUPT if one does not match its id or is no sealed block; DENIED if its kind is not in
            `kinds`.
    """
    blocks: list[SealedView] = []
    # Once a batch: should the message be one that can change, it is copied as a whole and not once a block.
    data = unchanging_view(batch.data)
    at = 0
    for block_id, length in zip(batch.ids, batch.lengths, strict=True):
        block = verify_view(block_id, data[at : at + length])
        if check_form(block.data) not in kinds:
            raise HoldfastError(
                ErrorCode.DENIED, "the capability does not allow this kind of block", block_ids=[block_id]
            )
        blocks.append(block)
        at += length
    return blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class PutStream:
    """What a stream works with. `recheck` raises once the capability has ended; `newest_epoch` asks anew each time."""

    store: BlockStore
    capability: Capability
    workers: Workers
    window: ByteWindow
    metrics: NodeMetrics
    newest_epoch: Callable[[], int]
    recheck: Callable[[Capability], None]
    send: Callable[[PutBlocksResponse], Awaitable[None]]
    sending: asyncio.Lock

    async def run(self, requests: AsyncIterator[PutMessage]) -> None:
        """Store everything that comes until the client has no more.

        Raises:
            HoldfastError: the first batch's refusal; batches that were not acknowledged may or may not be stored.
        """
        try:
            async with plain_task_group() as group:
                async for request in requests:
                    self.recheck(self.capability)
                    batch = check_batch(request, newest_epoch=self.newest_epoch())
                    await self.window.enter(len(batch.data))
                    group.create_task(self._keep(batch))
        except HoldfastError as error:
            self.metrics.refused(error.code.name)
            raise

    async def _keep(self, batch: Batch) -> None:
        try:
            verdicts = await self.workers.run_and_settle(self._store_batch, batch)
        finally:
            await self.window.leave(len(batch.data))
        self._count(batch, verdicts)
        async with self.sending:
            await self.send(PutBlocksResponse(sequence=batch.sequence, verdicts=bytes(verdicts)))

    def _store_batch(self, batch: Batch) -> Future[list[Verdict]]:
        """Verify a batch and hand it to the store; runs in a thread."""
        blocks = verified_blocks(batch, self.capability.kinds)
        stamp = max(self.store.epoch, self.capability.collection_epoch)
        if isinstance(self.store, SubmittingStore):
            return self.store.submit(self.capability.tenant, blocks, stamp=stamp)
        done: Future[list[Verdict]] = Future()
        done.set_result(self.store.put(self.capability.tenant, blocks, stamp=stamp))
        return done

    def _count(self, batch: Batch, verdicts: list[Verdict]) -> None:
        present = [
            length for length, verdict in zip(batch.lengths, verdicts, strict=True) if verdict is Verdict.PRESENT
        ]
        self.metrics.moved("in", blocks=len(batch.ids), size_bytes=len(batch.data))
        if present:
            self.metrics.moved("deduplicated", blocks=len(present), size_bytes=sum(present))
