"""The worker that reads and hashes every block once in a stated period, so that rot is found before it matters.

It goes by tenant, partition and id, at the pace that the period takes. How far it came survives restarts; what it finds
corrupt is set aside by the store and fetched from a peer at once (`repair`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.logs import Log
from holdfast_storagenode.core import NodeCore
from holdfast_storagenode.healing.courtesy import Courtesy
from holdfast_storagenode.healing.scrub_place import ScrubHome, ScrubPlace
from holdfast_storagenode.store import BlockStore, Verdict

_BLOCKS_PER_STEP: Final = 64
# A round ends before its period does, as blocks come in while it goes on.
_SHARE_OF_PERIOD: Final = 0.9
_PAUSE_S_MAX: Final = 60.0
# Rot can wait longer than a copy that is missing.
_GENTLER: Final = 2.0
_SAVE_INTERVAL_S: Final = 60.0
IDLE_S: Final = 0.5


def step_s(*, period_s: float, blocks: int, all_blocks: int) -> float:
    """Return how long reading `blocks` of `all_blocks` may take, the wait after it included, to end in time."""
    return period_s * _SHARE_OF_PERIOD * blocks / max(blocks, all_blocks)


class ScrubWorker:
    """See the module."""

    name = "scrub"

    def __init__(
        self, core: NodeCore, home: ScrubHome, *, courtesy: Courtesy, clock: Clock, log: Log, period_s: float
    ) -> None:
        """Prepare; every block is read once in `period_s`.

        Half of the time it stands still at least, and while clients are at work for as long as repair does, and longer.
        """
        self._core = core
        self._home = home
        self._clock = clock
        self._log = log
        self._period_s = period_s
        self._courtesy = courtesy
        self._place: ScrubPlace | None = None
        self._saved_s = 0.0

    async def step(self) -> float:
        """Read some blocks; return the seconds to wait.

        Raises:
            HoldfastError: what the node's own store raises.
        """
        if not self._core.opened:
            return IDLE_S
        if self._place is None:
            self._place = await self._core.executor.run(self._home.load_scrub)
            self._saved_s = self._clock.monotonic_s()
        now_unix_ms = self._clock.now_unix_ms()
        if not self._place.began_unix_ms:
            wait_s = self._place.last_began_unix_ms / 1000 + self._period_s - now_unix_ms / 1000
            # A clock that was set back must not stop scrubbing for as long as it went.
            if 0 < wait_s <= self._period_s and self._place.last_began_unix_ms:
                self._report(self._place)
                return min(wait_s, _PAUSE_S_MAX)
            self._place = replace(
                self._place, tenant=0, after=b"", read_blocks=0, corrupt_blocks=0, began_unix_ms=now_unix_ms
            )
        pause_s = await self._read(self._place)
        self._report(self._place)
        return pause_s

    def status(self) -> Mapping[str, int]:
        """Return how far it came, in thousandths."""
        return {"permille": self._core.healing.scrub_permille}

    async def _read(self, place: ScrubPlace) -> float:
        began_s = self._clock.monotonic_s()
        tenant, ids, verdicts = await self._core.executor.run(_read_some, self._core.store, place)
        if not ids:
            await self._end(place)
            return IDLE_S
        self._core.note_corrupt(tenant, ids, verdicts)
        corrupt = sum(verdict is Verdict.CORRUPT for verdict in verdicts)
        self._place = replace(
            place,
            tenant=tenant,
            after=ids[-1],
            read_blocks=place.read_blocks + len(ids),
            corrupt_blocks=place.corrupt_blocks + corrupt,
        )
        now_s = self._clock.monotonic_s()
        if now_s >= self._saved_s + _SAVE_INTERVAL_S:
            await self._save(self._place)
        status = await self._core.executor.run(self._core.store_status)
        took_s = now_s - began_s
        due_s = step_s(period_s=self._period_s, blocks=len(ids), all_blocks=status.block_count) - took_s
        return min(_PAUSE_S_MAX, max(due_s, took_s, _GENTLER * self._courtesy.pause_s(took_s)))

    async def _end(self, place: ScrubPlace) -> None:
        now_unix_ms = self._clock.now_unix_ms()
        self._place = ScrubPlace(ended_unix_ms=now_unix_ms, last_began_unix_ms=place.began_unix_ms)
        await self._save(self._place)
        self._log.info(
            "scrub ends",
            seconds=(now_unix_ms - place.began_unix_ms) // 1000,
            blocks=place.read_blocks,
            corrupt=place.corrupt_blocks,
        )

    async def _save(self, place: ScrubPlace) -> None:
        await self._core.executor.run(self._home.save_scrub, place)
        self._saved_s = self._clock.monotonic_s()

    def _report(self, place: ScrubPlace) -> None:
        healing = self._core.healing
        total = max(place.read_blocks, self._core.store_status().block_count, 1)
        healing.scrub_permille = 1000 * place.read_blocks // total
        healing.scrubbed_unix_ms = place.ended_unix_ms


def _read_some(store: BlockStore, place: ScrubPlace) -> tuple[int, list[bytes], list[Verdict]]:
    """Read and hash the next blocks behind a place; returns their tenant, ids and verdicts. Runs in the executor."""
    for tenant in store.tenants():
        if tenant < place.tenant:
            continue
        after = place.after if tenant == place.tenant else b""
        entries = store.scan(tenant, partition=None, after=after, limit=_BLOCKS_PER_STEP)
        if entries:
            ids = [entry.block_id for entry in entries]
            return tenant, ids, store.has(tenant, ids, verify=True)
    return place.tenant, [], []
