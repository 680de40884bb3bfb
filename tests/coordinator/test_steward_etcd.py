"""Stewards in real time over a real etcd: two coordinators, nodes that fail, and a steward that is killed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import pytest

from holdfast_coordinator.healing.parts import HealingSettings
from holdfast_core.runtime.background import run_workers
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.clock import SystemClock
from holdfast_core.runtime.logs import get_log
from holdfast_core.runtime.metadata.etcd import EtcdStore
from holdfast_proto.v1.cluster_pb2 import HeartbeatRequest, HeartbeatResponse
from holdfast_proto.v1.common_pb2 import NodeHealing, NodeStatus
from tests.coordinator.healing_rig import Seat, entry, seat
from tests.coordinator.rig import eventually
from tests.support.etcd import EtcdCluster

SETTINGS: Final = HealingSettings(node_lease_ttl_s=2.0, heartbeat_interval_s=0.3, out_after_s=1.5, steward_ttl_s=2.0)
CLOCK: Final = SystemClock()


@dataclass
class Running:
    """A coordinator's healing parts at work; `kill` ends it as a dead process ends, with its lease left behind."""

    seat: Seat
    _work: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to follow the store and to work."""
        await self.seat.view.fresh()
        self._work = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with plain_task_group() as group:
            group.create_task(self.seat.view.run())
            group.create_task(run_workers(self.seat.parts.workers, CLOCK, get_log("test")))

    async def kill(self) -> None:
        """Stop at once, between any two steps."""
        work, self._work = self._work, None
        if work is not None:
            work.cancel()
            await asyncio.wait([work])
            assert work.cancelled()

    @property
    def is_steward(self) -> bool:
        """Whether it takes itself for the steward."""
        return self._work is not None and self.seat.parts.lease.term > 0


@dataclass
class Nodes:
    """Nodes that send heartbeats to whichever coordinator runs, and hold all that they have to at once."""

    coordinators: list[Running]
    up: set[int]
    known: dict[int, HeartbeatResponse] = field(default_factory=dict)

    async def run(self) -> None:
        """Send heartbeats until cancelled."""
        while True:
            for number in sorted(self.up):
                running = [each for each in self.coordinators if each._work is not None]
                await self._beat(number, running[number % len(running)].seat)
            await asyncio.sleep(0.2)

    async def _beat(self, number: int, to: Seat) -> None:
        known = self.known.get(number, HeartbeatResponse())
        epoch = known.layout.epoch
        status = NodeStatus(
            node_id=f"node-{number}",
            address=f"127.0.0.1:{1024 + number}",
            zone=f"zone-{number}",
            capacity_bytes=1 << 40,
            layout_epoch=epoch,
            healing=NodeHealing(synced_epoch=epoch),
        )
        request = HeartbeatRequest(status=status, lease_id=known.lease_id, incarnation=bytes([number]) * 16)
        self.known[number] = await to.parts.heartbeats.take(request, entry(number, action="cluster.join"))


@dataclass
class World:
    """Two coordinators and five nodes."""

    coordinators: list[Running]
    nodes: Nodes

    async def settled_over(self, *numbers: int) -> None:
        """Wait until one layout lives, over exactly these nodes, as every coordinator that runs sees it."""
        wanted = [f"node-{number}" for number in numbers]

        async def settled() -> bool:
            for each in self.coordinators:
                if each._work is None:
                    continue
                assert not each._work.done(), each._work
                layouts = each.seat.view.state.layout_set.layouts
                if len(layouts) != 1 or [node.node_id for node in layouts[0].nodes] != wanted:
                    return False
            return True

        await eventually(settled, f"one layout over {wanted}", within_s=30)

    async def steward(self) -> Running:
        """Wait until there is exactly one steward, and return it."""

        async def one() -> bool:
            return sum(each.is_steward for each in self.coordinators) == 1

        await eventually(one, "one steward", within_s=15)
        return next(each for each in self.coordinators if each.is_steward)


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with EtcdCluster(1, tmp_path_factory.mktemp("etcd")) as cluster:
        yield cluster


@asynccontextmanager
async def _world(etcd: EtcdCluster) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        coordinators = []
        for number in range(2):
            store = await EtcdStore.open(etcd.endpoints)
            stack.push_async_callback(store.close)
            running = Running(await seat(store, CLOCK, seed=number + 1, settings=SETTINGS))
            await running.start()
            stack.push_async_callback(running.kill)
            coordinators.append(running)
        nodes = Nodes(coordinators, {1, 2, 3, 4, 5})
        beating = asyncio.create_task(nodes.run())
        try:
            yield World(coordinators, nodes)
        finally:
            assert not beating.done(), beating
            beating.cancel()
            await asyncio.wait([beating])


@pytest.mark.slow
async def test_nodes_go_out_and_come_back_whichever_coordinator_is_steward(etcd: EtcdCluster) -> None:
    await asyncio.to_thread(etcd.ctl, "del", "", "--prefix")
    async with _world(etcd) as world:
        await world.settled_over(1, 2, 3, 4, 5)
        first = await world.steward()
        world.nodes.up.discard(5)
        await world.settled_over(1, 2, 3, 4)
        await first.kill()
        second = await world.steward()
        assert second is not first
        world.nodes.up.add(5)
        await world.settled_over(1, 2, 3, 4, 5)
        answer = world.nodes.known[1]
        assert answer.granted_epoch > 1
        await first.start()
        assert await world.steward() is second
        world.nodes.up.discard(4)
        await world.settled_over(1, 2, 3, 5)
        newest = second.seat.view.state.layout_set.newest
        assert newest is not None
        # Out, back, out: each of them one layout, although two coordinators watched.
        assert newest.epoch == 4
