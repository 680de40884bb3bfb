"""What goes wrong, and how much of it: crashes, splits, storms, rot, loss, wrong clocks; never beyond the promise.

The promise is that W - 1 copies of a block may be destroyed at once. So whatever destroys copies (rot, a lost machine)
waits until what was destroyed before has been made good; crashes, splits and delays destroy nothing and are unlimited.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from holdfast_core.model.errors import HoldfastError
from tests.sim.checker import Checker
from tests.sim.cluster import REPLICAS, SimCluster
from tests.sim.coordinators import CoordinatorHost
from tests.sim.metadata_link import MetadataLink
from tests.sim.network import METADATA
from tests.sim.nodes import NodeHost

_SKEW_MS_MAX: Final = 50_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Danger:
    """What a history is exposed to: how often each fault comes, relative to the others; 0 for never.

    Attributes:
        pause_s: mean time between faults.
        lost_answers: share of transactions whose outcome their coordinator never hears.
        relists: share of the metadata store's changes that are told as a fresh listing.
        lag_s: how long watches lag behind at most.
    """

    pause_s: float = 6.0
    coordinator_crash: int = 0
    node_crash: int = 0
    node_loss: int = 0
    split: int = 0
    storm: int = 0
    rot: int = 0
    full_disk: int = 0
    slow_disk: int = 0
    clocks: int = 0
    metadata_cut: int = 0
    lost_answers: float = 0.0
    relists: float = 0.0
    lag_s: float = 0.01


def draw_danger(dice: random.Random) -> Danger:
    """Return what one history is exposed to: sometimes a little of all, sometimes much of a few."""
    if dice.random() < 0.08:
        return Danger()
    names = [
        "coordinator_crash",
        "node_crash",
        "node_loss",
        "split",
        "storm",
        "rot",
        "full_disk",
        "slow_disk",
        "clocks",
        "metadata_cut",
    ]
    chosen = dice.sample(names, dice.randint(1, 6))
    return Danger(
        pause_s=dice.choice([2.0, 4.0, 8.0]),
        lost_answers=dice.choice([0.0, 0.0, 0.02, 0.1]),
        relists=dice.choice([0.0, 0.0, 0.05]),
        lag_s=dice.choice([0.005, 0.05, 2.0]),
        **{name: dice.randint(1, 4) for name in chosen},
    )


class Faults:
    """Breaks things in one history until it is told to stop."""

    def __init__(self, cluster: SimCluster, checker: Checker, danger: Danger) -> None:
        """Break nothing yet."""
        self._cluster = cluster
        self._checker = checker
        self._danger = danger
        self._dice = cluster.random("faults")
        self._full: dict[str, None] = {}
        self.count = 0
        for host in cluster.coordinators.values():
            host.prepare = self._spoil_link

    async def run(self) -> None:
        """Break one thing after another until cancelled."""
        danger = self._danger
        kinds: list[tuple[Callable[[], Awaitable[None]], int]] = [
            (self.crash_coordinator, danger.coordinator_crash),
            (self.crash_node, danger.node_crash),
            (self.lose_node, danger.node_loss),
            (self.split, danger.split),
            (self.storm, danger.storm),
            (self.rot, danger.rot),
            (self.fill_disk, danger.full_disk),
            (self.slow_disk, danger.slow_disk),
            (self.turn_clocks, danger.clocks),
            (self.cut_metadata, danger.metadata_cut),
        ]
        possible = [(act, weight) for act, weight in kinds if weight]
        if not possible:
            return
        acts, weights = zip(*possible, strict=True)
        while True:
            await asyncio.sleep(self._dice.expovariate(1.0 / danger.pause_s))
            (act,) = self._dice.choices(acts, weights)
            self.count += 1
            await act()

    async def stop(self) -> None:
        """Break nothing any more, and mend what stands in the way: cuts, storms, full disks, machines that are off."""
        cluster = self._cluster
        cluster.network.heal()
        weather = cluster.network.weather
        weather.loss = weather.slow = weather.doubled = 0.0
        for coordinator in cluster.coordinators.values():
            coordinator.prepare = lambda link: None
            if coordinator.link is not None:
                coordinator.link.lost_answers = coordinator.link.relists = 0.0
                coordinator.link.lag_s = 0.01
            if coordinator.process is None or not coordinator.process.alive:
                coordinator.start()
        for node in cluster.nodes.values():
            node.disk.capacity_bytes = 64 << 20
            node.disk.slow_s = 0.003
            if not node.alive and not node.lost:
                node.start()
        cluster.world.note("faults", f"stop after {self.count}")

    # Faults that destroy nothing.

    async def crash_coordinator(self) -> None:
        """Crash a coordinator, and start it again after a while."""
        host = self._dice.choice(list(self._cluster.coordinators.values()))
        host.crash()
        await asyncio.sleep(self._dice.choice([0.2, 2.0, 8.0]))
        if host.process is None or not host.process.alive:
            host.start()

    async def crash_node(self) -> None:
        """Crash a node, perhaps with its index, and start it again after a while; sometimes several at once."""
        living = [host for host in self._cluster.nodes.values() if host.alive]
        if not living:
            return
        count = self._dice.choice([1, 1, 1, 2, len(living)])
        down = self._dice.sample(living, min(count, len(living)))
        for host in down:
            host.crash(self._cluster.partition_of, rebuild=self._dice.random() < 0.3)
        await asyncio.sleep(self._dice.choice([0.5, 3.0, 10.0, 40.0 if len(down) == 1 else 5.0]))
        for host in down:
            if not host.alive and not host.lost:
                host.start()

    async def split(self) -> None:
        """Cut some machines off from the others, one way or both, for a while."""
        names = [*self._cluster.nodes, *self._cluster.coordinators]
        here = self._dice.sample(names, self._dice.randint(1, max(1, len(names) // 2)))
        there = [name for name in names if name not in here]
        network = self._cluster.network
        if self._dice.random() < 0.4:
            there = self._dice.sample(there, self._dice.randint(1, len(there)))
        self._cluster.world.note("faults", f"cuts {here} off from {there}")
        network.cut(here, there)
        if self._dice.random() < 0.6:
            network.cut(there, here)
        await asyncio.sleep(self._dice.choice([1.0, 5.0, 15.0]))
        network.heal()

    async def cut_metadata(self) -> None:
        """Cut coordinators off from the metadata store for a while."""
        names = list(self._cluster.coordinators)
        here = self._dice.sample(names, self._dice.randint(1, len(names)))
        self._cluster.world.note("faults", f"cuts {here} off from the metadata store")
        self._cluster.network.cut(here, [METADATA])
        await asyncio.sleep(self._dice.choice([0.7, 3.0, 10.0]))
        self._cluster.network.heal()

    async def storm(self) -> None:
        """Let messages be lost, late and doubled for a while."""
        weather = self._cluster.network.weather
        weather.loss = self._dice.choice([0.0, 0.05, 0.2])
        weather.slow = self._dice.choice([0.05, 0.3])
        weather.doubled = self._dice.choice([0.0, 0.3])
        self._cluster.world.note("faults", f"a storm: {weather}")
        await asyncio.sleep(self._dice.choice([3.0, 10.0]))
        weather.loss = weather.slow = weather.doubled = 0.0

    async def fill_disk(self) -> None:
        """Leave a disk no space for a while."""
        disk = self._some_node().disk
        disk.capacity_bytes = max(1, disk.used_bytes)
        await asyncio.sleep(self._dice.choice([3.0, 10.0]))
        disk.capacity_bytes = 64 << 20

    async def slow_disk(self) -> None:
        """Make a disk slow for a while."""
        disk = self._some_node().disk
        disk.slow_s = self._dice.choice([0.1, 1.0, 4.0])
        await asyncio.sleep(self._dice.choice([3.0, 10.0]))
        disk.slow_s = 0.003

    async def turn_clocks(self) -> None:
        """Set the wall clock of some machine to something else."""
        hosts: list[NodeHost | CoordinatorHost] = [*self._cluster.nodes.values(), *self._cluster.coordinators.values()]
        host = self._dice.choice(hosts)
        host.skew_ms = self._dice.randint(-_SKEW_MS_MAX, _SKEW_MS_MAX)
        if host.process is not None:
            host.process.clock.skew_ms = host.skew_ms

    # Faults that destroy copies.

    async def rot(self) -> None:
        """Flip bytes in some copies, of blocks of which nothing else is destroyed."""
        self._checker.forgive()
        host = self._some_node()
        if not self._checker.living:
            return
        copies = [(key, copy) for held in host.disk.copies.values() for key, copy in held.items() if not copy.aside]
        for ref, copy in self._dice.sample(copies, min(len(copies), self._dice.choice([1, 3, 10]))):
            if self._may_spoil(host.name, ref):
                if self._checker.intact(host.name, ref):
                    self._checker.spoil(host.name, ref)
                copy.data = copy.data[:-1] + bytes([copy.data[-1] ^ 0x55])

    async def lose_node(self) -> None:
        """Lose a machine with its disk for good, and bring a new one in its place."""
        self._checker.forgive()
        living = [host for host in self._cluster.nodes.values() if host.alive]
        if len(living) <= REPLICAS or self._checker.spoilt or any(host.lost for host in self._members()):
            return
        host = self._dice.choice(living)
        refs = [key for held in host.disk.copies.values() for key in held]
        if not all(self._may_spoil(host.name, ref) for ref in refs if self._checker.referenced(ref)):
            return
        for ref in refs:
            if self._checker.intact(host.name, ref):
                self._checker.lose(host.name, ref)
        self._cluster.world.note("faults", f"loses {host.name}")
        host.lose()
        await asyncio.sleep(self._dice.uniform(0.0, 5.0))
        if len(self._cluster.nodes) < 9:
            self._cluster.watched_node().start()

    def _may_spoil(self, node_id: str, ref: tuple[int, bytes]) -> bool:
        """Whether a copy may be destroyed: nothing else of the block is, and another good one would be left."""
        if any(other != node_id for other in self._checker.spoilt.get(ref, {})):
            return False
        return any(
            sum(self._checker.intact(owner, ref) for owner in layout.owners_of_block(ref[1]) if owner != node_id)
            >= layout.write_quorum - 1
            for layout in self._checker.living
        )

    def _members(self) -> list[NodeHost]:
        names = dict.fromkeys(node.node_id for layout in self._checker.living for node in layout.nodes)
        return [self._cluster.nodes[name] for name in names]

    def _some_node(self) -> NodeHost:
        return self._dice.choice(list(self._cluster.nodes.values()))

    def _spoil_link(self, link: MetadataLink) -> None:
        link.lost_answers = self._danger.lost_answers
        link.relists = self._danger.relists
        link.lag_s = self._danger.lag_s


async def quietly(work: Awaitable[object]) -> None:
    """Wait for something that may be refused."""
    try:
        await work
    except HoldfastError:
        return
