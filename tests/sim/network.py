"""Messages between processes: late, lost, doubled, out of order, and cut off one way or both."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Any, Final

from holdfast_core.model.errors import ErrorCode, HoldfastError
from tests.sim.world import Process, World

METADATA: Final = "metadata"
"""The name of the metadata store, for cuts."""

_NOTICED_S: Final = 5.0


class Unheard(HoldfastError):
    """Nobody answered: what was asked may have been done, may yet be, or never will."""

    def __init__(self, target: str, why: str) -> None:
        """Say who did not answer."""
        super().__init__(ErrorCode.UNREACHABLE, f"{target} {why}", facts={"node_id": target})


@dataclass(slots=True, kw_only=True)
class Weather:
    """How the network is at the moment.

    Attributes:
        loss: share of messages that are lost.
        slow: share of messages that take seconds.
        doubled: share of repeatable requests that arrive twice.
        latency_s: what a message takes at most, if it is not slow.
        slow_s: what a slow one takes at most.
    """

    loss: float = 0.0
    slow: float = 0.0
    doubled: float = 0.0
    latency_s: float = 0.004
    slow_s: float = 3.0


Gate = Callable[[str, str, str, Any], Awaitable[None]]
"""Holds a request (source, target, method, what) back where it arrives, until it returns; for scripted races."""


class Network:
    """All links of one world."""

    def __init__(self, world: World) -> None:
        """Begin with fair weather."""
        self._world = world
        self._random = world.random("network")
        self.weather = Weather()
        self._cuts: set[tuple[str, str]] = set()
        self._served: dict[asyncio.Future[Any], list[tuple[Process, asyncio.Task[None]]]] = {}
        self.gate: Gate | None = None
        self.messages = 0

    def cut(self, sources: Collection[str], targets: Collection[str]) -> None:
        """Lose everything from the sources to the targets from now on; not the other way."""
        self._cuts.update((source, target) for source in sources for target in targets if source != target)

    def heal(self) -> None:
        """Undo every cut."""
        self._cuts.clear()

    def is_cut(self, source: str, target: str) -> bool:
        """Whether messages from here to there are lost."""
        return (source, target) in self._cuts

    def delay_s(self) -> float:
        """Draw what one message takes."""
        weather = self.weather
        if weather.slow and self._random.random() < weather.slow:
            return self._random.uniform(weather.latency_s, weather.slow_s)
        return self._random.uniform(0.0002, weather.latency_s)

    def lost(self, source: str, target: str) -> bool:
        """Draw whether a message sent now is lost."""
        if (source, target) in self._cuts:
            return True
        return bool(self.weather.loss) and self._random.random() < self.weather.loss

    @property
    def random(self) -> random.Random:
        """What links draw from."""
        return self._random

    async def call(
        self, source: Process, target: str, method: str, request: Any, *, timeout_s: float, repeatable: bool = False
    ) -> Any:
        """Ask another process; return its answer.

        The caller may give up, or hear nothing, and the request be served all the same, even later.

        Raises:
            HoldfastError: what the other said; UNREACHABLE where nothing came within `timeout_s`.
        """
        await source.here()
        reply: asyncio.Future[Any] = self._world.loop.create_future()
        copies = 2 if repeatable and self.weather.doubled and self._random.random() < self.weather.doubled else 1
        for _ in range(copies):
            self._send(source, target, method, request, reply)
        timer = self._world.loop.call_later(timeout_s, _give_up, source, target, timeout_s, reply)
        try:
            answer = await reply
        finally:
            timer.cancel()
            self._let_go(source, target, reply)
        if isinstance(answer, Unheard):
            raise answer
        if isinstance(answer, HoldfastError):
            # Each caller raises its own.
            raise HoldfastError(answer.code, answer.message, facts=answer.facts, block_ids=answer.block_ids)
        return answer

    def _send(self, source: Process, target: str, method: str, request: Any, reply: asyncio.Future[Any]) -> None:
        self.messages += 1
        if self.lost(source.name, target):
            self._break(source, target, reply)
            return
        self._world.loop.call_later(self.delay_s(), self._arrive, source, target, method, request, reply)

    def _arrive(self, source: Process, target: str, method: str, request: Any, reply: asyncio.Future[Any]) -> None:
        process = self._world.living(target)
        if (source.name, target) in self._cuts:
            return
        if process is None or method not in process.handlers:
            # Nobody listens there: the caller's machine is told so at once.
            self._world.loop.call_later(self.delay_s(), _answer, source, reply, Unheard(target, "refuses connections"))
            return
        serving = process.spawn(self._serve(process, source, method, request, reply))
        if not reply.done():
            self._served.setdefault(reply, []).append((process, serving))

    async def _serve(
        self, process: Process, source: Process, method: str, request: Any, reply: asyncio.Future[Any]
    ) -> None:
        answer: Any
        if self.gate is not None:
            await self.gate(source.name, process.name, method, request)
            await process.here()
        try:
            answer = await process.handlers[method](request, source.name)
        except HoldfastError as error:
            answer = error
        if self.lost(process.name, source.name):
            self._break(source, process.name, reply)
        elif process.alive:
            self._world.loop.call_later(self.delay_s(), _answer, source, reply, answer)

    def _let_go(self, source: Process, target: str, reply: asyncio.Future[Any]) -> None:
        """End what still serves a caller who does not listen any more, as gRPC does; now and then it goes on."""
        served = self._served.pop(reply, None)
        if served is None or not source.alive or self._random.random() < 0.5 or self.lost(source.name, target):
            return
        for process, serving in served:
            if not serving.done():
                self._world.loop.call_later(self.delay_s(), _cancel, process, serving)

    def _break(self, source: Process, target: str, reply: asyncio.Future[Any]) -> None:
        """Let a caller notice after a while that its connection is gone, as keep-alives do."""
        noticed_s = self._random.uniform(0.1, _NOTICED_S)
        self._world.loop.call_later(noticed_s, _answer, source, reply, Unheard(target, "dropped the connection"))


def _cancel(process: Process, serving: asyncio.Task[None]) -> None:
    if process.alive:
        serving.cancel()


def _answer(source: Process, reply: asyncio.Future[Any], answer: Any) -> None:
    if source.alive and not reply.done():
        reply.set_result(answer)


def _give_up(source: Process, target: str, timeout_s: float, reply: asyncio.Future[Any]) -> None:
    _answer(source, reply, Unheard(target, f"did not answer within {timeout_s:g} s"))
