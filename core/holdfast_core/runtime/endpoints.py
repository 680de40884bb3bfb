"""Several coordinators as one: a call goes to the one that answered last, and on to the next when it does not answer.

Every coordinator call is idempotent (Begin carries a nonce, Commit answers with what exists), so sending the same
request again to another coordinator is always safe. Errors that a coordinator itself gives are the answer, but for
UNREACHABLE: one that is cut off from its metadata store says so, and another may not be.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TypeVar, cast

import grpc.aio
from google.protobuf.message import Message

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import RPC_TIMEOUT_S
from holdfast_core.runtime.channels import Channels
from holdfast_core.runtime.credentials import Credential
from holdfast_core.runtime.options import TlsFiles
from holdfast_core.runtime.requests import request_metadata
from holdfast_core.runtime.status import error_from_rpc, reaches_peer

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)


class Endpoints:
    """The coordinators that a client or node knows. Belongs to one event loop; made inside it.

    Attributes:
        addresses: HOST:PORT of each, in the order given.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        tls: TlsFiles | None = None,
        what: str = "coordinator",
        credential: Credential | None = None,
    ) -> None:
        """Open a channel to each address; nothing connects yet. `what` names the peers in messages.

        `credential` goes with every call; without one the caller is known by its certificate alone.

        Raises:
            HoldfastError: INVALID_ARGUMENT if there is no address or one may not be used (see `open_channel`).
        """
        if not addresses:
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"no {what} address was given; write HOST:PORT[,HOST:PORT]")
        self.addresses = tuple(dict.fromkeys(addresses))
        self._what = what
        self._credential = credential
        self._channels = Channels(tls)
        for address in self.addresses:
            self._channels.to(address)
        self._good = 0

    async def call(
        self,
        method: Callable[[grpc.aio.Channel], grpc.aio.UnaryUnaryMultiCallable[Request, Response]],
        request: Request,
        *,
        timeout_s: float = RPC_TIMEOUT_S,
    ) -> Response:
        """Call `method(channel)(request)` on the coordinator that answered last, else on the others, once each.

        `timeout_s` bounds each try. E.g. `await endpoints.call(lambda c: StateServiceStub(c).GetVm, request)`.

        Raises:
            HoldfastError: what the coordinator answered; UNREACHABLE if none of them answered.
        """
        metadata = self.metadata()
        failures: list[HoldfastError] = []
        start = self._good
        await self._channels.tidy()
        for step in range(len(self.addresses)):
            at = (start + step) % len(self.addresses)
            try:
                response = await method(self._channels.to(self.addresses[at]))(
                    request, timeout=timeout_s, metadata=metadata
                )
            except grpc.aio.AioRpcError as failure:
                error = error_from_rpc(failure, peer=f"{self._what} {self.addresses[at]}")
                if not _try_another(error):
                    self._good = at
                    raise error from failure
                failures.append(error)
            else:
                self._good = at
                return response
        raise self._none_answered(failures)

    async def stream(
        self,
        method: Callable[[grpc.aio.Channel], grpc.aio.UnaryStreamMultiCallable[Request, Response]],
        request: Request,
        *,
        timeout_s: float = RPC_TIMEOUT_S,
    ) -> AsyncGenerator[Response, None]:
        """Call `method(channel)(request)` and yield its answers; `timeout_s` bounds the wait for each of them.

        Another coordinator is asked only while nothing was yielded: what follows may depend on what came.

        Raises:
            HoldfastError: what the coordinator answered; UNREACHABLE if none of them answered, or the one that did
                broke off.
        """
        metadata = self.metadata()
        failures: list[HoldfastError] = []
        begun = False
        for _ in self.addresses:
            peer = f"{self._what} {self.addresses[self._good]}"
            call = method(self.channel())(request, metadata=metadata)
            try:
                while True:
                    async with asyncio.timeout(timeout_s):
                        answer = await call.read()
                    if answer is grpc.aio.EOF:
                        return
                    begun = True
                    yield cast("Response", answer)
            except grpc.aio.AioRpcError as failure:
                error = error_from_rpc(failure, peer=peer)
            except TimeoutError:
                error = HoldfastError(ErrorCode.UNREACHABLE, f"{peer} did not answer within {timeout_s:g} s")
            finally:
                call.cancel()
            if begun or not _try_another(error):
                raise error
            failures.append(error)
            self.advance()
        raise self._none_answered(failures)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return what goes with a call: the request's id and the credential; streams send it themselves.

        Raises:
            HoldfastError: UNAUTHENTICATED if the credential's file cannot be read.
        """
        return (*request_metadata(), *(self._credential.metadata() if self._credential is not None else ()))

    def channel(self) -> grpc.aio.Channel:
        """Return the channel of the coordinator that answered last, for streams; a failed stream calls `advance`."""
        return self._channels.to(self.addresses[self._good])

    def advance(self) -> None:
        """Make the next coordinator the one to use, after a stream to the present one broke."""
        self._good = (self._good + 1) % len(self.addresses)

    async def close(self) -> None:
        """Close all channels; calls in flight end as cancelled."""
        await self._channels.close()

    def _none_answered(self, failures: Sequence[HoldfastError]) -> HoldfastError:
        if len(failures) == 1:
            return failures[0]
        answered = [error for error in failures if reaches_peer(error)]
        if answered:
            return answered[0]
        listed = ", ".join(self.addresses)
        return HoldfastError(
            ErrorCode.UNREACHABLE,
            f"no {self._what} can be reached ({listed}); check that one runs and that the addresses are right",
            facts=failures[0].facts,
        )


def _try_another(error: HoldfastError) -> bool:
    """Whether another coordinator may do better: this one did not answer, or is itself cut off."""
    return error.code is ErrorCode.UNREACHABLE
