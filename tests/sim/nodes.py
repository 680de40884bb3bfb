"""Storage nodes of the simulated world: the product's own parts over a simulated disk and network."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Final, ParamSpec, TypeVar

from prometheus_client import CollectorRegistry

from holdfast_core.runtime.background import run_workers
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.logs import get_log
from holdfast_proto.v1.cluster_pb2 import HeartbeatResponse
from holdfast_proto.v1.common_pb2 import NodeStatus
from holdfast_storagenode.access import AccessControl
from holdfast_storagenode.core import NodeCore
from holdfast_storagenode.datadir import Identity
from holdfast_storagenode.healing import repair, scrub, sync
from holdfast_storagenode.healing.scrub_place import ScrubPlace
from holdfast_storagenode.healing.workers import Healing, HealingOptions
from holdfast_storagenode.heartbeats import Heartbeats, heartbeats_over
from holdfast_storagenode.metrics import NodeMetrics
from holdfast_storagenode.segments.observer import StoreObserver
from holdfast_storagenode.service import BlockService
from holdfast_storagenode.store import BlockStore, PartitionOf
from holdfast_storagenode.wire import SERVICE_NAME, add_block_service
from tests.sim.coordinators import SimEndpoints
from tests.sim.disk import Disk, SimStore
from tests.sim.network import Network
from tests.sim.peers import SimPeers, serve_peers
from tests.sim.rpc import SimServer, address_of, inject
from tests.sim.world import Process, World

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_CLUSTER: Final = "cluster"
# How often idle workers look is nothing that a history depends on, and most of what it costs.
for _module, _idle_s in ((repair, 0.5), (scrub, 1.0), (sync, 0.5)):
    inject(_module, "IDLE_S", _idle_s)
# Counters of one process of the machine that simulates: nothing in a history depends on them.
_METRICS: Final = NodeMetrics(CollectorRegistry(), get_log("storagenode"))


class SimExecutor:
    """Runs what blocks at once, after a moment now and then: as `Workers`."""

    def __init__(self, process: Process, dice: random.Random) -> None:
        """Work for one process."""
        self._process = process
        self._dice = dice

    async def run(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """See `Workers.run`."""
        if self._dice.random() < 0.3:
            await self._process.sleep(self._dice.uniform(0.0001, 0.003))
        self._process.check_alive()
        return function(*args, **kwargs)

    async def run_and_settle(
        self, function: Callable[Arguments, Future[Result]], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """See `Workers.run_and_settle`."""
        return await asyncio.wrap_future(await self.run(function, *args, **kwargs))


class SimHome:
    """What a node keeps over restarts, on a simulated disk: as `NodeHome`."""

    def __init__(self, identity: Identity, disk: Disk, process: Process, dice: random.Random) -> None:
        """Open the disk for one process."""
        self.identity = identity
        self._disk = disk
        self._process = process
        self._dice = dice

    def load_cluster(self) -> HeartbeatResponse | None:
        """See `NodeHome`."""
        saved = self._disk.saved.get(_CLUSTER)
        return None if saved is None else HeartbeatResponse.FromString(saved)

    def save_cluster(self, known: HeartbeatResponse) -> None:
        """See `NodeHome`."""
        self._process.check_alive()
        self._disk.saved[_CLUSTER] = known.SerializeToString()

    def load_scrub(self) -> ScrubPlace:
        """See `ScrubHome`."""
        return self._disk.scrub

    def save_scrub(self, place: ScrubPlace) -> None:
        """See `ScrubHome`."""
        self._process.check_alive()
        self._disk.scrub = place

    def capacity_bytes(self) -> int:
        """See `NodeHome`."""
        return self._disk.capacity_bytes

    def open_store(self, partition_of: PartitionOf, observer: StoreObserver) -> BlockStore:
        """See `NodeHome`."""
        return SimStore(self._disk, self._process, partition_of, self._dice)

    def close(self) -> None:
        """See `NodeHome`."""


class NodeHost:
    """A machine with a disk on which a storage node runs, crashes and is started again."""

    def __init__(self, world: World, name: str, network: Network, coordinators: Sequence[str], *, zone: str) -> None:
        """Have nothing running yet."""
        self._world = world
        self.name = name
        self.zone = zone
        self.disk = Disk(name=name)
        self._network = network
        self._coordinators = coordinators
        self._dice = world.random(name)
        self._incarnation = self._dice.randbytes(16)
        self.process: Process | None = None
        self.skew_ms = 0
        self.lost = False

    @property
    def alive(self) -> bool:
        """Whether a node runs there."""
        return self.process is not None and self.process.alive

    def start(self) -> None:
        """Start the node on its disk."""
        process = Process(self._world, self.name, skew_ms=self.skew_ms)
        self.process = process
        self._world.note(self.name, "starts")
        home = SimHome(Identity(self.name, self._incarnation), self.disk, process, self._dice)
        node = _SimNode(process, home, self._network, self._coordinators, self.zone, self._dice)
        process.spawn(node.run())

    def crash(self, partition_of: PartitionOf, *, rebuild: bool = False) -> None:
        """End the node here and now; `rebuild` costs it its index."""
        if self.process is not None and self.process.alive:
            self.process.crash()
            self.disk.lose_power(self._dice, partition_of, rebuild=rebuild)

    def lose(self) -> None:
        """Lose the machine with its disk for good."""
        if self.process is not None and self.process.alive:
            self.process.crash()
        self.lost = True
        self.disk.wipe()


class _SimNode:
    """One life of a node."""

    def __init__(
        self,
        process: Process,
        home: SimHome,
        network: Network,
        coordinators: Sequence[str],
        zone: str,
        dice: random.Random,
    ) -> None:
        self._process = process
        self._home = home
        self._zone = zone
        self._network = network
        self._core = NodeCore(home, SimExecutor(process, dice))
        self._endpoints = SimEndpoints(process, coordinators, network)

    async def run(self) -> None:
        """Serve and beat until something fails for good."""
        await self._core.open()
        access = AccessControl(self._core.cluster, self._process.clock)
        server = SimServer(self._process)
        server.add(add_block_service, BlockService(self._core, access, _METRICS, self._status), SERVICE_NAME)
        server.start()
        beats = Heartbeats(
            self._core,
            heartbeats_over(self._endpoints),
            incarnation=self._home.identity.incarnation,
            interval_s=None,
            status=self._status,
            clock=self._process.clock,
            log=get_log("storagenode"),
        )
        healing = Healing(
            self._core,
            self._home,
            SimPeers(self._process, self._network),
            fresh_epoch=beats.fresh_epoch,
            clock=self._process.clock,
            log=get_log("storagenode"),
            options=HealingOptions(interval_s=20.0, scrub_period_s=60.0),
        )
        serve_peers(self._process, healing.peer_side)
        async with plain_task_group() as group:
            group.create_task(beats.run())
            group.create_task(run_workers(healing.workers, self._process.clock, get_log("storagenode")))

    async def _status(self) -> NodeStatus:
        clock = self._process.clock
        address = address_of(self._process.name)
        return await self._core.status(address=address, zone=self._zone, now_unix_ms=clock.now_unix_ms())
