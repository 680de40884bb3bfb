"""A point's volume for code that blocks: parsers of file systems, change trackers, anything that wants a file."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from holdfast.descriptors import Extent

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from holdfast.images.point_image import PointImage

Answer = TypeVar("Answer")


class Runner(Protocol):
    """Runs a coroutine in the image's event loop, waits for it in this thread and returns its answer."""

    def __call__(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """Run it."""
        ...


def runner_on(loop: asyncio.AbstractEventLoop) -> Runner:
    """Return what runs coroutines in `loop` for other threads."""

    def run(work: Coroutine[Any, Any, Answer]) -> Answer:
        future = asyncio.run_coroutine_threadsafe(work, loop)
        try:
            return future.result()
        except BaseException:
            # An interrupt of this thread, or the work's own error, where cancelling changes nothing.
            future.cancel()
            raise

    return run


class BlockingImage:
    """A `PointImage` for threads other than its event loop's, safe to share between them. It stays its owner's."""

    def __init__(self, image: PointImage, run: Runner) -> None:
        """Bind to an image; `run` is e.g. `runner_on(loop)`."""
        self._image = image
        self._run = run

    @property
    def size_bytes(self) -> int:
        """Size of the volume."""
        return self._image.size_bytes

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`.

        Raises:
            HoldfastError: as `PointImage.read`.
        """
        return self._run(self._image.read(offset, length))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes at `offset`.

        Raises:
            HoldfastError: as `PointImage.read`.
        """
        at = 0
        for piece in self._run(self._image.pieces(offset, len(buffer))):
            buffer[at : at + len(piece)] = piece
            at += len(piece)

    def extents(self, start: int, end: int) -> Sequence[Extent]:
        """Return the ranges that may hold other bytes than zero, ascending.

        Raises:
            HoldfastError: as `PointImage.read`.
        """
        return self._run(self._image.extents(start, end))


class ImageFile(io.RawIOBase):
    """A volume of a point as a file that can be read and sought in. Not to be shared between threads: it has one place.

    Closing it closes the image.
    """

    def __init__(self, image: BlockingImage, close_image: Callable[[], None]) -> None:
        """Begin at byte 0; `close_image` is called once, when the file is closed."""
        self._image = image
        self._close_image = close_image
        self._at = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the place of the next read, in bytes."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place, which may lie beyond the end; returns it.

        Raises:
            ValueError: the place would lie before the beginning, or `whence` is unknown.
        """
        begins = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._image.size_bytes}
        if whence not in begins or begins[whence] + offset < 0:
            raise ValueError(f"there is no place {offset} by the rule {whence}")
        self._at = begins[whence] + offset
        return self._at

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Read into `buffer` as much as there is up to its length; returns how much.

        Raises:
            HoldfastError: as `PointImage.read`.
        """
        if self.closed:
            raise ValueError("the image's file is closed")
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._image.size_bytes - self._at))
        if count:
            self._image.read_into(self._at, view[:count])
            self._at += count
        return count

    def close(self) -> None:
        """Close the image; further calls do nothing."""
        if not self.closed:
            super().close()
            self._close_image()
