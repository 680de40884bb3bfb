"""Trees are read and written by threads that block; the cluster is spoken with on the manager's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from holdfast.images.blocking import BlockingImage, Runner, runner_on
from holdfast.results import Progress, ProgressCallback
from holdfast_core.model.errors import ErrorCode, HoldfastError

if TYPE_CHECKING:
    from holdfast.images.point_image import PointImage

Answer = TypeVar("Answer")
Element = TypeVar("Element")


class ImageAhead(BlockingImage):
    """A volume of a point for threads, with ranges that are begun to be fetched before they are read."""

    def __init__(self, image: PointImage, loop: asyncio.AbstractEventLoop) -> None:
        """Bind to an image of the event loop."""
        super().__init__(image, runner_on(loop))
        self._point_image = image
        self._loop = loop

    def fetch_ahead(self, start: int, end: int) -> None:
        """Begin to fetch a range; returns at once, and what goes wrong shows when it is read."""
        self._loop.call_soon_threadsafe(self._begin, start, end)

    def _begin(self, start: int, end: int) -> None:
        with contextlib.suppress(HoldfastError):  # closed meanwhile: then nobody reads it either
            self._point_image.fetch_ahead(start, end)


class Interruptible(Iterator[Element]):
    """An iterator that threads advance, one at a time, and that can be ended from another one."""

    def __init__(self, elements: Iterable[Element]) -> None:
        """Take what is iterated over."""
        self._iterator = iter(elements)
        self._lock = threading.Lock()
        self._ended = False

    def __next__(self) -> Element:
        """Return the next element.

        Raises:
            HoldfastError: CANCELLED once it was ended; what making the element raises.
        """
        with self._lock:
            if self._ended:
                raise HoldfastError(ErrorCode.CANCELLED, "the caller gave up")
            return next(self._iterator)

    def end(self) -> None:
        """Make no further element; returns when the one that is being made is done."""
        self._ended = True
        with self._lock:
            close = getattr(self._iterator, "close", None)
            if close is not None:
                close()


async def in_thread(work: Callable[[], Answer], *, cancel: Callable[[], None]) -> Answer:
    """Run work that blocks in a thread. When the caller gives up, `cancel` makes it end, and that is waited for."""
    running = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.to_thread(cancel)
        await asyncio.wait((running,))
        if not running.cancelled():
            running.exception()  # it ended as it was told to; the caller is told that it was cancelled
        raise


def pulled(pieces: AsyncGenerator[bytes, None], run: Runner) -> Iterator[bytes]:
    """Yield in a thread what a generator of the event loop yields; it is closed at the end."""

    async def following() -> bytes | None:
        return await anext(pieces, None)

    try:
        while (piece := run(following())) is not None:
            yield piece
    finally:
        run(pieces.aclose())


class Told:
    """Tells a progress callback, which belongs to the event loop, from a thread."""

    def __init__(self, phase: str, progress: ProgressCallback | None, run: Runner) -> None:
        """Begin at zero; the total is not known."""
        self._phase = phase
        self._progress = progress
        self._run = run
        self._done = 0

    def __call__(self, count: int) -> None:
        """Count bytes."""
        if self._progress is not None:
            self._done += count
            self._run(self._tell(self._progress))

    async def _tell(self, progress: ProgressCallback) -> None:
        progress(Progress(self._phase, self._done, 0))
