"""Leaves of a volume's index by their number: fetched in groups of neighbours, each group once, and kept."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Mapping
from typing import Final

from holdfast.index import IndexReader, block_count_of
from holdfast_core.model.limits import TREE_FAN_OUT
from holdfast_core.model.tree import VolumeLeaf, VolumeWalk, decode_volume_leaf
from holdfast_proto.v1.records_pb2 import VolumeRecord

GROUP_LEAVES: Final = 16
_GROUPS_MAX: Final = 64
_INNER_NODES_MAX: Final = 1024

Group = Mapping[int, VolumeLeaf]
"""Leaves by their number; leaves of zeros are not there."""


class LeafMap:
    """The leaves of one volume. Belongs to an event loop; calls may overlap."""

    def __init__(self, index: IndexReader, volume: VolumeRecord) -> None:
        """Bind to a volume; nothing is fetched yet."""
        self._index = index
        self._root = volume.root
        self._what = f"the index of volume {volume.name}"
        self._positions = block_count_of(volume)
        self._inner: OrderedDict[bytes, bytes] = OrderedDict()
        self._groups: OrderedDict[int, Group] = OrderedDict()
        self._fetching: dict[int, asyncio.Task[Group]] = {}

    async def group(self, number: int) -> Group:
        """Return the leaves `number * GROUP_LEAVES` and on.

        Raises:
            HoldfastError: CORRUPT, MISSING or UNREACHABLE, naming the index nodes.
        """
        known = self._groups.get(number)
        if known is not None:
            self._groups.move_to_end(number)
            return known
        task = self._fetching.get(number)
        if task is None:
            task = asyncio.create_task(self._fetch(number))
            self._fetching[number] = task
            task.add_done_callback(lambda done: self._fetched(number, done))
        # One reader that gives up must not take the leaves away from the others that wait for them.
        return await asyncio.shield(task)

    def _fetched(self, number: int, task: asyncio.Task[Group]) -> None:
        self._fetching.pop(number, None)
        if task.cancelled() or task.exception() is not None:
            return
        self._groups[number] = task.result()
        while len(self._groups) > _GROUPS_MAX:
            self._groups.popitem(last=False)

    async def _fetch(self, number: int) -> Group:
        first = number * GROUP_LEAVES
        refs = [ref async for found in self._present(first, first + GROUP_LEAVES) for ref in found]
        plain = await self._index.nodes([leaf_id for _, leaf_id in refs], what=self._what) if refs else {}
        return {
            number: decode_volume_leaf(leaf_id, plain[leaf_id], leaf_index=number, block_count_total=self._positions)
            for number, leaf_id in refs
        }

    async def _present(self, first: int, end: int) -> AsyncGenerator[list[tuple[int, bytes]], None]:
        """Yield number and id of the leaves `first` to before `end` that there are, ascending."""
        walk = VolumeWalk(self._root, self._positions, first_leaf=first, end_leaf=end)
        while True:
            if walk.leaves:
                yield walk.take_leaves()
            if walk.done:
                return
            walk.feed(await self._inner_nodes(walk.wanted()))

    async def _inner_nodes(self, ids: list[bytes]) -> dict[bytes, bytes]:
        nodes = {}
        for node_id in ids:
            plain = self._inner.get(node_id)
            if plain is not None:
                self._inner.move_to_end(node_id)
                nodes[node_id] = plain
        rest = [node_id for node_id in ids if node_id not in nodes]
        if rest:
            fetched = await self._index.nodes(rest, what=self._what)
            self._inner.update(fetched)
            nodes.update(fetched)
            while len(self._inner) > _INNER_NODES_MAX:
                self._inner.popitem(last=False)
        return nodes

    async def slots(self, first: int, end: int) -> AsyncGenerator[tuple[int, VolumeLeaf], None]:
        """Yield the leaves that hold the positions `first` to before `end`, ascending; leaves of zeros cost nothing.

        Raises:
            HoldfastError: as `group`.
        """
        if first >= end:
            return
        async for refs in self._present(first // TREE_FAN_OUT, -(-end // TREE_FAN_OUT)):
            for number, _ in refs:
                yield number, (await self.group(number // GROUP_LEAVES))[number]

    async def close(self) -> None:
        """Stop fetching."""
        tasks = list(self._fetching.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
