"""Checking a tree from its root down, a node and its children at a time.

What was found whole is remembered by the id of its topmost node, so that content that several points share is checked
once. What is damaged is looked at again for each point that names it, because each is to be told.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from holdfast.content import WINDOW_BYTES, Entry
from holdfast.damage import DamageReport
from holdfast.index import IndexReader
from holdfast.restoring.volumes import Callback
from holdfast.verifying.checks import BlockCheck
from holdfast.verifying.trees import Place, Tree
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.blocks.reader import Unreadable

WHOLE_MAX: Final = 500_000
WINDOWS_IN_FLIGHT: Final = 4
_ID_BYTES: Final = 16


class Whole:
    """Ids of nodes below which everything was found whole, those met last; forgetting one costs checking it again."""

    def __init__(self, most: int = WHOLE_MAX) -> None:
        """Remember at most so many."""
        self._most = most
        self._known: OrderedDict[bytes, None] = OrderedDict()

    def __contains__(self, node_id: bytes) -> bool:
        """Return whether a node is known to be whole."""
        key = node_id[:_ID_BYTES]
        if key not in self._known:
            return False
        self._known.move_to_end(key)
        return True

    def add(self, node_id: bytes) -> None:
        """Remember a node."""
        self._known[node_id[:_ID_BYTES]] = None
        if len(self._known) > self._most:
            self._known.popitem(last=False)


class TreeCheck:
    """Checks trees under one operation's access.

    Attributes:
        blocks: blocks that were checked.
    """

    def __init__(self, index: IndexReader, check: BlockCheck, whole: Whole, progress: Callback | None = None) -> None:
        """Bind to an operation; `whole` is what earlier checks have found."""
        self.blocks = 0
        self._index = index
        self._check = check
        self._whole = whole
        self._progress = progress
        self._slots = asyncio.Semaphore(WINDOWS_IN_FLIGHT)

    async def run(self, tree: Tree, damage: DamageReport) -> None:
        """Check all of a tree; what is damaged is added to `damage`.

        Raises:
            HoldfastError: DENIED, KEY_MISMATCH, …; UNREACHABLE as `damage` has it.
        """
        await self._below(tree, tree.root(), damage)

    async def _below(self, tree: Tree, places: Sequence[Place], damage: DamageReport) -> set[bytes]:
        """Check sibling nodes and all below them; return the ids of those that are not whole."""
        unknown = [place for place in places if place.node_id not in self._whole]
        if not unknown:
            return set()
        plain, unreadable = await self._index.readable([place.node_id for place in unknown])
        opened = _Opened(tree, [(place, plain[place.node_id]) for place in unknown if place.node_id in plain])
        unreadable = replace(unreadable, corrupt=(*unreadable.corrupt, *opened.malformed))
        copies = await self._check.nodes([place for place in unknown if place.node_id in plain])
        if copies is not None:
            unreadable = _joined(unreadable, copies.unreadable)
        bad = {*unreadable.damaged, *unreadable.unreachable}
        if bad:
            places_of: dict[bytes, list[tuple[int, int]]] = {}
            for place in unknown:
                if place.node_id in bad:
                    places_of.setdefault(place.node_id, []).append((place.start, place.end))
            damage.add_index(unreadable, tree.part, places_of)
        bad |= await self._blocks(tree, [each for each in opened.leaves if each[0].node_id not in bad], damage)
        for place, below in opened.inner:
            if place.node_id not in bad and await self._below(tree, below, damage):
                bad.add(place.node_id)
        for place in unknown:
            if place.node_id not in bad:
                self._whole.add(place.node_id)
        return bad

    async def _blocks(
        self, tree: Tree, leaves: Sequence[tuple[Place, list[Entry]]], damage: DamageReport
    ) -> set[bytes]:
        """Check what leaves name, in windows; return the ids of leaves that name something damaged."""
        entries = [entry for _, named in leaves for entry in named]
        lost: set[int] = set()

        async def check(window: Sequence[Entry]) -> None:
            async with self._slots:
                found = await self._check.blocks(window, tree.block_bytes)
                if found is not None:
                    damage.add(found, tree.part)
                    lost.update(entry.key for entry in found.entries)
                self.blocks += len(window)
                if self._progress is not None:
                    self._progress(sum(entry.length for entry in window))

        per_window = max(1, WINDOW_BYTES // tree.block_bytes)
        async with plain_task_group() as group:
            for at in range(0, len(entries), per_window):
                group.create_task(check(entries[at : at + per_window]))
        return {place.node_id for place, named in leaves if lost and any(entry.key in lost for entry in named)}


class _Opened:
    """What sibling nodes name, sorted by what they are."""

    def __init__(self, tree: Tree, nodes: Sequence[tuple[Place, bytes]]) -> None:
        self.inner: list[tuple[Place, list[Place]]] = []
        self.leaves: list[tuple[Place, list[Entry]]] = []
        self.malformed: list[bytes] = []
        for place, plain in nodes:
            try:
                if place.leaf:
                    self.leaves.append((place, tree.entries(place, plain)))
                else:
                    self.inner.append((place, tree.children(place, plain)))
            except HoldfastError as error:
                if error.code is not ErrorCode.CORRUPT:
                    raise
                self.malformed.append(place.node_id)


def _joined(one: Unreadable, other: Unreadable) -> Unreadable:
    return Unreadable(
        (*one.missing, *other.missing),
        (*one.corrupt, *other.corrupt),
        (*one.unreachable, *other.unreachable),
        one.reason or other.reason,
    )
