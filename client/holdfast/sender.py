"""One node's PutBlocks stream: a queue in, acknowledgements out, within a window of bytes.

Acknowledgements come in any order; a batch is done at a node only when the node says it is durable. A broken stream is
opened again a few times and what was not acknowledged is sent again (putting a block twice is harmless). A node that
stays silent with batches outstanding counts as failed, and then everything queued for it fails at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import grpc.aio

from holdfast.batches import Batch
from holdfast.wire import as_is
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import IN_FLIGHT_BYTES_PER_NODE, RPC_TIMEOUT_S
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.status import error_from_rpc, reaches_peer
from holdfast_proto.v1.blocks_pb2 import VERDICT_OK, VERDICT_PRESENT, PutBlocksResponse

_REOPENINGS_MAX: Final = 3
_REOPEN_PAUSE_S: Final = 0.3
_MAY_PASS: Final = frozenset((ErrorCode.UNREACHABLE, ErrorCode.NOT_READY))
_GOOD: Final = frozenset((VERDICT_OK, VERDICT_PRESENT))

Done = Callable[[str, Batch, HoldfastError | None], None]
"""Told of each batch once: the node, the batch, and why it failed or None."""

Met = Callable[[Batch, list[int]], None]
"""Told, before a batch is done, of the positions of blocks that a node had before and no other has spoken of yet."""


class NodeSender:
    """Sends batches to one node. Belongs to one event loop; `run` is its task.

    Attributes:
        node_id: the node.
        dead: why the node takes nothing any more, or None.
    """

    def __init__(
        self,
        pool: NodePool,
        node_id: str,
        capability: Callable[[], str],
        done: Done,
        met: Met,
        *,
        clock: Clock,
        stall_s: float = RPC_TIMEOUT_S,
    ) -> None:
        """Bind to a node; nothing is opened before the first batch. Silence of `stall_s` is a failure."""
        self.node_id = node_id
        self.dead: HoldfastError | None = None
        self._pool = pool
        self._capability = capability
        self._done = done
        self._met = met
        self._clock = clock
        self._stall_s = stall_s
        self._queue: deque[Batch] = deque()
        self._sent: dict[int, Batch] = {}
        self._sent_bytes = 0
        self._changed = asyncio.Event()
        self._closing = False
        self._acknowledged = 0
        self._careful = False
        self._call: Any = None

    def put(self, batch: Batch) -> None:
        """Queue a batch; if the node is dead, it is done at once, failed."""
        if self.dead is not None:
            self._done(self.node_id, batch, self.dead)
            return
        self._queue.append(batch)
        self._changed.set()

    def close(self) -> None:
        """Let `run` end once everything queued is done."""
        self._closing = True
        self._changed.set()

    @property
    def busy(self) -> bool:
        """Whether the node has not acknowledged everything."""
        return bool(self._sent or self._queue)

    def fail(self, error: HoldfastError) -> None:
        """Declare the node dead and fail all that it has not acknowledged."""
        if self.dead is None:
            self.dead = error
            self._pool.failed(self.node_id)
        rest = [*self._sent.values(), *self._queue]
        self._sent.clear()
        self._sent_bytes = 0
        self._queue.clear()
        self._changed.set()
        if self._call is not None:
            self._call.cancel()
        for batch in rest:
            self._done(self.node_id, batch, self.dead)

    async def run(self) -> None:
        """Send until closed and empty, or the node is dead. Never raises for the node's failures."""
        reopenings = 0
        while await self._work_or_close():
            acknowledged_before = self._acknowledged
            try:
                await self._stream()
            except HoldfastError as error:
                if self._acknowledged > acknowledged_before:
                    reopenings = 0
                reopenings += 1
                if error.code not in _MAY_PASS or reopenings > _REOPENINGS_MAX:
                    self.fail(error)
                    return
                await self._clock.sleep(_REOPEN_PAUSE_S)

    async def _work_or_close(self) -> bool:
        """Wait for something to send; False when closed or dead."""
        while not self._queue and not self._sent:
            if self._closing or self.dead is not None:
                return False
            self._changed.clear()
            await self._changed.wait()
        return self.dead is None

    async def _stream(self) -> None:
        """Open a stream, send what was sent before and not acknowledged, then the queue, until closed and empty.

        Raises:
            HoldfastError: why the stream broke.
        """
        again = sorted(self._sent.values(), key=lambda batch: batch.sequence)
        for batch in again:
            batch.sent_again = True
        self._queue.extendleft(reversed(again))
        self._sent.clear()
        self._sent_bytes = 0
        call = self._pool.put_stream(
            self.node_id, self._capability(), serializer=as_is, deserializer=PutBlocksResponse.FromString
        )
        self._call = call
        watchdog = _Watchdog(call, self._stall_s)
        try:
            async with plain_task_group() as group:
                reading = group.create_task(self._read(call, watchdog))
                await self._write(call, watchdog, reading)
        finally:
            watchdog.disarm()
            self._call = None
            call.cancel()

    async def _write(self, call: Any, watchdog: _Watchdog, reading: asyncio.Task[None]) -> None:
        while not reading.done():
            while self._queue and self._may_send(self._queue[0]):
                batch = self._queue.popleft()
                if batch.moved:
                    self._done(self.node_id, batch, None)
                    continue
                self._sent[batch.sequence] = batch
                self._sent_bytes += batch.sealed_bytes
                watchdog.arm()
                try:
                    await call.write(batch.wire)
                except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    return  # the stream is over; the reading task knows why
            if self.dead is not None or (self._closing and not self._queue and not self._sent):
                await call.done_writing()
                return
            self._changed.clear()
            if self._queue and self._may_send(self._queue[0]):
                continue
            await self._changed.wait()

    def _may_send(self, batch: Batch) -> bool:
        if self._careful:
            return not self._sent
        return not self._sent or self._sent_bytes + batch.sealed_bytes <= IN_FLIGHT_BYTES_PER_NODE

    async def _read(self, call: Any, watchdog: _Watchdog) -> None:
        try:
            while (answer := await call.read()) is not grpc.aio.EOF:
                self._acknowledge(answer)
                watchdog.progress(outstanding=bool(self._sent))
        except grpc.aio.AioRpcError as error:
            raise self._told(error_from_rpc(error, peer=f"storage node {self.node_id}")) from error
        except asyncio.CancelledError:
            if watchdog.fired:
                raise self._silent(f"acknowledged nothing for {self._stall_s:g} s") from None
            raise
        finally:
            self._changed.set()
        if self._sent or self._queue:
            raise self._silent("ended the stream early")

    def _acknowledge(self, answer: PutBlocksResponse) -> None:
        batch = self._sent.pop(answer.sequence, None)
        if batch is None:
            raise self._silent("acknowledged a batch that was never sent")
        self._sent_bytes -= batch.sealed_bytes
        if len(answer.verdicts) != len(batch.block_ids) or not _GOOD.issuperset(answer.verdicts):
            self._sent[answer.sequence] = batch
            raise HoldfastError(ErrorCode.INTERNAL, f"storage node {self.node_id} refused blocks without a reason")
        self._acknowledged += 1
        self._careful = False
        self._changed.set()
        if present := batch.take_verdicts(answer.verdicts):
            self._met(batch, present)
        self._done(self.node_id, batch, None)

    def _told(self, error: HoldfastError) -> HoldfastError:
        """Return what an ended stream means.

        grpc.aio answers INTERNAL, and forgets what the server said, when a write meets a stream that has just ended.
        The next stream then sends one batch at a time until it is answered, so that the server is heard.
        """
        if error.code is ErrorCode.INTERNAL and not reaches_peer(error):
            self._careful = True
            return self._silent("ended the stream")
        return error

    def _silent(self, why: str) -> HoldfastError:
        return HoldfastError(
            ErrorCode.UNREACHABLE, f"storage node {self.node_id} {why}", facts={"node_id": self.node_id}
        )


class _Watchdog:
    """Cancels a call when no acknowledgement comes for a while although some are due."""

    def __init__(self, call: Any, stall_s: float) -> None:
        self._call = call
        self._stall_s = stall_s
        self._timer: asyncio.TimerHandle | None = None
        self.fired = False

    def arm(self) -> None:
        """Begin to wait, unless waiting already."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._stall_s, self._fire)

    def progress(self, *, outstanding: bool) -> None:
        """Begin anew where acknowledgements are still due, else stop."""
        self.disarm()
        if outstanding:
            self.arm()

    def disarm(self) -> None:
        """Stop waiting."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _fire(self) -> None:
        self.fired = True
        self._timer = None
        self._call.cancel()
