"""The worker that makes a node hold what it has to, and then let go of what it has not: sync, anti-entropy, drops.

One step is a look at one batch of partitions (`plan`), or, where nothing waits for a look, one step of the dropper. So
no drop is under way while a sync goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import ANTI_ENTROPY_INTERVAL_S
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.logs import Log
from holdfast_storagenode.core import NodeCore
from holdfast_storagenode.healing.courtesy import Courtesy
from holdfast_storagenode.healing.drop import Dropper
from holdfast_storagenode.healing.looking import Look, Looker, own_holdings
from holdfast_storagenode.healing.peers import FreshEpoch, Peers
from holdfast_storagenode.healing.plan import Looked, SyncBatch, SyncProgress
from holdfast_storagenode.healing.pulling import Puller
from holdfast_storagenode.living import Living, enough
from holdfast_storagenode.store import Holding

IDLE_S: Final = 0.25
"""Seconds until the worker looks again whether anything has changed."""

PARTITIONS_PER_STEP: Final = 256


@dataclass(frozen=True, slots=True)
class _Told:
    """What a peer holds of a partition, and the epoch that it fenced before it looked."""

    fenced_epoch: int
    holdings: tuple[Holding, ...]


@dataclass(frozen=True, slots=True)
class _Answers:
    """By partition and node what peers hold; and who answered at all, if only that it has not heard of the layout."""

    told: dict[int, dict[str, _Told]]
    reached: set[str]


class SyncWorker:
    """See the module."""

    name = "sync"

    def __init__(
        self,
        core: NodeCore,
        peers: Peers,
        puller: Puller,
        dropper: Dropper,
        *,
        fresh_epoch: FreshEpoch,
        courtesy: Courtesy,
        clock: Clock,
        log: Log,
        interval_s: float = ANTI_ENTROPY_INTERVAL_S,
    ) -> None:
        """Prepare; rounds begin `interval_s` after one another at most, and clients go first as `courtesy` says."""
        self._core = core
        self._peers = peers
        self._puller = puller
        self._dropper = dropper
        self._fresh_epoch = fresh_epoch
        self._clock = clock
        self._log = log
        self._courtesy = courtesy
        self._looker = Looker(core, puller)
        self._progress = SyncProgress(core.node_id, interval_s=interval_s)
        self._lapses = core.lapses
        self._began_s = 0.0
        self._said_synced = 0
        self._trouble = ""

    async def step(self) -> float:
        """Look at one batch of partitions, or drop a batch of blocks; return the seconds to wait.

        Raises:
            HoldfastError: what the node's own store raises; UNREACHABLE where no coordinator tells the epoch.
        """
        core, living = self._core, self._core.cluster.living
        if living is None or not core.opened:
            return IDLE_S
        up = frozenset(name for name, node in core.cluster.peers.items() if node.up and name != core.node_id)
        if core.lapses != self._lapses:
            # It was down for the others, who wrote without it.
            self._lapses = core.lapses
            self._progress.hurry()
        if self._progress.observe(living, up, self._clock.monotonic_s(), registered=self._registered()):
            self._begin(living)
            await self._dropper.observe(living)
        batch = self._progress.next_batch(partitions_max=PARTITIONS_PER_STEP)
        if batch is not None:
            began_s = self._clock.monotonic_s()
            answers, own = await self._compare(batch, living)
            # What is pulled is waited for piece by piece.
            pause_s = 0.0 if _urgent(batch, living) else self._courtesy.pause_s(self._clock.monotonic_s() - began_s)
            looks = await self._look_at(batch, living, answers, own)
            self._progress.settle(looks, self._clock.monotonic_s())
        else:
            await self._dropper.observe(living)
            began_s = self._clock.monotonic_s()
            dropped = living.may_drop and await self._dropper.step(living)
            pause_s = self._courtesy.pause_s(self._clock.monotonic_s() - began_s) if dropped else IDLE_S
        self._report(living)
        return pause_s

    def status(self) -> Mapping[str, int]:
        """Return how many partitions are owned, synced and at risk, and how many blocks are foreign."""
        healing = self._core.healing
        return {
            "partitions": healing.partitions,
            "partitions_synced": healing.partitions_synced,
            "partitions_at_risk": healing.partitions_at_risk,
            "foreign_blocks": healing.foreign_blocks,
        }

    def _registered(self) -> frozenset[str] | None:
        registered = self._core.cluster.registered
        return None if registered is None else registered | {self._core.node_id}

    def _begin(self, living: Living) -> None:
        self._began_s = self._clock.monotonic_s()
        self._log.info(
            "sync begins",
            layout_epoch=living.newest.epoch,
            older_epochs=[layout.epoch for layout in living.older],
            partitions=len(self._progress.owned),
        )

    def _report(self, living: Living) -> None:
        progress, healing, epoch = self._progress, self._core.healing, living.newest.epoch
        healing.partitions = len(progress.owned)
        healing.partitions_synced = progress.synced_count
        healing.partitions_at_risk = progress.at_risk_count
        # Foreign blocks are counted first, so that who hears of the sync has heard of them too.
        if not progress.all_synced or not self._dropper.counted(living) or self._core.fenced_epoch < epoch:
            return
        healing.synced_epoch = epoch
        if self._said_synced != epoch:
            self._said_synced = epoch
            self._log.info(
                "sync ends",
                layout_epoch=epoch,
                seconds=round(self._clock.monotonic_s() - self._began_s, 3),
                partitions=len(progress.owned),
                repaired_blocks=healing.repaired_blocks,
                repaired_bytes=healing.repaired_bytes,
            )

    async def _look_at(
        self, batch: SyncBatch, living: Living, answers: _Answers, own: dict[int, tuple[Holding, ...]]
    ) -> dict[int, Looked]:
        """Pull what any source of the partitions of a batch holds and this node lacks."""
        node_id, told = self._core.node_id, answers.told
        look = Look({place: {name: each.holdings for name, each in by.items()} for place, by in told.items()}, own)
        await self._looker.look(batch, look, urgent=_urgent(batch, living))
        reached = frozenset({*answers.reached, node_id})
        return {
            place: Looked(
                answered=reached.intersection(living.owners_of(place)),
                covered=self._fenced(living, told[place]).intersection({node_id, *look.whole[place]}),
                deferred=place in look.deferred,
            )
            for place in batch.partitions
        }

    async def _compare(self, batch: SyncBatch, living: Living) -> tuple[_Answers, dict[int, tuple[Holding, ...]]]:
        """Ask the sources of a batch what they hold, look at what is here, and raise the floors that may be raised."""
        answers = await self._ask(batch, living)
        own = await self._core.executor.run(own_holdings, self._core.store, batch.partitions)
        await self._raise_floors(batch, living, answers.told)
        return answers, own

    async def _ask(self, batch: SyncBatch, living: Living) -> _Answers:
        """Return what the sources of a batch say that they hold."""
        told: dict[int, dict[str, _Told]] = {partition: {} for partition in batch.partitions}
        reached: set[str] = set()

        async def ask(node_id: str, partitions: Sequence[int]) -> None:
            left = partitions
            try:
                while left:
                    answer = await self._peers.compare(node_id, left, layout_epoch=living.newest.epoch)
                    if not 0 < len(answer.holdings) <= len(left):
                        raise HoldfastError(ErrorCode.INTERNAL, "answers for another number of partitions")
                    for partition, holdings in zip(left, answer.holdings, strict=False):
                        told[partition][node_id] = _Told(answer.fenced_epoch, holdings)
                    left = left[len(answer.holdings) :]
            except HoldfastError as error:
                if error.code is not ErrorCode.NOT_READY:
                    self._puller.note_trouble(node_id, error.message, about="comparison")
                    return
            self._puller.note_trouble(node_id, "", about="comparison")
            reached.add(node_id)

        async with plain_task_group() as group:
            for node_id, partitions in batch.sources.items():
                group.create_task(ask(node_id, partitions))
        return _Answers(told, reached)

    def _fenced(self, living: Living, told: Mapping[str, _Told]) -> frozenset[str]:
        """Return who fences the newest epoch, of those that answered and this node."""
        epoch = living.newest.epoch
        fenced = {node_id for node_id, answer in told.items() if answer.fenced_epoch >= epoch}
        return frozenset(fenced | {self._core.node_id}) if self._core.fenced_epoch >= epoch else frozenset(fenced)

    async def _raise_floors(self, batch: SyncBatch, living: Living, told: Mapping[int, Mapping[str, _Told]]) -> None:
        """Raise the stamp floors of the partitions of which enough old owners fence the newest epoch, where not done.

        The epoch that they are raised to is read only now, after those owners fenced: what an open session leans on
        under an older layout was stamped before, so the session's epoch is not above it.
        """
        if not living.older:
            return
        ready = [
            partition
            for partition in self._progress.without_floor(batch.partitions)
            if enough(living, partition, self._fenced(living, told[partition]), self._registered())
        ]
        if ready:
            try:
                epoch = await self._fresh_epoch()
            except HoldfastError as error:
                # Blocks are pulled all the same; the partitions are not synced without the floor.
                self._note(error.message)
                return
            self._note("")
            await self._core.executor.run(self._core.store.raise_floor, ready, epoch)
            self._progress.floored(ready)

    def _note(self, trouble: str) -> None:
        if trouble and trouble != self._trouble:
            self._log.warning("sync waits for a coordinator", why=trouble)
        self._trouble = trouble


def _urgent(batch: SyncBatch, living: Living) -> bool:
    """Return whether one more failure may cost data, so that nothing is gained by gentleness."""
    return batch.live_owners < living.newest.write_quorum
