"""gRPC's calls over the simulated network: generated stubs on one end, the product's servicers on the other.

Messages are serialised, errors travel as statuses with their details, and a call that hears nothing fails as gRPC says
it. A stream of answers arrives as a whole; a stream of requests goes one by one, each a call of its own.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, Protocol

import grpc.aio

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.status import ERROR_METADATA_KEY, STATUS_BY_CODE, detail_from_error
from tests.sim.network import Network, Unheard
from tests.sim.world import Process

RPC: Final = "rpc"
_TIMEOUT_S: Final = 30.0
# What may arrive twice without meaning something else: gRPC itself sends a call again that no server has taken up.
_REPEATABLE: Final = ("HasBlocks", "GetBlocks", "PutBlocks", "ConfirmBlocks", "HandBlocks", "DeleteBlocks")


@dataclass(frozen=True, slots=True)
class Request:
    """A call under way: its path, its messages, and what goes with it."""

    path: str
    messages: tuple[bytes, ...]
    metadata: tuple[tuple[str, str], ...]


class Guard(Protocol):
    """As `holdfast_core.runtime.calls.Guard`."""

    def enter(self, method: str, context: Any) -> AbstractAsyncContextManager[None]:
        """Return the context that a call is served in."""
        ...


class SimContext:
    """What a servicer sees of its caller."""

    def __init__(self, request: Request, source: str) -> None:
        """Belong to one call."""
        self._request = request
        self._source = source
        self.written: list[Any] = []

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """Return what came with the call."""
        return self._request.metadata

    def peer(self) -> str:
        """Name the other side as a local one, to which keys may be released."""
        return f"unix:{self._source}"

    def auth_context(self) -> dict[str, list[bytes]]:
        """Say that no certificate came with the call."""
        return {}

    async def write(self, message: Any) -> None:
        """Add to the stream of answers."""
        self.written.append(message)


class SimServer:
    """Takes the handlers of generated code, and serves a process with them."""

    def __init__(self, process: Process, guard: Guard | None = None) -> None:
        """Serve what is added from `start` on."""
        self._process = process
        self._guard = guard
        self._handlers: dict[str, Any] = {}

    def add(
        self,
        register: Callable[[Any, Any], None],
        servicer: object,
        full_service_name: str,
        *,
        endless_methods: Sequence[str] = (),
    ) -> None:
        """Add a service, as `ServiceHost.add`."""
        register(servicer, self)

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Leave aside: the same come once more by name."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """Take the handlers of one service."""
        self._handlers.update({f"/{service}/{name}": handler for name, handler in handlers.items()})

    def start(self) -> None:
        """Listen."""
        self._process.handlers[RPC] = self._serve

    async def _serve(self, request: Request, source: str) -> tuple[bytes, ...]:
        handler = self._handlers.get(request.path)
        if handler is None:
            raise HoldfastError(ErrorCode.INTERNAL, f"{self._process.name} does not offer {request.path}")
        context = SimContext(request, source)
        entered: AbstractAsyncContextManager[None] = (
            nullcontext() if self._guard is None else self._guard.enter(request.path, context)
        )
        async with entered:
            answers = await _handle(handler, request, context)
        serialise = handler.response_serializer
        return tuple(bytes(serialise(answer)) for answer in answers)


async def _handle(handler: Any, request: Request, context: SimContext) -> list[Any]:
    messages = [handler.request_deserializer(message) for message in request.messages]
    argument = _each(messages) if handler.request_streaming else messages[0]
    if not handler.response_streaming:
        one = handler.stream_unary if handler.request_streaming else handler.unary_unary
        return [await one(argument, context)]
    many = handler.stream_stream if handler.request_streaming else handler.unary_stream
    made = many(argument, context)
    if inspect.isasyncgen(made):
        return [answer async for answer in made]
    await made
    return context.written


async def _each(messages: Iterable[Any]) -> AsyncIterator[Any]:
    for message in messages:
        yield message


class SimChannel:
    """A channel from one process to another."""

    def __init__(self, source: Process, target: str, network: Network) -> None:
        """Nothing connects yet."""
        self._source = source
        self._target = target
        self._network = network

    def unary_unary(
        self, path: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Callable[..., Awaitable[Any]]:
        """See `grpc.aio.Channel`."""

        async def call(request: Any, *, timeout: float | None = None, metadata: Any = None, **_: Any) -> Any:
            answers = await self.exchange(path, request_serializer(request), metadata, timeout)
            return response_deserializer(answers[0])

        return call

    def unary_stream(
        self, path: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Callable[..., SimStream]:
        """See `grpc.aio.Channel`."""

        def call(request: Any, *, timeout: float | None = None, metadata: Any = None, **_: Any) -> SimStream:
            stream = SimStream(self, path, request_serializer, response_deserializer, metadata, timeout)
            stream.asked.append(request_serializer(request))
            return stream

        return call

    def stream_stream(
        self, path: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Callable[..., SimStream]:
        """See `grpc.aio.Channel`."""

        def call(*, timeout: float | None = None, metadata: Any = None, **_: Any) -> SimStream:
            return SimStream(self, path, request_serializer, response_deserializer, metadata, timeout)

        return call

    async def close(self) -> None:
        """See `grpc.aio.Channel`."""

    async def exchange(self, path: str, message: bytes, metadata: Any, timeout_s: float | None) -> tuple[bytes, ...]:
        """Send one message and return what comes back.

        Raises:
            AioRpcError: as gRPC does.
        """
        request = Request(path, (message,), tuple(metadata or ()))
        repeatable = path.rpartition("/")[2] in _REPEATABLE
        try:
            answers: tuple[bytes, ...] = await self._network.call(
                self._source, self._target, RPC, request, timeout_s=timeout_s or _TIMEOUT_S, repeatable=repeatable
            )
        except HoldfastError as error:
            raise _rpc_error(error) from error
        return answers


class SimStream:
    """A call with a stream: what was asked goes out one by one, and is answered in turn."""

    def __init__(
        self, channel: SimChannel, path: str, serialise: Any, parse: Any, metadata: Any, timeout_s: float | None
    ) -> None:
        """Prepare."""
        self._channel = channel
        self._path = path
        self._serialise = serialise
        self._parse = parse
        self._metadata = metadata
        self._timeout_s = timeout_s
        self.asked: list[bytes] = []
        self._answers: list[bytes] = []

    async def write(self, request: Any) -> None:
        """See `grpc.aio.StreamStreamCall`."""
        self.asked.append(self._serialise(request))

    async def done_writing(self) -> None:
        """See `grpc.aio.StreamStreamCall`."""

    async def read(self) -> Any:
        """See `grpc.aio.UnaryStreamCall`."""
        while not self._answers:
            if not self.asked:
                return grpc.aio.EOF
            message = self.asked.pop(0)
            self._answers = list(await self._channel.exchange(self._path, message, self._metadata, self._timeout_s))
        return self._parse(self._answers.pop(0))

    def __aiter__(self) -> SimStream:
        """Return itself."""
        return self

    async def __anext__(self) -> Any:
        """Return the next answer."""
        answer = await self.read()
        if answer is grpc.aio.EOF:
            raise StopAsyncIteration
        return answer

    def cancel(self) -> bool:
        """See `grpc.aio.Call`; what is under way at the server goes on."""
        self.asked.clear()
        self._answers.clear()
        return True


class SimChannels:
    """Stands for `holdfast_core.runtime.channels.Channels`: addresses are process names with a port of no meaning."""

    def __init__(self, source: Process, network: Network) -> None:
        """Belong to one process."""
        self._source = source
        self._network = network
        self._open: dict[str, SimChannel] = {}

    def to(self, address: str) -> Any:
        """Return the channel to an address."""
        channel = self._open.get(address)
        if channel is None:
            channel = self._open[address] = SimChannel(self._source, name_of(address), self._network)
        return channel

    async def tidy(self) -> None:
        """See `Channels.tidy`."""

    async def close(self) -> None:
        """See `Channels.close`."""


def address_of(name: str) -> str:
    """Return the address of a process."""
    return f"{name}:7000"


def name_of(address: str) -> str:
    """Return the process that has an address."""
    return address.rpartition(":")[0]


def _rpc_error(error: HoldfastError) -> grpc.aio.AioRpcError:
    status = STATUS_BY_CODE[error.code]
    metadata = grpc.aio.Metadata()
    if not isinstance(error, Unheard):
        metadata.add(ERROR_METADATA_KEY, detail_from_error(error).SerializeToString())
    return grpc.aio.AioRpcError(status, grpc.aio.Metadata(), metadata, details=error.message)


def inject(owner: object, name: str, value: object) -> None:
    """Put a simulated part in the place of one that a product's object made for itself."""
    if not hasattr(owner, name):
        raise AttributeError(f"{owner!r} has no {name} to replace")
    setattr(owner, name, value)


async def turn() -> None:
    """Let everybody else go on for one turn of the loop."""
    await asyncio.sleep(0)
