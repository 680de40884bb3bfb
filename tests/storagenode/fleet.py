"""Several nodes in one event loop without any network, and a coordinator's answers made by the test.

The nodes are the real ones (`NodeCore`, `Healing`) over stores in memory; what they ask one another goes straight from
one to the other, unless the test puts something in between. Nothing runs by itself: a test steps workers and moves
time.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.layout import Layout, LayoutNode
from holdfast_core.runtime.background import RETRY_S, Worker
from holdfast_core.runtime.capability import KINDS, Capability
from holdfast_core.runtime.clock import ManualClock
from holdfast_core.runtime.logs import get_log
from holdfast_proto.v1.cluster_pb2 import HeartbeatResponse
from holdfast_proto.v1.common_pb2 import NodeStatus
from holdfast_storagenode.batch import Batch, batch_of
from holdfast_storagenode.core import NodeCore
from holdfast_storagenode.healing.peers import Comparison, Fetched, FreshEpoch
from holdfast_storagenode.healing.workers import Healing, HealingOptions
from holdfast_storagenode.home import MemoryHome
from holdfast_storagenode.memory import MemoryStore
from holdfast_storagenode.store import BlockEntry, Found, Sealed, Verdict
from tests.storagenode.cluster import CLUSTER_ID

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

PARTITIONS = 8
_STEPS_MAX = 2000


class AtOnce:
    """An executor without threads."""

    async def run(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Return what `function` returns."""
        return function(*args, **kwargs)

    async def run_and_settle(
        self, function: Callable[Arguments, Future[Result]], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Return what the future of `function` will hold."""
        return await asyncio.wrap_future(function(*args, **kwargs))


def table(epoch: int, owners: Sequence[Sequence[str]], *, nodes: Sequence[str]) -> Layout:
    """Return a layout with these owners, partition by partition."""
    positions = [nodes.index(owner) for partition in owners for owner in partition]
    return Layout(
        epoch=epoch,
        seed=7,
        partitions=len(owners),
        replicas=len(owners[0]),
        nodes=tuple(LayoutNode(node, node, 1 << 30) for node in nodes),
        owners=struct.pack(f"<{len(positions)}H", *positions),
    )


def everywhere(epoch: int, nodes: Sequence[str]) -> Layout:
    """Return a layout in which all of `nodes` own everything."""
    return table(epoch, [tuple(nodes)] * PARTITIONS, nodes=nodes)


class Node:
    """One node of a fleet."""

    def __init__(self, fleet: Fleet, node_id: str, options: HealingOptions) -> None:
        self.home = MemoryHome(node_id, random_bytes=lambda size: bytes(size))
        self.core = NodeCore(self.home, AtOnce())
        self.healing = Healing(
            self.core,
            self.home,
            fleet.peers_of(node_id),
            fresh_epoch=fleet.fresh_epoch_of(node_id),
            clock=fleet.clock,
            log=fleet.log,
            options=options,
        )
        self.sync, self.repair, self.scrub = self.healing.workers

    @property
    def store(self) -> MemoryStore:
        """Its store."""
        store = self.core.store
        assert isinstance(store, MemoryStore)
        return store

    def ids(self, tenant: int = 1) -> set[bytes]:
        """Return what it holds whole."""
        return {entry.block_id for entry in self.store.scan(tenant, partition=None, after=b"", limit=100_000)}

    def stamps(self, tenant: int = 1) -> dict[bytes, int]:
        """Return the stamps of what it holds whole, floors included."""
        return {entry.block_id: entry.stamp for entry in self.store.scan(tenant, partition=None, after=b"", limit=9999)}


class Fleet:
    """Nodes, what a coordinator tells them, and who reaches whom.

    Attributes:
        nodes: by name.
        down: nodes that coordinators say are down, and that nobody reaches.
        removed: nodes that an operator removed.
        cut: pairs (from, to) that do not reach one another although both are up.
        epoch: the collection epoch.
        calls: (from, to, verb) of each call between nodes.
        meddle: what stands between a node's answer to a fetch and who asked: (to, id, bytes) to what arrives.
    """

    def __init__(self, *names: str, options: HealingOptions | None = None) -> None:
        self.clock = ManualClock()
        self.log = get_log("test")
        self.down: set[str] = set()
        self.removed: set[str] = set()
        self.cut: set[tuple[str, str]] = set()
        self.epoch = 0
        self.calls: list[tuple[str, str, str]] = []
        self.meddle: Callable[[str, bytes, Fetched], Fetched] = lambda node, block_id, item: item
        self.coordinator_down = False
        self._answer = HeartbeatResponse(cluster_id=CLUSTER_ID)
        chosen = options if options is not None else HealingOptions(gentleness=0.0)
        self.nodes = {name: Node(self, name, chosen) for name in names}

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def tell(self, *layouts: Layout, granted: int = 0) -> None:
        """Make these the living layouts, newest first; nodes hear of it with their next heartbeat."""
        self._answer.layout.CopyFrom(layouts[0].to_message())
        del self._answer.older_layouts[:]
        self._answer.older_layouts.extend(layout.to_message() for layout in layouts[1:])
        self._answer.granted_epoch = granted
        self._answer.layout_revision += 1

    async def beat(self, *names: str) -> None:
        """Let nodes hear from the coordinator; all that are up where none is named."""
        for name in names or [each for each in self.nodes if each not in self.down]:
            await self.nodes[name].core.learn(self.answer())

    def answer(self) -> HeartbeatResponse:
        """Return what a coordinator answers now."""
        if self.coordinator_down:
            raise HoldfastError(ErrorCode.UNREACHABLE, "no coordinator")
        answer = HeartbeatResponse()
        answer.CopyFrom(self._answer)
        answer.collection_epoch = self.epoch
        answer.peer_capability = "token"
        answer.nodes.extend(
            NodeStatus(node_id=name, address=name, up=name not in self.down)
            for name in self.nodes
            if name not in self.removed
        )
        return answer

    def fresh_epoch_of(self, node_id: str) -> FreshEpoch:
        """Return what asks the coordinator for the present epoch."""

        async def fresh() -> int:
            await self.nodes[node_id].core.learn(self.answer())
            return self.epoch

        return fresh

    def peers_of(self, node_id: str) -> DirectPeers:
        """Return the peers of a node."""
        return DirectPeers(self, node_id)

    async def put(
        self, names: Sequence[str], blocks: Sequence[Sealed], *, layout_epoch: int = 1, stamp: int = 0
    ) -> None:
        """Put blocks on nodes as a client does."""
        for name in names:
            batch = batch_of(layout_epoch, [(block.id, block.data) for block in blocks])
            await self.nodes[name].core.put(1, batch, collection_epoch=stamp)

    async def settle(self, *names: str) -> None:
        """Step the sync workers of nodes until they have nothing to do; time moves as they ask."""
        for name in names or [each for each in self.nodes if each not in self.down]:
            for _ in range(_STEPS_MAX):
                pause_s = await self.step(self.nodes[name].sync)
                if pause_s:
                    break
            else:
                raise AssertionError(f"{name} never came to rest")

    async def step(self, worker: Worker) -> float:
        """Let a worker take one step as `run_worker` does; return the seconds that it wants to wait."""
        try:
            return await worker.step()
        except HoldfastError as error:
            if not error.retryable:
                raise
            return RETRY_S


class DirectPeers:
    """The peers of one node, asked directly."""

    def __init__(self, fleet: Fleet, caller: str) -> None:
        self._fleet = fleet
        self._caller = caller

    def _reach(self, node_id: str, verb: str) -> Node:
        self._fleet.calls.append((self._caller, node_id, verb))
        if node_id in self._fleet.down or (self._caller, node_id) in self._fleet.cut:
            raise HoldfastError(ErrorCode.UNREACHABLE, f"{node_id} does not answer")
        return self._fleet.nodes[node_id]

    async def compare(self, node_id: str, partitions: Sequence[int], *, layout_epoch: int) -> Comparison:
        """See `Peers`."""
        side = self._reach(node_id, "compare").healing.peer_side
        return await side.compare(self._caller, partitions, layout_epoch=layout_epoch)

    async def listing(
        self, node_id: str, *, partitions: Sequence[int], tenant: int
    ) -> AsyncGenerator[list[BlockEntry], None]:
        """See `Peers`."""
        side = self._reach(node_id, "list").healing.peer_side
        left: Sequence[int] = tuple(partitions)
        after = b""
        while left:
            page, left = await side.page(self._caller, partitions=left, tenant=tenant, after=after)
            if page:
                after = page[-1].block_id
                yield page

    async def fetch(self, node_id: str, *, tenant: int, ids: Sequence[bytes], bytes_max: int) -> list[Fetched]:
        """See `Peers`."""
        side = self._reach(node_id, "fetch").healing.peer_side
        items: list[Fetched] = []
        while len(items) < len(ids):
            _, found = await side.fetch(self._caller, tenant=tenant, ids=ids[len(items) :], shape=_found)
            items += [item if isinstance(item, Verdict) else item.data for item in found]
        return [self._fleet.meddle(node_id, block_id, item) for block_id, item in zip(ids, items, strict=True)]

    async def confirm(
        self, node_id: str, *, tenant: int, ids: Sequence[bytes], layout_epoch: int, collection_epoch: int
    ) -> list[Verdict]:
        """See `Peers`."""
        side = self._reach(node_id, "confirm").healing.peer_side
        return await side.confirm(tenant=tenant, ids=ids, layout_epoch=layout_epoch, collection_epoch=collection_epoch)

    async def hand(self, node_id: str, *, tenant: int, batch: Batch, collection_epoch: int) -> list[Verdict]:
        """See `Peers`."""
        side = self._reach(node_id, "hand").healing.peer_side
        return await side.hand(tenant=tenant, batch=batch, collection_epoch=collection_epoch)


def capability(tenant: int = 1, *, collection_epoch: int = 0) -> Capability:
    """Return what a client may do: everything, for one tenant."""
    verbs = frozenset({"put", "get", "has", "scan", "delete"})
    return Capability(
        tenant=tenant,
        verbs=verbs,
        kinds=KINDS,
        read_kinds=KINDS,
        expires_unix_ms=1 << 50,
        collection_epoch=collection_epoch,
    )


def _found(found: list[Found]) -> list[Found]:
    return found
