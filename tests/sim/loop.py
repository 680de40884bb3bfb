"""An event loop on virtual time: nothing waits, nothing runs beside it, and one seed decides every order.

Time moves only when nothing is ready, straight to the next deadline. What is ready at one moment runs in the order of
the tasks' births, whatever order it was made ready in (asyncio's own task groups cancel their tasks in the order of
memory addresses), or shuffled by the seed where that was asked for. Work for threads runs at once.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
import sys
import weakref
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context
from typing import Any, Final, TypeVar

T = TypeVar("T")

# Steps without any passing of time after which something spins.
_STEPS_AT_ONE_TIME_MAX: Final = 200_000


class Stuck(Exception):
    """The world cannot go on: nothing is ready and nothing waits for a time, or something spins without end."""


class _SimTask(asyncio.Task[T]):
    """A task that knows how many were born before it."""

    born: int


class SimLoop(asyncio.AbstractEventLoop):
    """The loop. `time()` is virtual seconds."""

    def __init__(self, *, shuffled: random.Random | None = None) -> None:
        """Begin at 0 s; `shuffled` decides the order of what is ready at one moment, births do where it is None."""
        self._now_s = 0.0
        self._ready: list[asyncio.Handle] = []
        self._scheduled: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._order = itertools.count()
        self._births = itertools.count(1)
        self._shuffled = shuffled
        self._running = False
        self._closed = False
        self._generators: weakref.WeakSet[Any] = weakref.WeakSet()
        self._tasks: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()
        self.steps = 0
        self.faults: list[dict[str, Any]] = []

    # What time and callbacks are.

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self._now_s

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        """Run the callback in the next round."""
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        """As `call_soon`: there is one thread."""
        return self.call_soon(callback, *args, context=context)

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Run the callback `delay` virtual seconds from now."""
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Run the callback at a virtual time."""
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._scheduled, (when, next(self._order), handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Nothing: a cancelled timer is passed over when its time comes."""

    # Futures, tasks, threads.

    def create_future(self) -> asyncio.Future[Any]:
        """Return a future of this loop."""
        return asyncio.Future(loop=self)

    def create_task(
        self,
        coro: Coroutine[Any, Any, T] | Generator[Any, None, T],
        *,
        name: str | None = None,
        context: Context | None = None,
    ) -> asyncio.Task[T]:
        """Return a task; its birth decides its turn."""
        born = next(self._births)
        task: _SimTask[T] = _SimTask(coro, loop=self, name=name or f"task-{born}", context=context)
        task.born = born
        self._tasks.add(task)
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """Run the function in the next round."""

        async def run() -> Any:
            return func(*args)

        return self.create_task(run())

    async def shutdown_default_executor(self) -> None:
        """There is none."""

    async def shutdown_asyncgens(self) -> None:
        """Close the asynchronous generators that were left open."""
        for generator in list(self._generators):
            await generator.aclose()

    # Running.

    def is_running(self) -> bool:
        """Whether it runs."""
        return self._running

    def is_closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def get_debug(self) -> bool:
        """Return False: asyncio's debug mode looks at the real clock."""
        return False

    def set_debug(self, enabled: bool) -> None:
        """Ignore it, as `get_debug` says."""

    def close(self) -> None:
        """Drop everything that waits."""
        self._closed = True
        self._ready.clear()
        self._scheduled.clear()

    def run_forever(self) -> None:
        """Not in this world: say what to wait for."""
        raise NotImplementedError

    def run_until_complete(self, future: Any) -> Any:
        """Run until the coroutine has ended; return its result.

        Raises:
            Stuck: nothing can make it end any more.
        """
        asyncio.set_event_loop(self)
        task = asyncio.ensure_future(future, loop=self)
        old_hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(firstiter=self._generators.add, finalizer=self._finalize)
        asyncio.events._set_running_loop(self)
        self._running = True
        try:
            at_one_time, before_s = 0, self._now_s
            while not task.done():
                self._round()
                at_one_time = at_one_time + 1 if self._now_s == before_s else 0
                before_s = self._now_s
                if at_one_time > _STEPS_AT_ONE_TIME_MAX:
                    raise Stuck(f"no time passes any more at {self._now_s:.3f} s")
        finally:
            self._running = False
            asyncio.events._set_running_loop(None)
            sys.set_asyncgen_hooks(*old_hooks)
            asyncio.set_event_loop(None)
        return task.result()

    def living_tasks(self) -> list[asyncio.Task[Any]]:
        """Return all tasks that have not ended, by birth."""
        return sorted((task for task in self._tasks if not task.done()), key=_birth)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Keep what nobody caught; the history that runs looks at it."""
        if isinstance(context.get("exception"), Exception):
            self.faults.append(context)

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        """As `call_exception_handler`."""
        self.call_exception_handler(context)

    def _finalize(self, generator: Any) -> None:
        if not self._closed:
            self.create_task(generator.aclose())

    def _round(self) -> None:
        """Run everything that is ready; where nothing is, let time pass to the next deadline first."""
        scheduled = self._scheduled
        if not self._ready:
            while scheduled and scheduled[0][2].cancelled():
                heapq.heappop(scheduled)
            if not scheduled:
                raise Stuck(f"nothing waits for anything at {self._now_s:.3f} s")
            self._now_s = max(self._now_s, scheduled[0][0])
        while scheduled and scheduled[0][0] <= self._now_s:
            timer = heapq.heappop(scheduled)[2]
            if not timer.cancelled():
                self._ready.append(timer)
        batch, self._ready = self._ready, []
        if len(batch) > 1:
            batch.sort(key=_turn)
            if self._shuffled is not None:
                self._shuffled.shuffle(batch)
        for handle in batch:
            if not handle.cancelled():
                self.steps += 1
                handle._run()


def new_loop(*, shuffled: random.Random | None = None) -> SimLoop:
    """Return a loop at time 0; asyncio calls methods abstract that only loops with a network have."""
    return SimLoop(shuffled=shuffled)  # type: ignore[abstract]


def _birth(task: asyncio.Task[Any]) -> int:
    return task.born if isinstance(task, _SimTask) else 0


def _turn(handle: asyncio.Handle) -> int:
    """Return the birth of the task that a callback steps; 0 for any other, which keep their order."""
    owner = getattr(handle._callback, "__self__", None)  # type: ignore[attr-defined]
    return owner.born if isinstance(owner, _SimTask) else 0
