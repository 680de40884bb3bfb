"""The life of a session: begun, kept alive, then committed or aborted. Leaves no session behind that it can end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Final, TypeVar

from holdfast.access import Access
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.endpoints import Endpoints
from holdfast_proto.v1.state_pb2 import AbortSessionRequest, KeepAliveRequest
from holdfast_proto.v1.state_pb2_grpc import StateServiceStub

COMMIT_TIMEOUT_S: Final = 300.0
_COMMIT_TRIES: Final = 5
_COMMIT_PAUSE_S: Final = 0.5
_ABORT_TIMEOUT_S: Final = 5.0
_KEEP_ALIVES_A_TTL: Final = 3

Answer = TypeVar("Answer")


class Session(AbstractAsyncContextManager["Session"]):
    """An open session. Inside the context it is kept alive; losing it cancels the body with SESSION_LAPSED.

    Leaving the context without `commit` having succeeded aborts the session.
    """

    def __init__(self, endpoints: Endpoints, access: Access, session_id: str, *, ttl_ms: int, clock: Clock) -> None:
        """Take over a session that Begin has just opened."""
        self.session_id = session_id
        self.access = access
        self._endpoints = endpoints
        self._clock = clock
        self._ttl_s = ttl_ms / 1000
        self._committing = False
        self._committed = False
        self._group = plain_task_group()
        self._keeper: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Session:
        """Begin to keep the session alive."""
        group = await self._group.__aenter__()
        self._keeper = group.create_task(self._keep())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Stop keeping it alive, and abort it unless it was committed."""
        if self._keeper is not None:
            self._keeper.cancel()
        try:
            await self._group.__aexit__(kind, error, trace)  # type: ignore[arg-type]
        finally:
            if not self._committed:
                await asyncio.shield(self._abort())

    async def commit(self, call: Callable[[], Awaitable[Answer]]) -> Answer:
        """Run the commit call until it is answered; a commit is idempotent, so what got lost is asked again.

        Raises:
            HoldfastError: what the coordinator says; UNREACHABLE if none answers for a while.
        """
        self._committing = True
        for attempt in range(1, _COMMIT_TRIES + 1):
            try:
                answer = await call()
                self._committed = True
                return answer
            except HoldfastError as error:
                again = error.code in (ErrorCode.UNREACHABLE, ErrorCode.CONFLICT, ErrorCode.NOT_READY)
                if not again or attempt == _COMMIT_TRIES:
                    raise
                await self._clock.sleep(_COMMIT_PAUSE_S * attempt)
        raise AssertionError("the loop returns or raises")

    async def _keep(self) -> None:
        """Renew the lease at a third of its life; give up when it must have ended."""
        kept_s = self._clock.monotonic_s()
        while True:
            await self._clock.sleep(self._ttl_s / _KEEP_ALIVES_A_TTL)
            try:
                answer = await self._endpoints.call(
                    lambda channel: StateServiceStub(channel).KeepAlive,
                    KeepAliveRequest(session_id=self.session_id),
                    timeout_s=self._ttl_s / _KEEP_ALIVES_A_TTL,
                )
            except HoldfastError as error:
                if self._committing:
                    return  # the commit's own answer decides; a session that it has ended is no loss
                if error.code is not ErrorCode.UNREACHABLE:
                    raise
                if self._clock.monotonic_s() - kept_s > self._ttl_s:
                    raise
                continue
            kept_s = self._clock.monotonic_s()
            if answer.capability:
                self.access.renewed(answer.capability, answer.capability_expires_unix_ms)

    async def _abort(self) -> None:
        await abort(self._endpoints, self.session_id)


async def abort(endpoints: Endpoints, session_id: str) -> None:
    """Abort a session if a coordinator can be reached; raises nothing, since the lease ends it otherwise."""
    try:
        await endpoints.call(
            lambda channel: StateServiceStub(channel).AbortSession,
            AbortSessionRequest(session_id=session_id),
            timeout_s=_ABORT_TIMEOUT_S,
        )
    except HoldfastError:
        # The error that ended the session is the one to tell.
        return
