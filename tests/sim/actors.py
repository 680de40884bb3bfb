"""Who acts in a history: hosts that save, restore, stall, forget and crash, and operators that change the cluster."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any, Final

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_proto.v1 import cluster_pb2, collection_pb2
from holdfast_proto.v1.cluster_pb2_grpc import ClusterServiceStub
from holdfast_proto.v1.collection_pb2_grpc import CollectionServiceStub
from tests.sim.checker import Checker
from tests.sim.clients import CALL_TIMEOUT_S, GaveUp, Manners, change_content, make_content
from tests.sim.cluster import REPLICAS, SimCluster

# What a client may be told without anything being wrong: its own doing, or trouble that passes.
_NO_FAULT: Final = frozenset(
    {
        ErrorCode.UNREACHABLE,
        ErrorCode.CONFLICT,
        ErrorCode.NOT_READY,
        ErrorCode.NO_QUORUM,
        ErrorCode.DISK_FULL,
        ErrorCode.SESSION_LAPSED,
        ErrorCode.BUSY,
        ErrorCode.NO_PARENT,
        ErrorCode.NOT_FOUND,
        ErrorCode.WRONG_EPOCH,
        ErrorCode.LIMIT_EXCEEDED,
    }
)


class Host:
    """A machine with one VM, which acts until it is told to end."""

    def __init__(
        self, cluster: SimCluster, vm_id: str, tenant: str, pool: list[bytes], ending: Callable[[], bool]
    ) -> None:
        """Have a VM with some content."""
        self._cluster = cluster
        self._vm_id = vm_id
        self._tenant = tenant
        self._pool = pool
        self._ending = ending
        self._dice = cluster.random(f"{tenant}/{vm_id}")
        self._client = cluster.client(vm_id, tenant)
        self._client.content = make_content(self._dice, pool, count=self._dice.randint(6, 14))
        self._snapshots: list[str] = []
        self._points: list[tuple[str, str]] = []
        self._objects: list[str] = []

    async def run(self) -> None:
        """Act until the end."""
        await self._try(self._client.register())
        while not self._ending():
            await asyncio.sleep(self._dice.expovariate(1 / 2.5))
            act = self._dice.choices(
                [self._save, self._restore, self._forget, self._store, self._read, self._forget_object],
                [12, 3, 3, 2, 2, 1],
            )[0]
            if self._dice.random() < 0.06:
                await self._crash_in(act())
            else:
                await self._try(act())

    async def _try(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something; complain of what may not come of it."""
        task = self._client.process.spawn(work)
        await asyncio.wait([task])
        error = task.exception()
        if isinstance(error, HoldfastError):
            self._client.note(f"is refused: {error.code.name}")
            if error.code not in _NO_FAULT:
                self._cluster.oracle.complain(f"{self._vm_id} was told {error.code.name}: {error.message}")
        elif isinstance(error, GaveUp):
            self._client.note(f"gives up: {error}")

    async def _crash_in(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin something, and crash in the middle of it; the VM goes on elsewhere."""
        task = self._client.process.spawn(work)
        await asyncio.wait([task], timeout=self._dice.choice([0.01, 0.05, 0.3, 3.0]))
        if not task.done():
            self._client.process.crash()
        content = self._client.content
        self._client = self._cluster.client(self._vm_id, self._tenant)
        self._client.content = content

    async def _save(self) -> None:
        dice = self._dice
        self._client.content = change_content(self._client.content, dice, self._pool)
        manners = Manners(
            stall_s=dice.choice([0.0, 0.0, 0.0, 0.0, 2.0, 8.0, 25.0]),
            keeps_alive=dice.random() < 0.85,
            pause_s=dice.choice([0.0, 0.0, 0.5, 3.0]),
        )
        if self._snapshots and dice.random() < 0.8:
            snapshot_id = self._snapshots[-1]
            try:
                made = await self._client.backup(snapshot_id, manners)
            except HoldfastError as error:
                if error.code in (ErrorCode.NO_PARENT, ErrorCode.NOT_FOUND):
                    self._snapshots.remove(snapshot_id)
                raise
        else:
            made = snapshot_id = await self._client.snapshot(manners, base_id=self._template())
            self._snapshots.append(made)
        self._points.append((snapshot_id, made))

    def _template(self) -> str:
        """Return a point of another VM of the tenant to build on, or none."""
        oracle = self._cluster.oracle
        others = [
            made for made in oracle.acknowledged if made in oracle.points and oracle.tenants.get(made) == self._tenant
        ]
        return self._dice.choice(others) if others and self._dice.random() < 0.5 else ""

    async def _restore(self) -> None:
        if self._points:
            await self._client.restore(*self._dice.choice(self._points))

    async def _forget(self) -> None:
        if len(self._points) > 1:
            point = self._points.pop(self._dice.randrange(len(self._points)))
            await self._client.forget(point[1])

    async def _store(self) -> None:
        cuts = [self._dice.choice(self._pool) + self._dice.randbytes(4) for _ in range(self._dice.randint(1, 4))]
        self._objects.append(await self._client.store_object(f"task-{self._vm_id}", cuts))

    async def _read(self) -> None:
        if self._objects:
            await self._client.read_object(self._dice.choice(self._objects))

    async def _forget_object(self) -> None:
        if self._objects:
            await self._client.forget_object(self._objects.pop(self._dice.randrange(len(self._objects))))


class Operator:
    """Who changes the cluster, and collects."""

    def __init__(self, cluster: SimCluster, checker: Checker, *, pause_s: float) -> None:
        """Act about every `pause_s` seconds."""
        self._cluster = cluster
        self._checker = checker
        self._pause_s = pause_s
        self._dice = cluster.random("operator")
        self._client = cluster.client("operator")

    async def run(self) -> None:
        """Act until cancelled."""
        acts: list[Callable[[], Coroutine[Any, Any, None]]] = [
            self.collect,
            self.set_draining,
            self.set_weight,
            self.add_node,
            self.apply_layout,
            self.remove_nodes,
        ]
        while True:
            await asyncio.sleep(self._dice.expovariate(1 / self._pause_s))
            (act,) = self._dice.choices(acts, [8, 3, 2, 2, 2, 1])
            await self.attempt(act())

    async def attempt(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something that may be refused."""
        try:
            await work
        except HoldfastError as error:
            self._client.note(f"operator is refused: {error.code.name}")

    async def collect(self) -> None:
        """Begin a collection."""
        request = collection_pb2.StartCollectionRequest()
        answer = await self._call(lambda channel: CollectionServiceStub(channel).StartCollection, request)
        self._client.note(f"collects: {answer.epoch}")

    async def collecting(self) -> bool:
        """Whether a collection runs."""
        request = collection_pb2.GetCollectionRequest()
        answer = await self._call(lambda channel: CollectionServiceStub(channel).GetCollection, request)
        return bool(answer.HasField("running"))

    async def set_draining(self) -> None:
        """Drain a node, or undrain one."""
        node_id = self._dice.choice(list(self._cluster.nodes))
        draining = self._dice.random() < 0.6
        self._client.note(f"{'drains' if draining else 'undrains'} {node_id}")
        await self.set_node(cluster_pb2.SetNodeRequest(node_id=node_id, draining=draining))

    async def undrain(self, node_id: str) -> None:
        """Undrain a node."""
        await self.set_node(cluster_pb2.SetNodeRequest(node_id=node_id, draining=False))

    async def set_weight(self) -> None:
        """Change a node's weight."""
        node_id = self._dice.choice(list(self._cluster.nodes))
        weight = self._dice.choice([0, 32 << 20, 128 << 20])
        await self.set_node(cluster_pb2.SetNodeRequest(node_id=node_id, weight_bytes=weight))

    async def add_node(self) -> None:
        """Bring a new node, and let the layout have it."""
        if len(self._cluster.nodes) >= 8:
            return
        self._cluster.watched_node().start()
        await self._client.process.sleep(4.0)
        await self.apply_layout()

    async def apply_layout(self) -> None:
        """Plan and apply a layout over what is registered, without what is lost."""
        lost = [host.name for host in self._cluster.nodes.values() if host.lost]
        without = [name for name in lost if self._cluster.is_registered(name)]
        request = cluster_pb2.PlanLayoutRequest(remove_node_ids=without)
        plan = await self._call(lambda channel: ClusterServiceStub(channel).PlanLayout, request)
        apply = cluster_pb2.ApplyLayoutRequest(previous_epoch=plan.previous_epoch, remove_node_ids=without)
        await self._call(lambda channel: ClusterServiceStub(channel).ApplyLayout, apply)

    async def replace_lost(self) -> None:
        """Make a layout without the nodes that are lost, where the steward may not: fewer than R would remain."""
        for host in self._cluster.nodes.values():
            if not host.lost and self._cluster.is_registered(host.name):
                await self.undrain(host.name)
        await self.apply_layout()

    async def remove_nodes(self) -> None:
        """Remove the nodes that are lost for good."""
        for host in list(self._cluster.nodes.values()):
            if host.lost:
                request = cluster_pb2.RemoveNodeRequest(node_id=host.name, lost=True)
                await self._call(lambda channel: ClusterServiceStub(channel).RemoveNode, request)

    async def set_node(self, request: cluster_pb2.SetNodeRequest) -> None:
        """Change what is decided of a node."""
        await self._call(lambda channel: ClusterServiceStub(channel).SetNode, request)

    async def _call(self, method: Any, request: Any) -> Any:
        return await self._cluster.endpoints(self._client).call(method, request, timeout_s=CALL_TIMEOUT_S)


def enough_nodes(cluster: SimCluster) -> bool:
    """Whether as many machines are left as there are replicas."""
    return sum(not host.lost for host in cluster.nodes.values()) >= REPLICAS


def make_pool(dice: random.Random) -> list[bytes]:
    """Return contents that VMs share."""
    return [dice.randbytes(48) for _ in range(24)]
