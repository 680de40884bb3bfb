"""What a coordinator knows of nodes and layouts: a copy kept fresh by watches, never itself the truth.

The copy may lag behind the store by the time a watch needs. Whoever depends on it compares `LayoutSet.revision` in a
transaction, or calls `fresh` first. A copy is replaced as a whole and never changed, so readers need no lock.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from holdfast_coordinator import keyspace
from holdfast_coordinator.records import parse
from holdfast_core.model.layout import Layout
from holdfast_core.runtime.metadata.store import KeyValue, MetadataStore, WatchBatch
from holdfast_proto.v1 import common_pb2
from holdfast_proto.v1.records_pb2 import GrantRecord, NodeRecord

_PREFIXES: Final = (keyspace.LAYOUT_PREFIX, keyspace.NODE_PREFIX)


@dataclass(frozen=True, slots=True)
class LayoutSet:
    """The living layouts, newest first, and the revision that a transaction compares (0 before the first layout).

    `granted_epoch` is the epoch under which nodes may let go of what they own in no living layout; 0 for none.
    """

    revision: int = 0
    layouts: tuple[Layout, ...] = ()
    messages: tuple[common_pb2.Layout, ...] = ()
    granted_epoch: int = 0

    @property
    def newest(self) -> Layout | None:
        """The layout that writes go to."""
        return self.layouts[0] if self.layouts else None


@dataclass(frozen=True, slots=True)
class ClusterState:
    """Nodes and layouts as of one moment; `nodes` are those of `records`, by name, each with its state.

    `essence` is what watchers want to hear of the nodes.
    """

    layout_set: LayoutSet
    records: Mapping[str, NodeRecord]
    nodes: tuple[common_pb2.NodeStatus, ...]
    essence: tuple[object, ...] = ()

    @property
    def states(self) -> Mapping[str, common_pb2.NodeState]:
        """What was decided of each registered node, by name."""
        return {node.node_id: node.state for node in self.nodes}

    @property
    def up(self) -> frozenset[str]:
        """Names of the nodes whose lease is alive."""
        return frozenset(node.node_id for node in self.nodes if node.up)


@dataclass(frozen=True, slots=True)
class _Node:
    """One registered node: its record, what `ClusterState.nodes` says of it, and what watchers want to hear of it."""

    record: NodeRecord
    status: common_pb2.NodeStatus
    essence: tuple[object, ...]


def _node_from(items: Mapping[str, KeyValue], node_id: str) -> _Node | None:
    """Put a node's record, last status, lease and state together; None for one that is not registered. Pure.

    A node counts as up exactly while its lease key is there; one that is down keeps what it last said. What was decided
    of it comes from its state alone, whatever it says.
    """
    registered = items.get(keyspace.node_record(node_id))
    if registered is None:
        return None
    record = parse(registered, NodeRecord).message
    status = common_pb2.NodeStatus()
    reported = items.get(keyspace.node_status(node_id))
    if reported is not None:
        status.CopyFrom(parse(reported, common_pb2.NodeStatus).message)
    status.node_id, status.zone, status.capacity_bytes = record.node_id, record.zone, record.capacity_bytes
    status.up = keyspace.node_lease(node_id) in items
    decided = items.get(keyspace.node_state(node_id))
    state = common_pb2.NodeState() if decided is None else parse(decided, common_pb2.NodeState).message
    status.state.CopyFrom(state)
    essence = (
        node_id,
        *(status.address, status.zone, status.up, status.full, status.layout_epoch),
        *(state.draining, state.weight_bytes, state.out),
    )
    return _Node(record, status, essence)


def layouts_from(items: Mapping[str, KeyValue]) -> LayoutSet:
    """Parse the layout set; pure."""
    head = items.get(keyspace.LAYOUT_HEAD)
    if head is None:
        return LayoutSet()
    keys = sorted((key for key in items if key.startswith(keyspace.LAYOUT_EPOCHS_PREFIX)), reverse=True)
    messages = tuple(parse(items[key], common_pb2.Layout).message for key in keys)
    grant = items.get(keyspace.LAYOUT_GRANT)
    return LayoutSet(
        head.mod_revision,
        tuple(map(Layout.from_message, messages)),
        messages,
        0 if grant is None else parse(grant, GrantRecord).message.epoch,
    )


class ClusterView:
    """The copy. `run` keeps it fresh; `fresh` asks the store at once."""

    def __init__(self, store: MetadataStore) -> None:
        """Begin with an empty copy, older than everything."""
        self._store = store
        self._items: dict[str, dict[str, KeyValue]] = {prefix: {} for prefix in _PREFIXES}
        self._known_to: dict[str, int] = dict.fromkeys(_PREFIXES, 0)
        # Put together anew only where something changed: every heartbeat does change something, of one node.
        self._nodes: dict[str, _Node] = {}
        self._changed = asyncio.Event()
        self._state = ClusterState(LayoutSet(), MappingProxyType({}), ())

    @property
    def state(self) -> ClusterState:
        """The copy as it is now."""
        return self._state

    async def fresh(self) -> ClusterState:
        """Read everything at one revision, take it over, and return it."""
        snapshot = await self._store.snapshot(_PREFIXES)
        for prefix in _PREFIXES:
            self._take(
                prefix, snapshot.revision, (item for item in snapshot.items if item.key.startswith(prefix)), relist=True
            )
        return self._state

    async def current_layouts(self) -> LayoutSet:
        """Return the layout set as it is in the store, at the cost of one small read where the copy is fresh."""
        head = await self._store.get(keyspace.LAYOUT_HEAD)
        if (0 if head is None else head.mod_revision) != self._state.layout_set.revision:
            await self.fresh()
        return self._state.layout_set

    async def changed_since(self, layouts: Sequence[Layout]) -> bool:
        """Return whether others than these are the living layouts in the store; the copy then has them."""
        living = (await self.current_layouts()).layouts
        return [layout.epoch for layout in living] != [layout.epoch for layout in layouts]

    async def run(self) -> None:
        """Keep the copy fresh until cancelled or until the store is closed."""
        async with asyncio.TaskGroup() as group:
            for prefix in _PREFIXES:
                group.create_task(self._follow(prefix))

    async def changes(self) -> AsyncIterator[ClusterState]:
        """Yield the copy, then again after each change that concerns a caller; changes in between are skipped."""
        told: object = None
        while True:
            changed, state = self._changed, self._state
            if (essence := _essence(state)) != told:
                told = essence
                yield state
            await changed.wait()

    async def _follow(self, prefix: str) -> None:
        async with aclosing(self._store.watch(prefix)) as batches:
            async for batch in batches:
                self._apply(prefix, batch)

    def _apply(self, prefix: str, batch: WatchBatch) -> None:
        if batch.revision <= self._known_to[prefix]:
            return  # `fresh` was ahead of the watch
        if batch.relisted:
            self._take(prefix, batch.revision, batch.puts, relist=True)
            return
        for key in batch.deletes:
            self._items[prefix].pop(key, None)
        self._take(prefix, batch.revision, batch.puts, relist=False, deleted=batch.deletes)

    def _take(
        self, prefix: str, revision: int, items: Iterable[KeyValue], *, relist: bool, deleted: Iterable[str] = ()
    ) -> None:
        if revision < self._known_to[prefix]:
            return
        taken = {item.key: item for item in items}
        if relist:
            deleted = self._items[prefix].keys() - taken.keys()
            self._items[prefix] = taken
        else:
            self._items[prefix].update(taken)
        self._known_to[prefix] = revision
        state = self._state
        if prefix == keyspace.LAYOUT_PREFIX:
            head = self._items[prefix].get(keyspace.LAYOUT_HEAD)
            if (0 if head is None else head.mod_revision) == state.layout_set.revision:
                return
            self._state = replace(state, layout_set=layouts_from(self._items[prefix]))
        else:
            self._put_together(_named_in([*taken, *deleted]))
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _put_together(self, changed: Iterable[str]) -> None:
        """Take over what changed of these nodes."""
        items = self._items[keyspace.NODE_PREFIX]
        for node_id in changed:
            node = _node_from(items, node_id)
            if node is None:
                self._nodes.pop(node_id, None)
            else:
                self._nodes[node_id] = node
        nodes = sorted(self._nodes.items())
        self._state = ClusterState(
            self._state.layout_set,
            MappingProxyType({name: node.record for name, node in nodes}),
            tuple(node.status for _, node in nodes),
            tuple(node.essence for _, node in nodes),
        )


def _essence(state: ClusterState) -> tuple[object, ...]:
    """What a watcher wants to hear of: not every heartbeat's counters."""
    return state.layout_set.revision, state.essence


def _named_in(keys: Iterable[str]) -> set[str]:
    """Return the nodes that keys below `keyspace.NODE_PREFIX` are about."""
    return {key.rpartition("/")[2] for key in keys}
