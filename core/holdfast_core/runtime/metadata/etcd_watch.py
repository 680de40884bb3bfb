"""Following the changes below a prefix on etcd, from one revision on, through lost connections.

What etcd sends is cut into one batch a revision. The position is the last revision that was handed on whole, so a new
connection goes on right behind it: nothing is lost, nothing comes twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from itertools import groupby
from typing import Any, Final

import grpc.aio

from holdfast_core.model.errors import ErrorCode
from holdfast_core.runtime.metadata.checks import range_end
from holdfast_core.runtime.metadata.etcd_client import EtcdClient, EtcdError, WatchStream, exchange
from holdfast_core.runtime.metadata.store import KeyValue, WatchBatch
from holdfast_core.runtime.status import RpcFailure
from holdfast_proto.v1 import etcd_pb2 as pb

ALL_KEYS: Final = b"\x00"
_CREATED_WITHIN_S: Final = 4.0


def key_value(message: pb.KeyValue) -> KeyValue:
    """Return etcd's key as the store's interface has it."""
    return KeyValue(message.key.decode(), message.value, message.create_revision, message.mod_revision, message.lease)


def first_key(prefix: bytes) -> bytes:
    """Return where a range over a prefix begins; etcd has no empty key."""
    return prefix or ALL_KEYS


def end_key(prefix: bytes) -> bytes:
    """Return where a range over a prefix ends, in etcd's way of saying "nowhere"."""
    return range_end(prefix) or ALL_KEYS


class EtcdFollower:
    """One watch over a prefix; `batches` is to be run once."""

    def __init__(self, client: EtcdClient, prefix: bytes, *, revision: int) -> None:
        """Begin with the changes of `revision`."""
        self._client = client
        self._prefix = prefix
        self._next_revision = revision
        self._failed_attempts = 0
        self._refused_before = False
        # Events of a revision of which etcd may have more to send.
        self._unfinished: list[pb.Event] = []

    async def batches(self) -> AsyncGenerator[WatchBatch, None]:
        """Yield one batch a revision; end when etcd no longer has the next one (compacted) or the client is closed.

        Raises:
            HoldfastError: DENIED.
        """
        while not self._client.closed:
            self._unfinished = []
            try:
                async with self._client.watch_stream() as stream:
                    await self._begin(stream)
                    while (response := await _read(stream)) is not None:
                        for batch in self._take(response):
                            yield batch
                    return
            except EtcdError as error:
                if error.code is ErrorCode.DENIED:
                    raise
            await self._client.pause(self._failed_attempts)
            self._failed_attempts += 1

    async def _begin(self, stream: WatchStream) -> None:
        request = pb.WatchCreateRequest(
            key=first_key(self._prefix),
            range_end=end_key(self._prefix),
            start_revision=self._next_revision,
            fragment=True,
        )
        # A stream that was cancelled before it had begun never says so: it would wait for the whole time.
        response = await self._client.until_closed(_create(stream, pb.WatchRequest(create_request=request)))
        if response is grpc.aio.EOF or not response.created:
            raise EtcdError(RpcFailure.UNAVAILABLE, "etcd did not begin the watch")
        if response.canceled:
            await self._after_refusal(response.cancel_reason)
        self._failed_attempts = 0
        self._refused_before = False

    async def _after_refusal(self, reason: str) -> None:
        # etcd gives the reason as text only. The one that passes with a new login is a token that has expired.
        if self._refused_before:
            raise EtcdError(RpcFailure.PERMISSION_DENIED, f"etcd refuses the watch: {reason}")
        self._refused_before = True
        await self._client.renew_login()
        raise EtcdError(RpcFailure.UNAVAILABLE, f"etcd refused the watch: {reason}")

    def _take(self, response: pb.WatchResponse) -> list[WatchBatch]:
        """Return the batches that the response completes, and move the position behind them."""
        events = [*self._unfinished, *response.events]
        self._unfinished = []
        if response.fragment and events:
            last_revision = events[-1].kv.mod_revision
            self._unfinished = [event for event in events if event.kv.mod_revision == last_revision]
            events = events[: len(events) - len(self._unfinished)]
        batches = [_batch(revision, group) for revision, group in groupby(events, lambda event: event.kv.mod_revision)]
        if batches:
            self._next_revision = batches[-1].revision + 1
        return batches


async def _create(stream: WatchStream, request: pb.WatchRequest) -> Any:
    try:
        async with asyncio.timeout(_CREATED_WITHIN_S):
            return await exchange(stream, request)
    except TimeoutError:
        raise EtcdError(RpcFailure.DEADLINE, "etcd did not begin the watch in time") from None


async def _read(stream: WatchStream) -> pb.WatchResponse | None:
    """Return the next response; None if the watch was cancelled because its next revision is compacted.

    Such a response has revision 0 in its header and leaves the stream open: only `compact_revision` tells.
    """
    response: Any = await stream.read()
    if response is grpc.aio.EOF:
        raise EtcdError(RpcFailure.UNAVAILABLE, "etcd ended the watch's stream")
    if response.canceled:
        if response.compact_revision:
            return None
        raise EtcdError(RpcFailure.UNAVAILABLE, f"etcd ended the watch: {response.cancel_reason}")
    return response  # type: ignore[no-any-return]


def _batch(revision: int, events: Iterable[pb.Event]) -> WatchBatch:
    puts: list[KeyValue] = []
    deletes: list[str] = []
    for event in events:
        if event.type == pb.Event.DELETE:
            deletes.append(event.kv.key.decode())
        else:
            puts.append(key_value(event.kv))
    return WatchBatch(revision, tuple(puts), tuple(deletes))
