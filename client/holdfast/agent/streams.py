"""Long calls as streams of answers: progress while they run, the result at the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

from holdfast.results import Progress, ProgressCallback

Result = TypeVar("Result")

_STEPS = 200


class _Latest:
    """The newest progress that nobody has taken yet. What a slow reader misses is not kept."""

    def __init__(self) -> None:
        self._waiting: Progress | None = None
        self._told: Progress | None = None
        self.changed = asyncio.Event()

    def tell(self, progress: Progress) -> None:
        """Take note of progress if it is worth a message: a new phase, or another two hundredth of the whole."""
        last = self._told
        if last is None or last.phase != progress.phase or _step(last) != _step(progress):
            self._waiting = self._told = progress
            self.changed.set()

    def take(self) -> Progress | None:
        """Return what is new, once."""
        self.changed.clear()
        waiting, self._waiting = self._waiting, None
        return waiting


def _step(progress: Progress) -> int:
    if progress.bytes_total:
        return progress.bytes_done * _STEPS // progress.bytes_total
    return progress.bytes_done >> 24


async def with_progress(
    call: Callable[[ProgressCallback], Awaitable[Result]],
) -> AsyncGenerator[Progress | tuple[Result], None]:
    """Run a call and yield its progress, then a tuple of its result alone. Closing the generator cancels the call.

    Raises:
        HoldfastError: what the call raises, after the progress that came before.
    """
    latest = _Latest()
    work = asyncio.ensure_future(call(latest.tell))
    work.add_done_callback(lambda _: latest.changed.set())
    try:
        while not work.done():
            await latest.changed.wait()
            progress = latest.take()
            if progress is not None:
                yield progress
        yield (await work,)
    finally:
        if not work.done():
            work.cancel()
            await asyncio.wait([work])
