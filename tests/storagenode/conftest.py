"""A node behind real gRPC with a coordinator that answers heartbeats, and every kind of store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from holdfast_storagenode.datadir import DataDirectory
from holdfast_storagenode.embedded import EmbeddedStorageNode
from holdfast_storagenode.home import DirectoryHome
from holdfast_storagenode.memory import MemoryStore
from holdfast_storagenode.node import NodeSettings, StorageNode
from holdfast_storagenode.segments.engine import EngineOptions
from holdfast_storagenode.store import BlockStore
from tests.sim.disk import Disk, SimStore
from tests.sim.loop import new_loop
from tests.sim.trace import Trace
from tests.sim.world import Process, World
from tests.storagenode.blocks import partition_of
from tests.storagenode.cluster import (
    HeartbeatCoordinator,
    LoopThread,
    NodeClient,
    TestClock,
    eventually,
    make_layout,
    mint,
)
from tests.storagenode.engines import SMALL, open_engine, plant_rot
from tests.storagenode.remote import RemoteStore
from tests.storagenode.rigs import Rig


@dataclass(slots=True)
class Served:
    """A node that serves, with its coordinator and the clock that it judges capabilities by."""

    coordinator: HeartbeatCoordinator
    node: StorageNode
    address: str
    clock: TestClock
    directory: Path
    clients: list[NodeClient]

    @property
    def store(self) -> BlockStore:
        """The node's store."""
        return self.node.core.store

    def client(self, capability: str | None = None) -> NodeClient:
        """Return a client; by default one that may do everything for tenant 1."""
        token = mint(self.coordinator.signer) if capability is None else capability
        client = NodeClient(self.address, token)
        self.clients.append(client)
        return client

    def metric(self, name: str, labels: dict[str, str] | None = None) -> float:
        """Return a metric's value now."""
        value = self.node._host.registry.get_sample_value(name, labels)
        assert value is not None, f"there is no metric {name}"
        return value


@pytest_asyncio.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    """A node on a directory, in a cluster whose first layout has formed."""
    coordinator = HeartbeatCoordinator(layout=make_layout())
    directory = DataDirectory.open(tmp_path, node_id="node-1", random_bytes=lambda size: bytes(range(size)))
    home = DirectoryHome(directory, EngineOptions(capacity_bytes=1 << 26, reserve_bytes=0))
    clock = TestClock()
    settings = NodeSettings(coordinators=(await coordinator.start(),), heartbeat_s=0.05, zone="zone-a")
    node = StorageNode(home, settings, clock=clock)
    serving = Served(coordinator, node, await node.start(), clock, tmp_path, [])
    await eventually(lambda: any(beat.status.layout_epoch == 1 for beat in coordinator.beats))
    serving.store.learn_epoch(1)
    yield serving
    for client in serving.clients:
        await client.close()
    await node.stop(1.0)
    home.close()
    await coordinator.stop()


@pytest.fixture(params=["segments", "memory", "grpc", "simulated"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    """Every kind of store, empty, with room for 1 MiB where a bound can be set."""
    options = EngineOptions(capacity_bytes=1 << 20, reserve_bytes=0, segment_bytes=SMALL.segment_bytes)
    if request.param == "memory":
        memory = MemoryStore(partition_of, capacity_bytes=1 << 20)
        yield Rig(
            memory,
            lambda tenant, block: memory.overwrite(tenant, block.id, block.data[:-1] + b"?"),
            partition_of,
            memory,
        )
    elif request.param == "simulated":
        world = World(new_loop(), 1, Trace())
        disk = Disk(capacity_bytes=1 << 20)
        simulated = SimStore(disk, Process(world, "node-1"), partition_of, world.random("disk"))
        simulated.learn_epoch(0)
        yield Rig(
            simulated,
            lambda tenant, block: simulated.overwrite(tenant, block.id, block.data[:-1] + b"?"),
            partition_of,
            simulated,
        )
    elif request.param == "segments":
        store = open_engine(tmp_path, options=options)
        store.learn_epoch(0)
        yield Rig(store, lambda _, block: plant_rot(tmp_path, block.data), partition_of, store)
        store.close()
    else:
        loop = LoopThread()
        layout = make_layout()
        coordinator = HeartbeatCoordinator(layout=layout)
        node = EmbeddedStorageNode(
            "node-1", [loop.run(coordinator.start())], data_dir=tmp_path, heartbeat_s=0.05, options=options
        )
        address = loop.run(node.start())
        loop.run(eventually(lambda: any(beat.status.layout_epoch == 1 for beat in coordinator.beats)))
        assert node._node is not None
        behind = node._node.core.store
        behind.learn_epoch(0)
        remote = RemoteStore(loop, address, coordinator.signer)
        yield Rig(remote, lambda _, block: plant_rot(tmp_path, block.data), layout.partition_of, behind)
        loop.run(node.stop())
        loop.run(coordinator.stop())
        loop.close()
