"""One PutBlocks stream: batches are verified and stored side by side, and each is acknowledged once it is durable.

The next batches are read while earlier ones wait for the disk, up to a window of bytes that all streams of the node
share. Acknowledgements leave in the order in which batches complete. The first batch that is refused ends the stream.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from holdfast_core.model.errors import HoldfastError
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.capability import Capability
from holdfast_proto.v1.blocks_pb2 import PutBlocksResponse
from holdfast_storagenode.batch import Batch, make_batch
from holdfast_storagenode.core import NodeCore
from holdfast_storagenode.metrics import NodeMetrics
from holdfast_storagenode.store import Verdict
from holdfast_storagenode.wire import PutMessage


class ByteWindow:
    """A bound on bytes in flight; who would pass it waits in line. Belongs to one event loop."""

    def __init__(self, bytes_max: int) -> None:
        self._free = bytes_max
        self._line: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def enter(self, size: int) -> None:
        """Wait until `size` bytes fit."""
        if not self._line and size <= self._free:
            self._free -= size
            return
        admitted = asyncio.get_running_loop().create_future()
        self._line.append((size, admitted))
        try:
            await admitted
        except asyncio.CancelledError:
            if admitted.done() and not admitted.cancelled():
                self.leave(size)
            else:
                # Who stood first may have been all that the next waited for.
                self._admit()
            raise

    def leave(self, size: int) -> None:
        """Give `size` bytes back."""
        self._free += size
        self._admit()

    def _admit(self) -> None:
        while self._line:
            size, admitted = self._line[0]
            if not admitted.done():
                if size > self._free:
                    return
                self._free -= size
                admitted.set_result(None)
            self._line.popleft()


@dataclass(frozen=True, slots=True, kw_only=True)
class PutStream:
    """What a stream works with. `recheck` raises once the capability has ended."""

    core: NodeCore
    capability: Capability
    window: ByteWindow
    metrics: NodeMetrics
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
                    batch = check_put(request)
                    await self.window.enter(len(batch.data))
                    keeping = group.create_task(self._keep(request.head.sequence, batch))
                    # Not in the task: one that is cancelled before it has begun runs nothing of itself.
                    keeping.add_done_callback(partial(self._leave, len(batch.data)))
        except HoldfastError as error:
            self.metrics.refused(error.code.name)
            raise

    async def _keep(self, sequence: int, batch: Batch) -> None:
        capability = self.capability
        verdicts = await self.core.put(
            capability.tenant, batch, kinds=capability.kinds, collection_epoch=capability.collection_epoch
        )
        self._count(batch, verdicts)
        async with self.sending:
            await self.send(PutBlocksResponse(sequence=sequence, verdicts=bytes(verdicts)))

    def _leave(self, size: int, keeping: asyncio.Task[None]) -> None:
        self.window.leave(size)

    def _count(self, batch: Batch, verdicts: list[Verdict]) -> None:
        present = [
            length for length, verdict in zip(batch.lengths, verdicts, strict=True) if verdict is Verdict.PRESENT
        ]
        self.metrics.moved("in", blocks=len(batch.ids), size_bytes=len(batch.data))
        if present:
            self.metrics.moved("deduplicated", blocks=len(present), size_bytes=sum(present))


def check_put(message: PutMessage) -> Batch:
    """Return the batch of a message if its form is right. Raises as `make_batch`."""
    head = message.head
    return make_batch(
        layout_epoch=head.layout_epoch, packed_ids=head.block_ids, lengths=head.lengths, data=message.blocks
    )
