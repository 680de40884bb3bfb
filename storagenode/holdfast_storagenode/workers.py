"""The one place where the node's event loop crosses into threads, and what a node asks of it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, ParamSpec, Protocol, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

THREADS_MAX: Final = 32


class Executor(Protocol):
    """Runs what blocks: in threads, or at once where there are none to be."""

    async def run(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Return what `function` returns. A caller that is cancelled leaves it running to its end."""
        ...

    async def run_and_settle(
        self,
        function: Callable[Arguments, Future[Result]],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """As `run` for a function that returns a future; wait for that too."""
        ...


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
        """As `run` for a function that returns a future; wait for that without holding a thread."""
        return await asyncio.wrap_future(await self.run(function, *args, **kwargs))

    def close(self) -> None:
        """Wait for what runs and end the threads."""
        self._executor.shutdown(wait=True)
