"""Our own small client for etcd's v3 gRPC API: several endpoints, fail-over, TLS, password login.

It sends requests and knows about endpoints; what the requests mean is `etcd`'s business. Two ways to send:

* `call` is for what may be repeated: it goes on to the next endpoint until the deadline.
* `call_once` is for transactions. It may wait for an endpoint that is connected, and may log in anew after etcd refused
  the token, but it never sends again what may have arrived: the answer to a compare-and-swap that was applied and lost
  would be a "no" of its own making.

The client rotates over the endpoints by itself, one channel each, instead of one channel with gRPC's `round_robin`
(ADR 0012): only then does it know which member a failure came from, and each member's certificate is checked against
the name that it was reached by.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.channels import Channels
from holdfast_core.runtime.metadata.store import OUTCOME_FACT, OUTCOME_UNAPPLIED, OUTCOME_UNKNOWN
from holdfast_core.runtime.options import TlsFiles
from holdfast_core.runtime.status import RpcFailure, classify
from holdfast_proto.v1 import etcd_pb2 as pb

CALL_TIMEOUT_S: Final = 10.0
# A member that is stopped in its tracks or cut off keeps a call waiting; an election takes one to three seconds.
ATTEMPT_TIMEOUT_S: Final = 4.0
_PAUSE_S_MIN: Final = 0.05
_PAUSE_S_MAX: Final = 1.0
_PROBE_TIMEOUT_S: Final = 1.0

_T = TypeVar("_T")
_RequestT = TypeVar("_RequestT", bound=Message)
_ResponseT = TypeVar("_ResponseT", bound=Message)
_SentT = TypeVar("_SentT", bound=Message, contravariant=True)
_ReadT = TypeVar("_ReadT", bound=Message, covariant=True)
Headers: TypeAlias = tuple[tuple[str, str], ...]
WatchStream: TypeAlias = "grpc.aio.StreamStreamCall[pb.WatchRequest, pb.WatchResponse]"

# Failures that say nothing about the request: another member may well answer it.
_LOST: Final = frozenset(
    {
        RpcFailure.UNAVAILABLE,
        RpcFailure.DEADLINE,
        RpcFailure.CANCELLED,
        RpcFailure.UNKNOWN,
        RpcFailure.INTERNAL,
        RpcFailure.ABORTED,
        RpcFailure.DATA_LOSS,
    }
)

# etcd says these of a token that has expired or is older than the last change of its accounts. It checks before it
# applies, so the request can be sent again with a new token, whatever it was.
_TOKEN_REFUSED: Final = frozenset({RpcFailure.UNAUTHENTICATED, RpcFailure.INVALID_ARGUMENT})

_CODES: Final = {
    RpcFailure.INVALID_ARGUMENT: ErrorCode.INVALID_ARGUMENT,
    RpcFailure.NOT_FOUND: ErrorCode.NOT_FOUND,
    RpcFailure.PERMISSION_DENIED: ErrorCode.DENIED,
    RpcFailure.UNAUTHENTICATED: ErrorCode.DENIED,
    RpcFailure.RESOURCE_EXHAUSTED: ErrorCode.DISK_FULL,
    RpcFailure.FAILED_PRECONDITION: ErrorCode.CONFLICT,
    RpcFailure.OUT_OF_RANGE: ErrorCode.CONFLICT,
    RpcFailure.UNIMPLEMENTED: ErrorCode.INTERNAL,
}


def _told(address: str, failure: RpcFailure, details: str) -> str:
    """Return what a failure means, in words of ours where there is something that an operator has to do."""
    if failure is RpcFailure.RESOURCE_EXHAUSTED and "space exceeded" in details:
        return (
            f"the metadata store has no space left (etcd at {address}: {details}); compact and defragment it, then "
            "disarm its alarm"
        )
    return f"etcd at {address}: {details}"


class EtcdError(HoldfastError):
    """A call that failed, with the gRPC status it failed with."""

    def __init__(self, failure: RpcFailure, message: str, *, sent: bool = True) -> None:
        """Make the error that a caller of the metadata store sees; `sent`: whether the request may have left."""
        outcome = OUTCOME_UNKNOWN if sent and failure in _LOST else OUTCOME_UNAPPLIED
        super().__init__(_CODES.get(failure, ErrorCode.UNREACHABLE), message, facts={OUTCOME_FACT: outcome})
        self.failure = failure


@dataclass(frozen=True, slots=True)
class Login:
    """User name and password of etcd's own accounts."""

    user: str
    password: str

    def __repr__(self) -> str:
        return f"Login({self.user!r})"


class Method(Protocol[_SentT, _ReadT]):
    """A method of etcd that takes one message and gives one."""

    async def invoke(self, channel: grpc.aio.Channel, request: _SentT, *, headers: Headers, timeout_s: float) -> _ReadT:
        """Send the request. Raises grpc.aio.AioRpcError."""


@dataclass(frozen=True, slots=True)
class Unary(Generic[_RequestT, _ResponseT]):
    """A plain method."""

    path: str
    parse: Callable[[bytes], _ResponseT]

    async def invoke(
        self, channel: grpc.aio.Channel, request: _RequestT, *, headers: Headers, timeout_s: float
    ) -> _ResponseT:
        """See `Method`."""
        multi: grpc.aio.UnaryUnaryMultiCallable[_RequestT, _ResponseT] = channel.unary_unary(
            self.path, request_serializer=_serialize, response_deserializer=self.parse
        )
        return await multi(request, metadata=headers, timeout=timeout_s)


async def exchange(stream: grpc.aio.StreamStreamCall[_RequestT, _ResponseT], request: _RequestT) -> Any:
    """Send one message and return the next one, or `grpc.aio.EOF`. Raises grpc.aio.AioRpcError."""
    # On a call that has ended already, `write` raises this; `read` then raises what the call ended with.
    with suppress(asyncio.InvalidStateError):
        await stream.write(request)
    return await stream.read()


@dataclass(frozen=True, slots=True)
class Exchange(Generic[_RequestT, _ResponseT]):
    """A method with streams both ways, of which one message each is used."""

    path: str
    parse: Callable[[bytes], _ResponseT]

    async def invoke(
        self, channel: grpc.aio.Channel, request: _RequestT, *, headers: Headers, timeout_s: float
    ) -> _ResponseT:
        """See `Method`."""
        multi: grpc.aio.StreamStreamMultiCallable[_RequestT, _ResponseT] = channel.stream_stream(
            self.path, request_serializer=_serialize, response_deserializer=self.parse
        )
        stream = multi(metadata=headers, timeout=timeout_s)
        try:
            response: Any = await exchange(stream, request)
        finally:
            stream.cancel()
        if response is grpc.aio.EOF:
            raise EtcdError(RpcFailure.UNAVAILABLE, f"etcd ended {self.path} without an answer")
        return response  # type: ignore[no-any-return]


AUTHENTICATE: Final[Unary[pb.AuthenticateRequest, pb.AuthenticateResponse]] = Unary(
    "/etcdserverpb.Auth/Authenticate", pb.AuthenticateResponse.FromString
)
# Any method that etcd answers without quorum or login would do; the answer is not looked at.
_STATUS: Final[Unary[pb.AuthenticateRequest, pb.AuthenticateResponse]] = Unary(
    "/etcdserverpb.Maintenance/Status", lambda _: pb.AuthenticateResponse()
)
_WATCH_PATH: Final = "/etcdserverpb.Watch/Watch"
# The member shall end the stream when it loses its leader; cut off from the others it would stay silent for ever.
_REQUIRE_LEADER: Final = ("hasleader", "true")


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


@dataclass(frozen=True, slots=True)
class _Endpoint:
    address: str
    channels: Channels

    @property
    def channel(self) -> grpc.aio.Channel:
        """The channel to it, opened anew where the TLS files have changed."""
        return self.channels.to(self.address)


class EtcdClient:
    """Connections to the members of one etcd cluster."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        tls: TlsFiles | None = None,
        login: Login | None = None,
        call_timeout_s: float = CALL_TIMEOUT_S,
        attempt_timeout_s: float = ATTEMPT_TIMEOUT_S,
    ) -> None:
        """Open a channel to each endpoint (HOST:PORT); they connect when first used.

        Raises:
            HoldfastError: INVALID_ARGUMENT for no or a malformed endpoint, or TLS files that cannot be used.
        """
        if not endpoints:
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "no etcd endpoint was given")
        self._channels = Channels(tls)
        self._endpoints = [_Endpoint(address, self._channels) for address in dict.fromkeys(endpoints)]
        for endpoint in self._endpoints:
            self._channels.to(endpoint.address)
        self._login = login
        self._call_timeout_s = call_timeout_s
        self._attempt_timeout_s = attempt_timeout_s
        self._first = 0
        self._token: str | None = None
        self._logging_in = asyncio.Lock()
        self._closed = asyncio.Event()
        self._streams: set[WatchStream] = set()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed.is_set()

    async def close(self) -> None:
        """End all watches and close all channels; other calls under way end within their deadlines."""
        self._closed.set()
        # Closing a channel does not reach a stream that some generator waits for.
        for stream in self._streams:
            stream.cancel()
        await self._channels.close()

    async def pause(self, attempts: int) -> None:
        """Wait before the next try after `attempts` failed ones; ends early when the client is closed."""
        pause_s = min(_PAUSE_S_MIN * 2**attempts, _PAUSE_S_MAX) if attempts < 16 else _PAUSE_S_MAX
        try:
            await asyncio.wait_for(self._closed.wait(), pause_s)
        except TimeoutError:
            return

    async def until_closed(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run `work`, but give it up with an EtcdError when the client is closed meanwhile."""
        task, closing = asyncio.create_task(work), asyncio.create_task(self._closed.wait())
        try:
            await asyncio.wait([task, closing], return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise EtcdError(RpcFailure.CANCELLED, "the metadata store is closed")
        finally:
            task.cancel()
            closing.cancel()
            await asyncio.wait([task, closing])

    async def call(self, method: Method[_RequestT, _ResponseT], request: _RequestT) -> _ResponseT:
        """Send a request that may be repeated, to one endpoint after the other until the deadline.

        Raises:
            EtcdError: refused, or nobody answered in time.
        """
        deadline_s = self._deadline_s()
        attempts = 0
        while True:
            try:
                return await self._attempt(method, request, deadline_s, timeout_s=self._attempt_timeout_s)
            except EtcdError as error:
                attempts += 1
                if error.failure not in _LOST or self._left_s(deadline_s) <= _PAUSE_S_MAX or self.closed:
                    raise
                if attempts >= len(self._endpoints):
                    await self.pause(attempts - len(self._endpoints))

    async def call_once(self, method: Method[_RequestT, _ResponseT], request: _RequestT) -> _ResponseT:
        """Send a request that must not be repeated, to one endpoint.

        Raises:
            EtcdError: as `call`; its fact `outcome` says whether the request may have been applied.
        """
        return await self._attempt(method, request, self._deadline_s(), timeout_s=self._call_timeout_s)

    @asynccontextmanager
    async def watch_stream(self) -> AsyncIterator[WatchStream]:
        """Open a stream of watches on one endpoint.

        Raises:
            EtcdError: what the stream's use failed with, too.
        """
        deadline_s = self._deadline_s()
        endpoint = await self._connected(deadline_s)
        headers = (*await self._headers(deadline_s), _REQUIRE_LEADER)
        multi: grpc.aio.StreamStreamMultiCallable[pb.WatchRequest, pb.WatchResponse] = endpoint.channel.stream_stream(
            _WATCH_PATH, request_serializer=_serialize, response_deserializer=pb.WatchResponse.FromString
        )
        stream = multi(metadata=headers)
        self._streams.add(stream)
        try:
            with self._translated(endpoint):
                yield stream
        finally:
            self._streams.discard(stream)
            stream.cancel()

    async def renew_login(self) -> None:
        """Log in anew, because etcd refused a watch in a way that an expired token explains.

        Raises:
            HoldfastError: DENIED without a login or with a wrong one; UNREACHABLE.
        """
        if self._login is None:
            raise EtcdError(RpcFailure.PERMISSION_DENIED, "etcd refuses the watch; it wants a user and a password")
        await self._log_in(self._token, self._deadline_s())

    async def _attempt(
        self, method: Method[_RequestT, _ResponseT], request: _RequestT, deadline_s: float, *, timeout_s: float
    ) -> _ResponseT:
        await self._channels.tidy()
        endpoint = await self._connected(deadline_s)
        headers = await self._headers(deadline_s)
        token = self._token
        timeout_s = min(timeout_s, self._left_s(deadline_s))
        try:
            return await self._send(endpoint, method, request, headers=headers, timeout_s=timeout_s)
        except EtcdError as error:
            if self._login is None or error.failure not in _TOKEN_REFUSED:
                raise
        await self._log_in(token, deadline_s)
        headers = await self._headers(deadline_s)
        return await self._send(endpoint, method, request, headers=headers, timeout_s=timeout_s)

    async def _send(
        self,
        endpoint: _Endpoint,
        method: Method[_RequestT, _ResponseT],
        request: _RequestT,
        *,
        headers: Headers,
        timeout_s: float,
    ) -> _ResponseT:
        with self._translated(endpoint):
            return await method.invoke(endpoint.channel, request, headers=headers, timeout_s=timeout_s)

    @contextmanager
    def _translated(self, endpoint: _Endpoint) -> Iterator[None]:
        """Turn what gRPC raises into `EtcdError`, and away from an endpoint that does not answer."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            failure = classify(error)
            if failure in _LOST:
                self._turn_from(endpoint)
            raise EtcdError(failure, _told(endpoint.address, failure, error.details() or failure.value)) from error
        except asyncio.CancelledError:
            # `close` cancels streams, which must not look as if somebody had cancelled the task that reads them.
            task = asyncio.current_task()
            if not self.closed or (task is not None and task.cancelling()):
                raise
            raise EtcdError(RpcFailure.CANCELLED, "the metadata store is closed") from None

    async def _connected(self, deadline_s: float) -> _Endpoint:
        """Return the first connected endpoint, from the one that served last; else wait until any is connected."""
        if self.closed:
            raise EtcdError(RpcFailure.UNAVAILABLE, "the metadata store is closed", sent=False)
        in_turn = self._endpoints[self._first :] + self._endpoints[: self._first]
        for endpoint in in_turn:
            if endpoint.channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY:
                self._first = self._endpoints.index(endpoint)
                return endpoint
        waits = [asyncio.create_task(endpoint.channel.channel_ready()) for endpoint in in_turn]
        closing = asyncio.create_task(self._closed.wait())
        try:
            await asyncio.wait([*waits, closing], timeout=self._left_s(deadline_s), return_when=asyncio.FIRST_COMPLETED)
            ready = [endpoint for endpoint, wait in zip(in_turn, waits, strict=True) if wait.done()]
        finally:
            for wait in (*waits, closing):
                wait.cancel()
            await asyncio.wait([*waits, closing])
        if self.closed:
            raise EtcdError(RpcFailure.UNAVAILABLE, "the metadata store is closed", sent=False)
        if not ready:
            raise EtcdError(RpcFailure.UNAVAILABLE, await self._why_unreachable(), sent=False)
        self._first = self._endpoints.index(ready[0])
        return ready[0]

    async def _why_unreachable(self) -> str:
        """Return a sentence with what gRPC says of each endpoint; only a call's failure tells, e.g. of certificates."""
        reasons = []
        for endpoint in self._endpoints:
            try:
                await _STATUS.invoke(endpoint.channel, pb.AuthenticateRequest(), headers=(), timeout_s=_PROBE_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                reasons.append(f"{endpoint.address}: {error.details()}")
            else:
                reasons.append(f"{endpoint.address}: came up too late")
        return (
            f"no etcd member answered within {self._call_timeout_s:.0f} s; check that etcd runs, its addresses and its"
            f" certificates ({'; '.join(reasons)})"
        )

    def _turn_from(self, endpoint: _Endpoint) -> None:
        position = self._endpoints.index(endpoint)
        if position == self._first:
            self._first = (position + 1) % len(self._endpoints)

    async def _headers(self, deadline_s: float) -> Headers:
        if self._login is None:
            return ()
        if self._token is None:
            await self._log_in(None, deadline_s)
        return (("token", self._token),) if self._token else ()

    async def _log_in(self, stale: str | None, deadline_s: float) -> None:
        """Get a token, unless somebody has replaced the stale one already; an empty one where etcd wants no login."""
        login = self._login
        if login is None:
            return
        async with self._logging_in:
            if self._token != stale:
                return
            request = pb.AuthenticateRequest(name=login.user, password=login.password)
            endpoint = await self._connected(deadline_s)
            timeout_s = min(self._attempt_timeout_s, self._left_s(deadline_s))
            try:
                answer = await self._send(endpoint, AUTHENTICATE, request, headers=(), timeout_s=timeout_s)
            except EtcdError as error:
                if error.failure is RpcFailure.FAILED_PRECONDITION:
                    self._token = ""  # Accounts are not enabled, and every call is allowed.
                    return
                if error.failure is RpcFailure.INVALID_ARGUMENT:
                    raise EtcdError(
                        RpcFailure.UNAUTHENTICATED, f"etcd does not accept user {login.user!r} with this password"
                    ) from error
                error.facts[OUTCOME_FACT] = OUTCOME_UNAPPLIED
                raise
            self._token = answer.token

    def _deadline_s(self) -> float:
        # Deadlines of calls on the wire are on the real clock, as gRPC's own are.
        return asyncio.get_running_loop().time() + self._call_timeout_s

    @staticmethod
    def _left_s(deadline_s: float) -> float:
        return max(0.0, deadline_s - asyncio.get_running_loop().time())
