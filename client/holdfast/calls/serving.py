"""Points used in place: images of their volumes, exports over NBD, and overlays saved as backups."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, cast

from holdfast.calls.core import AsyncCore, BlockingCore
from holdfast.images import CACHE_BYTES_DEFAULT, READ_AHEAD_BYTES_DEFAULT
from holdfast.images.blocking import BlockingImage, ImageFile, runner_on
from holdfast.images.opening import open_point
from holdfast.results import ProgressCallback
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.names import check_id
from holdfast_core.runtime.options import parse_address

if TYPE_CHECKING:
    from holdfast.aio import AsyncStateManager
    from holdfast.background import LoopThread
    from holdfast.images.point_image import PointImage
    from holdfast.serving import Address, PointServer


class AsyncServingCalls(AsyncCore):
    """Calls that use a point without restoring it."""

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

    async def serve_point(
        self,
        snapshot_id: str,
        backup_id: str = "",
        *,
        listen: str = "",
        socket: str | os.PathLike[str] | None = None,
        overlay: str | os.PathLike[str] | None = None,
        read_only: bool = False,
        hydrate: bool = False,
        cache_bytes: int = CACHE_BYTES_DEFAULT,
        read_ahead_bytes: int = READ_AHEAD_BYTES_DEFAULT,
        hydrated: Callable[[str], None] | None = None,
    ) -> PointServer:
        """Export the volumes of a point over NBD at once; blocks are fetched when a guest reads them.

        Args:
            snapshot_id: the snapshot that the lineage starts from, or any point by itself.
            backup_id: the backup to serve; "" serves the snapshot.
            listen: HOST:PORT to listen on; port 0 takes a free one.
            socket: path of a Unix socket to listen on instead; one of the two is given.
            overlay: directory for what guests write; it is made, or gone on with. Without one exports are read-only.
            read_only: refuse writes all the same; what is in the overlay shows.
            hydrate: bring all of the point into the overlay's directory, behind the guests' reads.
            cache_bytes: bound of the blocks kept in memory, over all volumes.
            read_ahead_bytes: bound of what a reader that goes forward gets ahead.
            hydrated: told the name of each volume that is all here.

        Returns:
            The server: an async context manager; otherwise call its `close`. `uri(volume)` says where a volume is.

        Raises:
            HoldfastError: NOT_FOUND, MISMATCH, DENIED, UNREACHABLE; INVALID_ARGUMENT or CONFLICT for the address;
                for the overlay BUSY, MISMATCH if it lies over another point, TARGET_EXISTS, TARGET_UNWRITABLE.
        """
        from holdfast.serving import PointServer, Serving  # most processes serve nothing

        address = _address(listen, socket)
        opened = await open_point(*self._open(), snapshot_id, backup_id)
        how = Serving(Path(overlay) if overlay is not None else None, read_only, hydrate, cache_bytes, read_ahead_bytes)
        make = partial(PointServer, opened, how, hydrated=hydrated)
        server = await asyncio.get_running_loop().run_in_executor(None, make)
        self._servers.add(server)
        try:
            await server.start(address)
        except BaseException:
            await server.close()
            raise
        return server

    async def save_overlay(
        self,
        directory: str | os.PathLike[str],
        *,
        takeover: bool = False,
        progress: ProgressCallback | None = None,
    ) -> str:
        """Save what was written over a point as an incremental backup of its VM; returns the backup's id.

        Nobody may be serving the overlay. It stays as it is and can be served again, over its own point.

        Raises:
            HoldfastError: NOT_FOUND if there is no overlay; BUSY if it is being served; as `incremental_backup`.
        """
        from holdfast.serving.overlay import Overlay
        from holdfast.serving.overlay_source import OverlaySource

        loop = asyncio.get_running_loop()
        overlay = await loop.run_in_executor(None, Overlay, Path(directory), None)
        images: list[PointImage] = []
        try:
            manifest = overlay.manifest
            opened = await open_point(*self._open(), manifest.point_id)
            images += [opened.image(volume.name) for volume in manifest.volumes]
            sources = {
                image.name: OverlaySource(
                    BlockingImage(image, runner_on(loop)), overlay.files[image.name].written, manifest.point_id
                )
                for image in images
            }
            return await cast("AsyncStateManager", self).incremental_backup(
                manifest.vm_id,
                manifest.point_id,
                parent=manifest.point_id,
                takeover=takeover,
                sources=sources,
                progress=progress,
            )
        finally:
            for image in images:
                await image.close()
            overlay.close()


def _address(listen: str, socket: str | os.PathLike[str] | None) -> Address:
    from holdfast.serving import SocketAddress, TcpAddress

    if bool(listen) == (socket is not None):
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT, "say where to listen: either at HOST:PORT or on a Unix socket, not both"
        )
    return SocketAddress(Path(socket).absolute()) if socket is not None else TcpAddress(*parse_address(listen))


class ServedPoint:
    """A point that is being served; a context manager, or call `close`. Safe to share between threads.

    Attributes:
        point_id: what is served.
        uris: the NBD URI of each volume, by name, in the point's order.
    """

    def __init__(self, server: PointServer, loop: LoopThread) -> None:
        """Take a server that runs in `loop`."""
        self._server = server
        self._loop = loop
        self.point_id = server.point_id
        self.uris: Mapping[str, str] = {name: server.uri(name) for name in server.volumes}

    def __enter__(self) -> ServedPoint:
        """Return it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop serving."""
        self.close()

    def wait_hydrated(self) -> None:
        """Return when all volumes are here; at once if no hydrate runs.

        Raises:
            HoldfastError: what stopped it. The exports go on.
        """
        self._loop.run(self._server.hydrate_ended())

    def close(self) -> None:
        """Disconnect everybody and bring to the disk what was written; further calls do nothing.

        Raises:
            HoldfastError: TARGET_UNWRITABLE if that could not be done.
        """
        with _closed_managers():
            self._loop.run(self._server.close())


@contextlib.contextmanager
def _closed_managers() -> Iterator[None]:
    """Pass over a manager that is closed: it has closed what it had opened, and runs nothing any more."""
    try:
        yield
    except HoldfastError as error:
        if error.code is not ErrorCode.INVALID_ARGUMENT:
            raise


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
            with _closed_managers():
                self._loop.run(image.close())

        return ImageFile(BlockingImage(image, self._loop.run), close)

    def serve_point(
        self,
        snapshot_id: str,
        backup_id: str = "",
        *,
        listen: str = "",
        socket: str | os.PathLike[str] | None = None,
        overlay: str | os.PathLike[str] | None = None,
        read_only: bool = False,
        hydrate: bool = False,
        cache_bytes: int = CACHE_BYTES_DEFAULT,
        read_ahead_bytes: int = READ_AHEAD_BYTES_DEFAULT,
        hydrated: Callable[[str], None] | None = None,
    ) -> ServedPoint:
        """Export the volumes of a point over NBD at once; see `AsyncStateManager.serve_point`."""
        server = self._loop.run(
            self._core.serve_point(
                snapshot_id,
                backup_id,
                listen=listen,
                socket=socket,
                overlay=overlay,
                read_only=read_only,
                hydrate=hydrate,
                cache_bytes=cache_bytes,
                read_ahead_bytes=read_ahead_bytes,
                hydrated=hydrated,
            )
        )
        return ServedPoint(server, self._loop)

    def save_overlay(
        self, directory: str | os.PathLike[str], *, takeover: bool = False, progress: ProgressCallback | None = None
    ) -> str:
        """Save what was written over a point as an incremental backup of its VM; returns the backup's id."""
        return self._loop.run(self._core.save_overlay(directory, takeover=takeover, progress=progress))
