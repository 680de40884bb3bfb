"""A simulated cluster: its machines, started and stopped, and everything that stands around them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from holdfast_coordinator import keyspace
from holdfast_coordinator.bootstrap import ClusterOptions
from holdfast_coordinator.records import parse
from holdfast_core.model.layout import Layout
from holdfast_proto.v1 import common_pb2
from tests.sim.clients import Client
from tests.sim.coordinators import CoordinatorHost, SimEndpoints, Terms
from tests.sim.loop import SimLoop
from tests.sim.metadata import MetadataTables
from tests.sim.network import Network
from tests.sim.nodes import NodeHost
from tests.sim.oracle import Oracle
from tests.sim.trace import Trace
from tests.sim.world import World

PARTITIONS: Final = 8
REPLICAS: Final = 3
TENANTS: Final = ("default", "acme")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How large a cluster is."""

    nodes: int = 4
    coordinators: int = 2
    partitions: int = PARTITIONS
    terms: Terms = field(default_factory=Terms)


class SimCluster:
    """Everything of one history."""

    def __init__(self, loop: SimLoop, seed: int, shape: Shape, *, show: Callable[[str], None] | None = None) -> None:
        """Build the machines; nothing runs yet."""
        self.loop = loop
        self.shape = shape
        self.trace = Trace(show)
        self.world = World(loop, seed, self.trace)
        self.tables = MetadataTables(loop)
        self.network = Network(self.world)
        self.oracle = Oracle()
        options = ClusterOptions(nodes_expected=shape.nodes, replicas=REPLICAS, partitions=shape.partitions)
        names = [f"coordinator-{number}" for number in range(1, shape.coordinators + 1)]
        self.coordinators = {
            name: CoordinatorHost(self.world, name, self.tables, self.network, options, shape.terms) for name in names
        }
        self.nodes: dict[str, NodeHost] = {}
        for _ in range(shape.nodes):
            self.add_node()
        self._clients = 0

    def add_node(self) -> NodeHost:
        """Have one more machine for a storage node, not started yet."""
        number = len(self.nodes) + 1
        name = f"node-{number}"
        host = NodeHost(self.world, name, self.network, list(self.coordinators), zone=f"z{number}")
        self.nodes[name] = host
        return host

    def watched_node(self) -> NodeHost:
        """As `add_node`, for one that joins a history which is watched already."""
        host = self.add_node()
        host.disk.watcher = next(iter(self.nodes.values())).disk.watcher
        return host

    def client(self, vm_id: str, tenant: str = TENANTS[0]) -> Client:
        """Start a client's process."""
        self._clients += 1
        return Client(
            self.world,
            f"client-{self._clients}",
            self.network,
            list(self.coordinators),
            self.oracle,
            vm_id=vm_id,
            tenant=tenant,
        )

    async def start(self) -> None:
        """Start all machines and wait until the first layout has formed and every node knows it."""
        for coordinator in self.coordinators.values():
            coordinator.start()
        for node in self.nodes.values():
            node.start()
        await self.until(lambda: bool(self.layouts()) and all(map(self.knows_layout, self.nodes)), within_s=60.0)

    async def until(self, condition: Callable[[], bool], *, within_s: float, every_s: float = 0.5) -> None:
        """Wait until something holds.

        Raises:
            TimeoutError: it does not within that virtual time.
        """
        end_s = self.loop.time() + within_s
        while not condition():
            if self.loop.time() > end_s:
                raise TimeoutError(f"not within {within_s:g} s")
            await asyncio.sleep(every_s)

    def layouts(self) -> tuple[Layout, ...]:
        """Return the living layouts, newest first, as the metadata store has them."""
        items = self.tables.now(keyspace.LAYOUT_EPOCHS_PREFIX)
        return tuple(Layout.from_message(parse(item, common_pb2.Layout).message) for item in reversed(items))

    def partition_of(self, block_id: bytes) -> int:
        """Return the partition of a block."""
        return self.layouts()[0].partition_of(block_id)

    def knows_layout(self, node_id: str) -> bool:
        """Whether a node said that it knows the newest layout."""
        item = self.tables.peek(keyspace.node_status(node_id))
        layouts = self.layouts()
        if item is None or not layouts:
            return False
        return bool(parse(item, common_pb2.NodeStatus).message.layout_epoch == layouts[0].epoch)

    def is_registered(self, node_id: str) -> bool:
        """Whether a node is registered."""
        return self.tables.peek(keyspace.node_record(node_id)) is not None

    def endpoints(self, client: Client) -> SimEndpoints:
        """Return a client's way to the coordinators."""
        return client._endpoints

    def random(self, what: str) -> random.Random:
        """Return the source of randomness for one purpose."""
        return self.world.random(what)

    async def tear_down(self) -> None:
        """End every process and every task."""
        self.world.over = True
        for process in self.world.processes.values():
            process.alive = False
        own = asyncio.current_task()
        for _ in range(50):
            left = [task for task in self.loop.living_tasks() if task is not own]
            if not left:
                return
            for task in left:
                task.cancel()
            await asyncio.sleep(0)
