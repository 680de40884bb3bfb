"""A stage for one scripted interleaving: a cluster without faults, watched, on which a test says what happens when."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeAlias

from holdfast_core.model.block import Kind
from holdfast_core.model.errors import HoldfastError
from holdfast_proto.v1 import cluster_pb2
from holdfast_storagenode.store import kind_of
from tests.sim.actors import Operator
from tests.sim.checker import Checker
from tests.sim.clients import Client
from tests.sim.cluster import Shape, SimCluster
from tests.sim.history import quiet
from tests.sim.loop import new_loop
from tests.sim.oracle import Ref
from tests.sim.rpc import Request

_SETTLE_S: Final = 300.0


class Stage:
    """What a script works with."""

    def __init__(self, shape: Shape, *, seed: int = 1, show: Callable[[str], None] | None = None) -> None:
        """Build a cluster and watch it."""
        self.loop = new_loop()
        self.cluster = SimCluster(self.loop, seed, shape, show=show)
        self.checker = Checker(
            self.cluster.world, self.cluster.tables, self.cluster.nodes, self.cluster.oracle, tenants=(1,)
        )
        for host in self.cluster.nodes.values():
            host.disk.watcher = self.checker
        self.cluster.oracle.on_lean = self.checker.leaned
        self.operator = Operator(self.cluster, self.checker, pause_s=1.0)
        self.dice = random.Random(seed)
        self.released = False

    async def client(self, vm_id: str = "vm-1") -> Client:
        """Return a client with a registered VM that has some content."""
        client = self.cluster.client(vm_id)
        client.content = {slot: self.dice.randbytes(48) for slot in range(6)}
        await client.register()
        return client

    async def collect(self) -> None:
        """Carry out one collection to its end."""
        await self.operator.collect()
        while True:
            await asyncio.sleep(1.0)
            try:
                if not await self.operator.collecting():
                    return
            except HoldfastError:
                continue

    async def until(self, condition: Callable[[], bool], *, within_s: float = _SETTLE_S) -> None:
        """Wait until something holds."""
        await self.cluster.until(condition, within_s=within_s)

    def holders(self, ref: Ref) -> list[str]:
        """Return the nodes that have an intact copy of a block."""
        return [name for name in self.cluster.nodes if self.checker.intact(name, ref)]

    def keepers(self, ref: Ref) -> list[str]:
        """Return the nodes that have any copy of a block, if only a corrupt one."""
        place = self.checker.living[0].partition_of(ref[1])
        return [name for name, host in self.cluster.nodes.items() if host.disk.find(place, ref) is not None]

    async def set_node(self, node_id: str, *, draining: bool) -> None:
        """Drain or undrain a node."""
        await self.operator.set_node(cluster_pb2.SetNodeRequest(node_id=node_id, draining=draining))

    def members(self) -> list[str]:
        """Return the nodes of the newest layout."""
        return [node.node_id for node in self.checker.living[0].nodes]

    def lose(self, node_id: str) -> None:
        """Lose a machine with its disk, and put that on record."""
        host = self.cluster.nodes[node_id]
        for held in host.disk.copies.values():
            for ref in held:
                self.checker.spoil(node_id, ref)
        host.lose()

    def spoil(self, node_id: str, ref: Ref) -> None:
        """Let a copy rot and be found rotten, and put that on record."""
        disk = self.cluster.nodes[node_id].disk
        copy = disk.find(self.checker.living[0].partition_of(ref[1]), ref)
        assert copy is not None
        copy.data = copy.data[:-1] + bytes([copy.data[-1] ^ 1])
        copy.aside = True
        disk.set_aside[ref] = None
        self.checker.spoil(node_id, ref)

    def is_data(self, ref: Ref) -> bool:
        """Whether a block holds content rather than index."""
        return kind_of(self.cluster.oracle.bodies[ref].data) != Kind.INDEX

    def hold(self, method: str, until: Callable[[], bool]) -> list[Any]:
        """Hold every request of this method back, where it arrives, until something holds; return what is held."""
        held: list[Any] = []

        async def gate(source: str, target: str, name: str, request: Any) -> None:
            named = request.path.rpartition("/")[2] if isinstance(request, Request) else name
            if named == method and not until():
                held.append(request)
                await self.until(until)

        self.cluster.network.gate = gate
        return held


class Broken(Exception):
    """Invariants that broke while a script was played."""


Script: TypeAlias = Callable[[Stage], Awaitable[None]]


def play(script: Script, shape: Shape | None = None, *, show: Callable[[str], None] | None = None) -> Stage:
    """Play a script to its end, or until it fails; return the stage as it was left.

    Raises:
        Broken: with every invariant that broke on the way.
    """
    stage = Stage(shape or Shape(), show=show)

    async def whole() -> None:
        await stage.cluster.start()
        try:
            await script(stage)
        finally:
            await stage.cluster.tear_down()

    with quiet():
        try:
            stage.loop.run_until_complete(whole())
        except Exception as error:
            if stage.checker.violations:
                raise Broken(stage.checker.violations) from error
            raise
        finally:
            stage.loop.close()
    wrong = [*stage.checker.violations, *stage.cluster.oracle.complaints, *stage.cluster.world.faults]
    if wrong:
        raise Broken(wrong)
    return stage
