"""Processes of the simulated world, and the one place that knows which of them live.

A process that crashes never does anything again: whatever its tasks wait for never comes, and what they touch on their
way there refuses them. Its name may be taken by a new process, which knows only what a disk kept.
"""

from __future__ import annotations

import asyncio
import random
import traceback
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from holdfast_core.model.errors import HoldfastError
from tests.sim.clocks import SimClock
from tests.sim.loop import SimLoop
from tests.sim.trace import Trace

T = TypeVar("T")
Handler = Callable[[Any, str], Coroutine[Any, Any, Any]]
"""Serves one request of a caller with this name."""


class Expected(Exception):
    """What a simulated actor raises and nobody has to wonder about."""


class World:
    """What all parts of one history share."""

    def __init__(self, loop: SimLoop, seed: int, trace: Trace) -> None:
        """Begin empty."""
        self.loop = loop
        self.seed = seed
        self.trace = trace
        self.processes: dict[str, Process] = {}
        self.over = False
        self.faults: list[str] = []

    def random(self, what: str) -> random.Random:
        """Return the source of randomness for one purpose; other purposes' draws do not change it."""
        return random.Random(f"{self.seed}/{what}")

    def note(self, who: str, what: str) -> None:
        """Write a line of the trace."""
        self.trace.note(self.loop.time(), who, what)

    def fault(self, who: str, error: BaseException) -> None:
        """Note an error that no part of the product may raise."""
        where = traceback.extract_tb(error.__traceback__)[-1:]
        self.faults.append(f"{who}: {error!r} at {where}")
        self.note(who, f"fault: {error!r}")

    def living(self, name: str) -> Process | None:
        """Return the process that has this name now, None while there is none."""
        process = self.processes.get(name)
        return process if process is not None and process.alive else None


class Process:
    """One process: its tasks, its clock, and what it serves."""

    def __init__(self, world: World, name: str, *, skew_ms: int = 0) -> None:
        """Take over the name."""
        self.world = world
        self.name = name
        self.alive = True
        self.clock = ProcessClock(self, skew_ms=skew_ms)
        self.handlers: dict[str, Handler] = {}
        world.processes[name] = self

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run something as a part of this process; an error that is none of ours is a fault of the program."""
        task = self.world.loop.create_task(work)
        task.add_done_callback(self._look)
        return task

    def crash(self) -> None:
        """End it here and now."""
        self.alive = False
        self.world.note(self.name, "crashes")

    async def here(self) -> None:
        """Return if the process lives; never return otherwise."""
        if not self.alive:
            await self.nevermore()

    async def nevermore(self) -> None:
        """Wait for ever; end at once when the history is over."""
        if self.world.over:
            raise asyncio.CancelledError
        await self.world.loop.create_future()

    def check_alive(self) -> None:
        """Refuse a dead process what it does without waiting. Raises CancelledError."""
        if not self.alive:
            raise asyncio.CancelledError

    async def sleep(self, seconds: float) -> None:
        """Wait virtual seconds; a process that has crashed meanwhile never wakes up."""
        await asyncio.sleep(seconds)
        if not self.alive:
            await self.nevermore()

    def _look(self, task: asyncio.Task[Any]) -> None:
        if task.cancelled() or not self.alive:
            return
        error = task.exception()
        if isinstance(error, Exception) and not isinstance(error, HoldfastError | Expected):
            self.world.fault(self.name, error)


class ProcessClock(SimClock):
    """The clock of one process, which stands still for ever once the process is dead."""

    def __init__(self, process: Process, *, skew_ms: int) -> None:
        """Belong to the process."""
        super().__init__(process.world.loop, skew_ms=skew_ms)
        self._process = process

    async def sleep(self, seconds: float) -> None:
        """Wait virtual seconds."""
        await self._process.sleep(max(0.0, seconds))
