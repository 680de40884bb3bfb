"""One history from one seed: actors act, faults strike, then faults stop and everything has to come right."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

from holdfast_core.model.errors import HoldfastError
from holdfast_proto.v1 import tenants_pb2
from holdfast_proto.v1.tenants_pb2_grpc import TenantServiceStub
from tests.sim.actors import Host, Operator, make_pool
from tests.sim.checker import Checker
from tests.sim.cluster import TENANTS, Shape, SimCluster
from tests.sim.faults import Danger, Faults, draw_danger
from tests.sim.loop import Stuck, new_loop
from tests.sim.oracle import Ref

TENANT_NUMBERS: Final = (1, 2)
_SETTLE_S: Final = 400.0
_STEWARD_S: Final = 60.0
_UNDER_WAY_S: Final = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a seed stands for."""

    seed: int
    shape: Shape
    danger: Danger
    hosts: int
    active_s: float
    operator_pause_s: float
    shuffled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a history went.

    Attributes:
        seed: its seed.
        violations: what broke; empty if all is well.
        digest: stands for its whole trace.
        time_s: how much virtual time it took.
        steps: how many callbacks ran.
        committed: how many points and objects were made.
        faults: how many faults struck.
    """

    seed: int
    violations: tuple[str, ...]
    digest: str
    time_s: float
    steps: int
    committed: int
    faults: int


def draw_plan(seed: int) -> Plan:
    """Return what a seed stands for."""
    dice = random.Random(f"plan/{seed}")
    return Plan(
        seed=seed,
        shape=Shape(nodes=dice.choice([3, 4, 4, 5, 6]), coordinators=dice.choice([1, 2, 2, 3])),
        danger=draw_danger(dice),
        hosts=dice.randint(2, 4),
        active_s=dice.choice([25.0, 45.0, 70.0]),
        operator_pause_s=dice.choice([5.0, 10.0, 20.0]),
        shuffled=dice.random() < 0.5,
    )


class History:
    """One run of one plan."""

    def __init__(self, plan: Plan, *, show: Callable[[str], None] | None = None) -> None:
        """Build the world."""
        self.plan = plan
        self.loop = new_loop(shuffled=random.Random(f"order/{plan.seed}") if plan.shuffled else None)
        self.cluster = SimCluster(self.loop, plan.seed, plan.shape, show=show)
        self.checker = Checker(
            self.cluster.world, self.cluster.tables, self.cluster.nodes, self.cluster.oracle, tenants=TENANT_NUMBERS
        )
        for host in self.cluster.nodes.values():
            host.disk.watcher = self.checker
        self.cluster.oracle.on_lean = self.checker.leaned
        self.faults = Faults(self.cluster, self.checker, plan.danger)
        self._ending = False

    async def run(self) -> None:
        """Live through it."""
        try:
            await self._live()
        except (TimeoutError, HoldfastError) as error:
            self.checker.violate(0, f"the history could not go on: {error!r}")
        finally:
            await self.cluster.tear_down()

    async def _live(self) -> None:
        cluster = self.cluster
        await cluster.start()
        await self._make_tenant()
        dice = cluster.random("hosts")
        pools = {tenant: make_pool(dice) for tenant in TENANTS}
        hosts = [
            Host(cluster, f"vm-{number}", tenant, pools[tenant], lambda: self._ending)
            for number in range(1, self.plan.hosts + 1)
            for tenant in (TENANTS[number % 3 == 0],)
        ]
        operator = Operator(cluster, self.checker, pause_s=self.plan.operator_pause_s)
        acting = [self.loop.create_task(host.run()) for host in hosts]
        others = [self.loop.create_task(operator.run()), self.loop.create_task(self.faults.run())]
        await asyncio.sleep(self.plan.active_s)
        for task in others:
            task.cancel()
        await asyncio.wait(others)
        for task in others:
            if not task.cancelled() and (error := task.exception()) is not None:
                cluster.world.fault("actor", error)
        await self.faults.stop()
        self._ending = True
        await asyncio.wait(acting, timeout=_SETTLE_S)
        self._look_at(acting)
        await self._come_right(operator)

    def _look_at(self, acting: list[asyncio.Task[None]]) -> None:
        for task in acting:
            if not task.done():
                self.checker.violate(0, "an actor does not come to an end")
            elif (error := task.exception()) is not None:
                self.cluster.world.fault("actor", error)

    async def _make_tenant(self) -> None:
        client = self.cluster.client("operator")
        request = tenants_pb2.CreateTenantRequest(name=TENANTS[1])
        await self.cluster.endpoints(client).call(
            lambda channel: TenantServiceStub(channel).CreateTenant, request, timeout_s=30.0
        )

    async def _come_right(self, operator: Operator) -> None:
        """With no fault any more, everything has to be as it should within bounded time."""
        cluster, checker = self.cluster, self.checker
        # What was under way when the faults stopped may still arrive, and open a session.
        await asyncio.sleep(_UNDER_WAY_S)
        await self._wait("sessions stay open", lambda: not checker.open_sessions)
        await self._replace_lost(operator)
        await self._wait("older layouts stay alive", lambda: len(checker.living) == 1)
        for _ in range(2):
            await self._collect(operator)
        await self._wait("copies are not as they should be", lambda: not self._wrong())
        checker.forgive()
        checker.check_all()
        checker.check_acknowledged()
        checker.check_log()
        checker.check_tenants()
        await self._read_all()
        cluster.world.note("history", "has come right")

    async def _replace_lost(self, operator: Operator) -> None:
        """Give the steward its time to leave lost nodes out; where it may not, an operator does what one has to."""
        try:
            await self.cluster.until(lambda: not self._lost_members(), within_s=_STEWARD_S, every_s=2.0)
        except TimeoutError:
            for _ in range(20):
                with suppress(HoldfastError):
                    await operator.replace_lost()
                    return
                await asyncio.sleep(2.0)

    def _lost_members(self) -> list[str]:
        newest = self.checker.living[0]
        return [node.node_id for node in newest.nodes if self.cluster.nodes[node.node_id].lost]

    async def _collect(self, operator: Operator) -> None:
        for _ in range(20):
            try:
                await operator.collect()
                while True:
                    await asyncio.sleep(2.0)
                    if not await operator.collecting():
                        break
            except HoldfastError:
                await asyncio.sleep(2.0)
            else:
                return
        self.checker.violate(0, "no collection comes to an end")

    async def _wait(self, what: str, condition: Callable[[], bool]) -> None:
        try:
            await self.cluster.until(condition, within_s=_SETTLE_S, every_s=2.0)
        except TimeoutError:
            wrong = self._wrong() if "copies" in what else ""
            self.checker.violate(0, f"{what} {_SETTLE_S:g} s after the last fault {wrong}")

    def _wrong(self) -> str:
        """Say what is not where it should be; "" if all is."""
        checker = self.checker
        newest = checker.living[0]
        needed = checker.reached()
        for ref in sorted(needed):
            if not checker.whole(ref):
                return f"block {ref[1].hex()[:12]} is not on all of {newest.owners_of_block(ref[1])}"
        for name, host in self.cluster.nodes.items():
            for place, held in host.disk.copies.items():
                for ref in held:
                    if name not in newest.owners_of(place):
                        return f"{name} keeps the foreign block {ref[1].hex()[:12]}"
                    if ref not in needed and not self._is_audit(ref):
                        return f"{name} keeps the garbage {ref[1].hex()[:12]}"
        return ""

    @staticmethod
    def _is_audit(ref: Ref) -> bool:
        return ref[0] == 0

    async def _read_all(self) -> None:
        """Restore and read everything, and compare it with what was there."""
        oracle = self.cluster.oracle
        clients = {tenant: self.cluster.client("reader", tenant) for tenant in TENANTS}
        for made in self.checker.visible:
            client = clients[oracle.tenants[made]]
            good = await (client.restore(made, made) if made in oracle.points else client.read_object(made))
            if not good and made not in oracle.forgetting:
                self.checker.violate(2, f"{made} cannot be read although nothing is broken any more")


@contextmanager
def quiet() -> Iterator[None]:
    """Let a world run without what would tell of its dead, or stop it at moments that no seed decides."""
    old_hook: Any = sys.unraisablehook
    log = logging.getLogger("holdfast")
    old_level = log.level
    # Processes that crashed never end their coroutines, and Python says so when they are thrown away.
    sys.unraisablehook = lambda unraisable: None
    log.setLevel(logging.CRITICAL + 1)
    # What was there before is never looked through again; what a world leaves behind goes when it has ended.
    frozen = gc.get_freeze_count() > 0
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()
        # Thawing is for all or nothing, and what somebody else has frozen is to stay so.
        if not frozen:
            gc.unfreeze()
        log.setLevel(old_level)
        sys.unraisablehook = old_hook


def run_history(plan: Plan, *, show: Callable[[str], None] | None = None) -> Outcome:
    """Live through a plan and say how it went."""
    with quiet():
        return _run(plan, show)


def _run(plan: Plan, show: Callable[[str], None] | None) -> Outcome:
    history = History(plan, show=show)
    try:
        history.loop.run_until_complete(history.run())
    except Stuck as stuck:
        history.checker.violate(0, f"the world is stuck: {stuck}")
    finally:
        history.loop.close()
    return _outcome(history)


def _outcome(history: History) -> Outcome:
    cluster, checker = history.cluster, history.checker
    faults = [f"a fault of the program: {fault}" for fault in cluster.world.faults]
    faults += [f"nobody caught {context.get('exception')!r}" for context in history.loop.faults]
    complaints = [f"a client complains: {complaint}" for complaint in cluster.oracle.complaints]
    return Outcome(
        seed=history.plan.seed,
        violations=(*checker.violations, *complaints, *faults),
        digest=cluster.trace.digest,
        time_s=history.loop.time(),
        steps=history.loop.steps,
        committed=len(cluster.oracle.acknowledged),
        faults=history.faults.count,
    )
