"""What every call of every service gets: a request id, a count, a log line, and errors by the status table.

One interceptor wraps the handler of each method once. Its work is per call, never per message: a stream's messages go
through the same `read` and `write` of gRPC as without it.

This is the one place that catches what no handler expected: the fault is logged with its traceback under the request
id, and the caller gets INTERNAL with that id.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from typing import Any, Final, Protocol, TypeAlias, TypeVar

import grpc
import grpc.aio

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.logs import Log
from holdfast_core.runtime.metrics import CallMetrics
from holdfast_core.runtime.requests import REQUEST_ID_KEY, enter_request
from holdfast_core.runtime.status import abort_with, status_name

Answer = TypeVar("Answer")
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
# Generic in its type stub only.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

# Calls that a cluster makes by itself all the time: their success is not worth a line an event.
_QUIET_METHODS: Final = frozenset({"Check", "Watch", "Heartbeat", "KeepAlive", "ServerReflectionInfo"})


# Services of gRPC itself (health, reflection): they tell nothing of anybody's state and ask for no credential.
_OPEN_PACKAGE: Final = "/grpc."


class Guard(Protocol):
    """Decides before a handler runs whether the call may be made, and after it whether its answer may leave."""

    def enter(self, method: str, context: Context) -> AbstractAsyncContextManager[None]:
        """Return the context that a call of `method` (/package.Service/Method) is served in.

        Entering or leaving it raises HoldfastError where the call or its answer is refused.
        """
        ...


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps handlers, and knows which calls are in flight.

    Endless calls (watches) are told apart: they do not end by themselves, so a drain ends them after the others.
    """

    def __init__(self, *, metrics: CallMetrics, log: Log, clock: Clock, guard: Guard | None = None) -> None:
        self._guard = guard
        self._metrics = metrics
        self._log = log
        self._clock = clock
        self._wrapped: dict[str, Handler] = {}
        self._endless_methods: set[str] = set()
        self._endless: set[asyncio.Task[Any]] = set()
        self._finite_count = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._ending = False

    def mark_endless(self, method: str) -> None:
        """Say that a call of `method` (/package.Service/Method) lasts until one side goes."""
        self._endless_methods.add(method)

    async def wait_idle(self) -> None:
        """Wait until no call but endless ones is in flight."""
        await self._idle.wait()

    def end_endless(self) -> None:
        """End all endless calls, present and new ones, with UNREACHABLE: their callers go to another server."""
        self._ending = True
        for task in self._endless:
            task.cancel()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Return the handler of the method, wrapped; None for a method that no service has: gRPC says so itself."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            return None
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            wrapped = self._wrapped[method] = self._wrap(method, handler)
        return wrapped

    def _wrap(self, method: str, handler: Handler) -> Handler:
        serializers = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if not handler.response_streaming:
            one: Any = handler.stream_unary if handler.request_streaming else handler.unary_unary

            async def answer(request: Any, context: Context) -> Any:
                return await self._run(method, context, lambda: one(request, context))

            if handler.request_streaming:
                return grpc.stream_unary_rpc_method_handler(answer, **serializers)
            return grpc.unary_unary_rpc_method_handler(answer, **serializers)

        many: Any = handler.stream_stream if handler.request_streaming else handler.unary_stream
        generates = inspect.isasyncgenfunction(many)

        async def stream(request: Any, context: Context) -> None:
            def work() -> Awaitable[None]:
                responses = many(request, context)
                return _send_all(responses, context) if generates else responses

            await self._run(method, context, work)

        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(stream, **serializers)
        return grpc.unary_stream_rpc_method_handler(stream, **serializers)

    async def _run(self, method: str, context: Context, work: Callable[[], Awaitable[Answer]]) -> Answer:
        """Let a call in and do its work; turn its errors into statuses; count and log its end, whatever it is."""
        request_id = enter_request(_received_id(context))
        context.set_trailing_metadata(((REQUEST_ID_KEY, request_id),))
        started_s = self._clock.monotonic_s()
        status = "CANCELLED"
        endless = method in self._endless_methods
        self._enter(endless)
        try:
            async with self._let_in(method, context):
                answer = await work()
            status = "OK"
            return answer
        except HoldfastError as error:
            status = status_name(error.code)
            self._log_refusal(method, error)
            await abort_with(context, error)
        except grpc.aio.AbortError:
            status = getattr(context.code(), "name", "UNKNOWN")
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not (endless and self._ending and task is not None):
                raise
            task.uncancel()
            status = status_name(ErrorCode.UNREACHABLE)
            await abort_with(context, HoldfastError(ErrorCode.UNREACHABLE, "this server is going down; ask another"))
        except Exception:  # noqa: BLE001  # the outermost frame of a call: logged with its traceback, answered INTERNAL
            status = status_name(ErrorCode.INTERNAL)
            self._log.exception("fault", method=method)
            message = f"a fault of Holdfast; the server's log has it under request {request_id}"
            await abort_with(context, HoldfastError(ErrorCode.INTERNAL, message, facts={"request_id": request_id}))
        finally:
            self._leave(endless)
            seconds = self._clock.monotonic_s() - started_s
            self._metrics.end(method, status=status, seconds=seconds)
            self._log_end(method, status, seconds, context)

    def _let_in(self, method: str, context: Context) -> AbstractAsyncContextManager[None]:
        if self._guard is None or method.startswith(_OPEN_PACKAGE):
            return nullcontext()
        return self._guard.enter(method, context)

    def _enter(self, endless: bool) -> None:
        self._metrics.begin()
        if not endless:
            self._finite_count += 1
            self._idle.clear()
            return
        task = asyncio.current_task()
        if task is not None:
            self._endless.add(task)
            if self._ending:
                task.cancel()

    def _leave(self, endless: bool) -> None:
        if not endless:
            self._finite_count -= 1
            if not self._finite_count:
                self._idle.set()
            return
        task = asyncio.current_task()
        if task is not None:
            self._endless.discard(task)

    def _log_refusal(self, method: str, error: HoldfastError) -> None:
        level = self._log.error if error.code is ErrorCode.INTERNAL else self._log.info
        level("refused", method=method, code=error.code.name, message=error.message)

    def _log_end(self, method: str, status: str, seconds: float, context: Context) -> None:
        quiet = status in ("OK", "CANCELLED") and method.rpartition("/")[2] in _QUIET_METHODS
        write = self._log.debug if quiet else self._log.info
        write("call", method=method, status=status, seconds=round(seconds, 6), peer=context.peer())


async def _send_all(responses: AsyncGenerator[Any, None], context: Context) -> None:
    """Send what a generator yields, as gRPC does for a handler that is one."""
    async with aclosing(responses):
        async for response in responses:
            await write_message(context, response)


async def write_message(context: Context, message: Any) -> None:
    """Write a message of a stream; one that is begun is written to its end, or to the call's, before a cancellation.

    gRPC takes no status while a message is under way. A call that failed at such a moment ended without one, and its
    client waited until its patience was over.

    Raises:
        grpc.aio.InternalError: the client is gone.
    """
    writing = asyncio.ensure_future(context.write(message))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait((writing,))
        if not writing.cancelled():
            writing.exception()  # that the client is gone changes nothing any more
        raise


def _received_id(context: Context) -> str | None:
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID_KEY and isinstance(value, str):
            return value
    return None
