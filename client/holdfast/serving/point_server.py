"""A recovery point served: its volumes as exports, an overlay under the guest's writes, a hydrate behind its reads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from holdfast.images import CACHE_BYTES_DEFAULT, READ_AHEAD_BYTES_DEFAULT
from holdfast.images.opening import OpenedPoint
from holdfast.serving.hydrate import Hydrate
from holdfast.serving.overlay import Manifest, Overlay
from holdfast.serving.server import Address, NbdServer
from holdfast.serving.volume import ServedVolume
from holdfast_core.model.errors import ErrorCode, HoldfastError

_THREADS: Final = 4


@dataclass(frozen=True, slots=True)
class Serving:
    """How a point is to be served.

    Attributes:
        overlay: directory of the overlay; None serves read-only.
        read_only: refuse writes, with an overlay too, whose content then shows.
        hydrate: bring all of it into the overlay's directory.
        cache_bytes: blocks kept in memory, over all volumes.
        read_ahead_bytes: what a reader that goes forward gets ahead.
    """

    overlay: Path | None = None
    read_only: bool = False
    hydrate: bool = False
    cache_bytes: int = CACHE_BYTES_DEFAULT
    read_ahead_bytes: int = READ_AHEAD_BYTES_DEFAULT


class PointServer:
    """Serves a point until it is closed. Belongs to an event loop; an async context manager, or call `close`.

    Attributes:
        point_id: what is served.
        volumes: names of the exports, in the point's order.
    """

    def __init__(self, opened: OpenedPoint, how: Serving, *, hydrated: Callable[[str], None] | None = None) -> None:
        """Open the overlay, and the images over which it lies; nobody can connect yet.

        `hydrated` is told the name of each volume that is all here.

        Raises:
            HoldfastError: INVALID_ARGUMENT for settings that contradict one another, or a point without volumes; what
                `Overlay` raises.
        """
        if how.hydrate and how.overlay is None:
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT, "a hydrate needs a directory to bring the data to; name an overlay"
            )
        point = opened.point
        if not point.volumes:
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"point {point.point_id} has no volumes to serve")
        self.point_id = point.point_id
        self.volumes = tuple(volume.name for volume in point.volumes)
        self._how = how
        self._hydrated = hydrated
        self._clock = opened.tools.clock
        self._overlay = Overlay(how.overlay, Manifest.of(point)) if how.overlay is not None else None
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="holdfast-serve")
        cache_bytes = how.cache_bytes // len(self.volumes)
        files = self._overlay.files if self._overlay is not None else {}
        self._served = {
            name: ServedVolume(
                opened.image(name, cache_bytes=cache_bytes, read_ahead_bytes=how.read_ahead_bytes),
                files.get(name),
                self._executor,
                point_id=point.point_id,
                clock=self._clock,
                read_only=how.read_only,
            )
            for name in self.volumes
        }
        self._server = NbdServer(self._served)
        self._hydrating: asyncio.Task[None] | None = None
        self._closed = False

    async def __aenter__(self) -> PointServer:
        """Return the server."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the server."""
        await self.close()

    async def start(self, address: Address) -> None:
        """Let clients connect, and begin to hydrate if that was asked for.

        Raises:
            HoldfastError: INVALID_ARGUMENT or CONFLICT if nobody can listen there.
        """
        await self._server.start(address)
        if self._how.hydrate:
            self._hydrating = asyncio.create_task(self._hydrate(list(self._served.values())))

    def uri(self, volume: str) -> str:
        """Return the NBD URI of a volume."""
        return self._server.uri(volume)

    async def _hydrate(self, volumes: Sequence[ServedVolume]) -> None:
        lost: HoldfastError | None = None
        for volume in volumes:
            try:
                await Hydrate(volume, self._clock).run()
            except HoldfastError as error:
                if not error.block_ids:
                    raise
                lost = error
                continue
            if self._hydrated is not None:
                self._hydrated(volume.name)
        if lost is not None:
            raise lost

    async def hydrate_ended(self) -> None:
        """Return when all volumes are here; at once if no hydrate runs.

        Raises:
            HoldfastError: what stopped it. The exports go on.
        """
        if self._hydrating is not None:
            await asyncio.shield(self._hydrating)

    async def close(self) -> None:
        """Disconnect everybody, bring to the disk what was written, and release everything; may be called again.

        Raises:
            HoldfastError: TARGET_UNWRITABLE if that could not be done; all is released even so.
        """
        if self._closed:
            return
        self._closed = True
        try:
            await self._server.close()
            if self._hydrating is not None:
                self._hydrating.cancel()
                await asyncio.gather(self._hydrating, return_exceptions=True)
            for volume in self._served.values():
                await volume.flush()
                await volume.sync_fetched()
        finally:
            for volume in self._served.values():
                await volume.image.close()
            await asyncio.get_running_loop().run_in_executor(None, self._executor.shutdown)
            if self._overlay is not None:
                self._overlay.close()
