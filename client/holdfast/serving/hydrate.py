"""Bringing the rest of a served point here, behind the guest's own reads."""

from __future__ import annotations

from typing import Final

from holdfast.serving.volume import ServedVolume
from holdfast_core.model.errors import HoldfastError
from holdfast_core.model.limits import MIB
from holdfast_core.runtime.clock import Clock

STEP_BYTES: Final = 2 * MIB
_SYNC_BYTES: Final = 64 * MIB
_POLL_S: Final = 0.005
_WAIT_MAX_S: Final = 0.1
_RETRY_S: Final = 5.0


class Hydrate:
    """Fetches every block of a volume that is not here yet into its local file, in order.

    Before each step it waits while reads of guests are on their way to the cluster, for `_WAIT_MAX_S` at most, so that
    it comes to an end beside a guest that never rests. While the cluster does not answer it tries again.
    """

    def __init__(self, volume: ServedVolume, clock: Clock) -> None:
        """Bind to a volume that has local files."""
        self._volume = volume
        self._clock = clock

    async def run(self) -> None:
        """Return when all of the volume is here, and durable.

        Raises:
            HoldfastError: CORRUPT or MISSING where blocks are lost, which are passed over first; TARGET_UNWRITABLE.
        """
        volume = self._volume
        lost: HoldfastError | None = None
        unsynced = 0
        step = max(STEP_BYTES, volume.image.block_bytes)
        step -= step % volume.image.block_bytes
        for at in range(0, volume.size_bytes, step):
            for start, end in volume.unfetched(at, min(at + step, volume.size_bytes)):
                await self._give_way()
                try:
                    await volume.keep_fetched(start, await self._fetch(start, end - start))
                except HoldfastError as error:
                    if not error.block_ids:
                        raise
                    lost = error
                unsynced += end - start
            if unsynced >= _SYNC_BYTES:
                await volume.sync_fetched()
                unsynced = 0
        await volume.sync_fetched()
        if lost is not None:
            raise lost

    async def _fetch(self, offset: int, length: int) -> list[bytes]:
        while True:
            try:
                return await self._volume.image.pieces(offset, length)
            except HoldfastError as error:
                if not error.retryable:
                    raise
            await self._clock.sleep(_RETRY_S)

    async def _give_way(self) -> None:
        deadline_s = self._clock.monotonic_s() + _WAIT_MAX_S
        while self._volume.reading and self._clock.monotonic_s() < deadline_s:
            await self._clock.sleep(_POLL_S)
