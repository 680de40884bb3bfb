"""An event loop in a thread of its own, for callers without one."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from holdfast_core.model.errors import ErrorCode, HoldfastError

Answer = TypeVar("Answer")


class LoopThread:
    """Runs coroutines for callers in any thread. A daemon thread: a program that forgets to close still ends."""

    def __init__(self) -> None:
        """Start the thread."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="holdfast-loop", daemon=True)
        self._lock = threading.Lock()
        self._closed = False
        self._thread.start()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def run(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """Run a coroutine in the loop and wait for its answer; an interrupt of the caller cancels it first.

        Raises:
            HoldfastError: INVALID_ARGUMENT if the thread was closed, or called from its own loop.
        """
        with self._lock:
            if self._closed or threading.current_thread() is self._thread:
                work.close()
                reason = "is closed" if self._closed else "must not be used from its own callbacks"
                raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"the state manager {reason}")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            # An interrupt of this thread, or the work's own error, where cancelling changes nothing.
            if future.cancel():
                concurrent.futures.wait([asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._loop)])
            raise

    def close(self, last: Coroutine[Any, Any, None]) -> None:
        """Run `last`, then end the loop and the thread. Further calls do nothing."""
        with self._lock:
            if self._closed:
                last.close()
                return
            self._closed = True
            future = asyncio.run_coroutine_threadsafe(last, self._loop)
        try:
            future.result()
        finally:
            asyncio.run_coroutine_threadsafe(self._finish(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _finish(self) -> None:
        """Cancel what is left and wait for it, as `asyncio.run` does at its end."""
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        if rest:
            await asyncio.wait(rest)
        await self._loop.shutdown_asyncgens()
        await self._loop.shutdown_default_executor()
