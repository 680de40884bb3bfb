"""The one place where the node's event loop crosses into threads."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Final, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

THREADS_MAX: Final = 32


class Workers:
    """Threads for what blocks: disk, hashing, index."""

    def __init__(self) -> None:
        # Twice the cores and some, because a thread that reads waits for the disk.
        count = min(THREADS_MAX, 2 * (os.cpu_count() or 1) + 2)
        self._executor = ThreadPoolExecutor(count, thread_name_prefix="storagenode")

    async def run(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Return what `function` returns in a thread. A caller that is cancelled leaves it running to its end."""
        return await asyncio.wrap_future(self._executor.submit(function, *args, **kwargs))

    async def run_and_settle(
        self,
        function: Callable[Arguments, Future[Result]],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """As `run` for a function that returns a future; wait for that without holding a thread.

        The event loop is woken once, when the end of both is known: waking it costs more than what it would do.
        """
        settled: Future[Result] = Future()
        # Who waits may be cancelled, and the threads still have somewhere to put the result.
        settled.set_running_or_notify_cancel()
        self._executor.submit(function, *args, **kwargs).add_done_callback(partial(_follow, settled))
        return await asyncio.wrap_future(settled)

    def close(self) -> None:
        """Wait for what runs and end the threads."""
        self._executor.shutdown(wait=True)


def _follow(settled: Future[Result], started: Future[Future[Result]]) -> None:
    """Settle `settled` as what `started` returned will be settled, or with the error that it met instead."""
    error = started.exception()
    if error is None:
        started.result().add_done_callback(partial(_settle, settled))
    else:
        settled.set_exception(error)


def _settle(settled: Future[Result], done: Future[Result]) -> None:
    error = done.exception()
    if error is None:
        settled.set_result(done.result())
    else:
        settled.set_exception(error)
