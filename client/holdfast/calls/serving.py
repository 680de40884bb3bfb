"""Points read in place: images of their volumes."""

from __future__ import annotations

import contextlib
import io

from holdfast.calls.core import AsyncCore, BlockingCore
from holdfast.images.blocking import BlockingImage, ImageFile
from holdfast.images.opening import open_point
from holdfast.images.point_image import CACHE_BYTES_DEFAULT, READ_AHEAD_BYTES_DEFAULT, PointImage
from holdfast_core.model.errors import HoldfastError
from holdfast_core.model.names import check_id


class AsyncServingCalls(AsyncCore):
    """Calls that read a point without restoring it."""

    async def open_image(
        self,
        point_id: str,
        volume: str = "",
        *,
        cache_bytes: int = CACHE_BYTES_DEFAULT,
        read_ahead_bytes: int = READ_AHEAD_BYTES_DEFAULT,
    ) -> PointImage:
        """Open a volume of a point for reading at any place; its blocks are fetched when they are asked for.

        Args:
            point_id: a snapshot or a backup.
            volume: the volume's name; "" is the first.
            cache_bytes: bound of the blocks that are kept in memory.
            read_ahead_bytes: bound of what is fetched before a reader that goes forward asks for it; 0 is none.

        Returns:
            The image: an async context manager; otherwise call its `close`.

        Raises:
            HoldfastError: NOT_FOUND, DENIED, UNREACHABLE, INVALID_ARGUMENT. Its reads raise CORRUPT, MISSING and
                UNREACHABLE.
        """
        opened = await open_point(*self._open(), check_id(point_id, "point id"))
        image = opened.image(volume, cache_bytes=cache_bytes, read_ahead_bytes=read_ahead_bytes)
        self._images.add(image)
        return image


class ServingCalls(BlockingCore):
    """The blocking face of `AsyncServingCalls`."""

    def open_volume(
        self,
        point_id: str,
        volume: str = "",
        *,
        cache_bytes: int = CACHE_BYTES_DEFAULT,
        read_ahead_bytes: int = READ_AHEAD_BYTES_DEFAULT,
    ) -> io.RawIOBase:
        """Open a volume of a point as a file that can be read and sought in; see `AsyncStateManager.open_image`."""
        image = self._loop.run(
            self._core.open_image(point_id, volume, cache_bytes=cache_bytes, read_ahead_bytes=read_ahead_bytes)
        )

        def close() -> None:
            # A manager that is closed has closed its images and runs nothing any more.
            with contextlib.suppress(HoldfastError):
                self._loop.run(image.close())

        return ImageFile(BlockingImage(image, self._loop.run), close)
