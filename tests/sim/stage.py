"""A stage for one scripted interleaving: a cluster without faults, watched, on which a test says what happens when."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any, Final

from holdfast_core.model.errors import HoldfastError
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
        self.operator = Operator(self.cluster, self.checker, pause_s=1.0)
        self.dice = random.Random(seed)

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

    def hold(self, method: str, until: Callable[[], bool]) -> list[Request]:
        """Hold every request of this method back, where it arrives, until something holds; return what is held."""
        held: list[Request] = []

        async def gate(source: str, target: str, request: Any) -> None:
            if isinstance(request, Request) and request.path.endswith(f"/{method}") and not until():
                held.append(request)
                await self.until(until)

        self.cluster.network.gate = gate
        return held


def play(
    script: Callable[[Stage], Awaitable[None]], shape: Shape | None = None, *, show: Callable[[str], None] | None = None
) -> Stage:
    """Play a script to its end; fail with whatever invariant broke on the way. Returns the stage as it was left."""
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
        finally:
            stage.loop.close()
    wrong = [*stage.checker.violations, *stage.cluster.oracle.complaints, *stage.cluster.world.faults]
    assert not wrong, wrong
    return stage
