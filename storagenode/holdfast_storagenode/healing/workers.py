"""Puts together what heals one node.

In a cluster `StorageNode` does it with peers over gRPC. A simulation does the same with its own executor, clock and
peers: `core = NodeCore(home, executor)`; `beats = Heartbeats(core, send, ...)`; `healing = Healing(core, home, peers,
fresh_epoch=beats.fresh_epoch, ...)`; then `run_workers(healing.workers, clock, log)` beside `beats.run()`. What peers
ask of the node is `healing.peer_side`, what clients ask is `core`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import ANTI_ENTROPY_INTERVAL_S, SCRUB_PERIOD_S
from holdfast_core.runtime.background import RETRY_S, Worker
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.logs import Log
from holdfast_storagenode.core import NodeCore
from holdfast_storagenode.healing.courtesy import Courtesy
from holdfast_storagenode.healing.drop import Dropper
from holdfast_storagenode.healing.peers import FreshEpoch, Peers
from holdfast_storagenode.healing.pulling import Puller
from holdfast_storagenode.healing.repair import RepairWorker
from holdfast_storagenode.healing.scrub import ScrubWorker
from holdfast_storagenode.healing.scrub_place import ScrubHome
from holdfast_storagenode.healing.serving import PeerSide
from holdfast_storagenode.healing.sync import SyncWorker

GENTLENESS_DEFAULT: Final = 2.0
DAY_S: Final = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HealingOptions:
    """How a node heals.

    Attributes:
        gentleness: while clients are at work, as many times as long as a piece of repair took is waited after it.
        interval_s: seconds between two rounds of comparisons with the peers.
        scrub_period_s: seconds in which every block is read and hashed once.
        enabled: whether anything of it runs. Without it no layout ever settles: for tests of what happens before
            anything heals.
    """

    gentleness: float = GENTLENESS_DEFAULT
    interval_s: float = ANTI_ENTROPY_INTERVAL_S
    scrub_period_s: float = SCRUB_PERIOD_S
    enabled: bool = True


HEALING_DEFAULT: Final = HealingOptions()


def healing_options(
    *, scrub_days: float, gentleness: float, compare_every_s: float = ANTI_ENTROPY_INTERVAL_S
) -> HealingOptions:
    """Return the options as an operator gives them.

    Raises:
        HoldfastError: INVALID_ARGUMENT for a period that is not above 0, rounds less than a second apart, or a
            gentleness below 0.
    """
    if not (0 < scrub_days < math.inf and 0 <= gentleness < math.inf):
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT, "the days of a scrub are more than 0, and gentleness is 0 or more"
        )
    if not 1 <= compare_every_s < math.inf:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "rounds of comparisons are at least a second apart")
    return HealingOptions(gentleness=gentleness, interval_s=compare_every_s, scrub_period_s=scrub_days * DAY_S)


class Healing:
    """What heals one node.

    Attributes:
        peer_side: what its peers may ask of it.
        workers: its background work, to be run side by side.
        repair: the one of them that fetches single blocks.
    """

    def __init__(
        self,
        core: NodeCore,
        home: ScrubHome,
        peers: Peers,
        *,
        fresh_epoch: FreshEpoch,
        clock: Clock,
        log: Log,
        options: HealingOptions,
    ) -> None:
        """Put it together; nothing runs yet."""
        fresh = _passing(fresh_epoch)
        courtesy = Courtesy(core, clock, gentleness=options.gentleness)
        puller = Puller(core, peers, fresh_epoch=fresh, courtesy=courtesy, clock=clock, log=log)
        dropper = Dropper(core, peers, fresh_epoch=fresh, clock=clock, log=log)
        self.peer_side = PeerSide(core, fresh)
        self.repair = RepairWorker(core, puller, courtesy=courtesy, clock=clock, again_s=options.interval_s)
        sync = SyncWorker(
            core,
            peers,
            puller,
            dropper,
            fresh_epoch=fresh,
            courtesy=courtesy,
            clock=clock,
            log=log,
            interval_s=options.interval_s,
        )
        scrub = ScrubWorker(core, home, courtesy=courtesy, clock=clock, log=log, period_s=options.scrub_period_s)
        chosen = (sync, self.repair, scrub) if options.enabled else ()
        self.workers: tuple[Worker, ...] = tuple(_WhileDiskWorks(each, core) for each in chosen)


class _WhileDiskWorks:
    """A worker that waits once the disk has failed: the node goes on serving what it can read."""

    def __init__(self, worker: Worker, core: NodeCore) -> None:
        self.name = worker.name
        self._worker = worker
        self._core = core

    async def step(self) -> float:
        if self._core.store_status().failed:
            return RETRY_S
        try:
            return await self._worker.step()
        except HoldfastError as error:
            if error.code is ErrorCode.INTERNAL and self._core.store_status().failed:
                return RETRY_S
            raise

    def status(self) -> Mapping[str, int]:
        return self._worker.status()


def _passing(fresh_epoch: FreshEpoch) -> FreshEpoch:
    """Return `fresh_epoch` such that whatever a coordinator refuses counts as that none was reached."""

    async def fresh() -> int:
        try:
            return await fresh_epoch()
        except HoldfastError as error:
            raise HoldfastError(
                ErrorCode.UNREACHABLE, f"no coordinator tells the collection epoch: {error.message}"
            ) from error

    return fresh
