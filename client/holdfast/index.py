"""Index nodes on the client's side: fetched and opened in groups, a volume's leaves in order with one group ahead."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Final

from holdfast_core.model.block import Opener, SealedBlock
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import TREE_FAN_OUT
from holdfast_core.model.tree import VolumeLeaf, VolumeWalk, decode_volume_leaf
from holdfast_core.runtime.blocks.reader import BlockReader, Unreadable
from holdfast_proto.v1.records_pb2 import VolumeRecord

LEAVES_PER_FETCH: Final = 64
# Whoever reads a volume waits for its first leaves with everything; these are there in a fraction of the time.
_LEAVES_FIRST: Final = 8
DAMAGE: Final = (ErrorCode.CORRUPT, ErrorCode.MISSING)


class IndexReader:
    """Fetches and opens index nodes."""

    def __init__(self, reader: BlockReader, opener: Opener, executor: Executor) -> None:
        """Bind to where nodes come from."""
        self._reader = reader
        self._opener = opener
        self._executor = executor

    async def nodes(self, ids: Iterable[bytes], *, what: str) -> dict[bytes, bytes]:
        """Return plaintexts by id.

        Raises:
            HoldfastError: CORRUPT, MISSING or UNREACHABLE, naming ids.
        """
        sealed = await self._reader.fetch(ids, what=what)
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._open, sealed)

    async def readable(self, ids: Iterable[bytes]) -> tuple[dict[bytes, bytes], Unreadable]:
        """Return the plaintexts that can be had, by id, and what cannot.

        Raises:
            HoldfastError: DENIED and the like; nothing for what is lost or cannot be reached.
        """
        sealed, unreadable = await self._reader.fetch_readable(ids)
        loop = asyncio.get_running_loop()
        plain, corrupt = await loop.run_in_executor(self._executor, self._open_readable, sealed)
        return plain, replace(unreadable, corrupt=(*unreadable.corrupt, *corrupt))

    def _open(self, sealed: Mapping[bytes, SealedBlock]) -> dict[bytes, bytes]:
        return {node_id: self._opener.open(block) for node_id, block in sealed.items()}

    def _open_readable(self, sealed: Mapping[bytes, SealedBlock]) -> tuple[dict[bytes, bytes], list[bytes]]:
        plain: dict[bytes, bytes] = {}
        corrupt: list[bytes] = []
        for node_id, block in sealed.items():
            try:
                plain[node_id] = self._opener.open(block)
            except HoldfastError as error:
                if error.code is not ErrorCode.CORRUPT:
                    raise
                corrupt.append(node_id)
        return plain, corrupt


def block_count_of(volume: VolumeRecord) -> int:
    """Return the number of block positions of a volume, zero blocks too."""
    return -(-volume.size_bytes // volume.block_bytes) if volume.size_bytes else 0


LeafAt = tuple[int, bytes, VolumeLeaf]
"""Leaf index, leaf id, leaf."""

Lost = Callable[[Unreadable, Mapping[bytes, Sequence[tuple[int, int]]]], None]
"""Told of index nodes that cannot be read, and of the byte ranges of the volume that each stands for, by id."""


async def volume_leaves(
    index: IndexReader, volume: VolumeRecord, lost: Lost | None = None
) -> AsyncGenerator[list[LeafAt], None]:
    """Yield the leaves of a volume in order, in groups; the next group is fetched while one is used.

    With `lost` the walk goes on past nodes that cannot be read, without what they stand for.

    Raises:
        HoldfastError: CORRUPT, MISSING or UNREACHABLE, naming the index nodes, unless `lost` takes them.
    """
    leaves = _Leaves(index, volume, lost)
    ahead: asyncio.Task[list[LeafAt]] | None = None
    most = _LEAVES_FIRST
    try:
        while True:
            group = await leaves.found(most)
            most = LEAVES_PER_FETCH
            upcoming = asyncio.create_task(leaves.fetched(group)) if group else None
            current, ahead = ahead, upcoming
            if current is not None:
                yield await current
            if upcoming is None:
                return
    finally:
        if ahead is not None and not ahead.done():
            ahead.cancel()
            await asyncio.wait([ahead])


class _Leaves:
    """Finds the leaves of a volume and fetches them."""

    def __init__(self, index: IndexReader, volume: VolumeRecord, lost: Lost | None) -> None:
        self._index = index
        self._total = block_count_of(volume)
        self._leaf_bytes = TREE_FAN_OUT * volume.block_bytes
        self._size_bytes = volume.size_bytes
        self._lost = lost
        self._walk = VolumeWalk(volume.root, self._total)
        self._what = f"the index of volume {volume.name}"
        self._waiting: list[tuple[int, bytes]] = []

    async def found(self, most: int) -> list[tuple[int, bytes]]:
        """Return the number and id of the next leaves, `most` at most, none at the end."""
        while len(self._waiting) < most and not self._walk.done:
            wanted = self._walk.wanted()
            if self._lost is None:
                self._walk.feed(await self._index.nodes(wanted, what=self._what))
            else:
                await self._descend(wanted, self._lost)
            self._waiting.extend(self._walk.take_leaves())
        self._waiting.extend(self._walk.take_leaves())
        group, self._waiting = self._waiting[:most], self._waiting[most:]
        return group

    async def _descend(self, wanted: Sequence[bytes], lost: Lost) -> None:
        plain, unreadable = await self._index.readable(wanted)
        malformed = [node_id for node_id in plain if not self._fits(node_id, plain[node_id])]
        unreadable = replace(unreadable, corrupt=(*unreadable.corrupt, *malformed))
        if unreadable:
            skipped = self._walk.skip({*unreadable.damaged, *unreadable.unreachable})
            lost(unreadable, {node_id: list(map(self._bytes, ranges)) for node_id, ranges in skipped.items()})

    def _fits(self, node_id: bytes, plain: bytes) -> bool:
        try:
            self._walk.feed({node_id: plain})
        except HoldfastError as error:
            if error.code is not ErrorCode.CORRUPT:
                raise
            return False
        return True

    def _bytes(self, leaves: tuple[int, int]) -> tuple[int, int]:
        first, end = leaves
        return first * self._leaf_bytes, min(end * self._leaf_bytes, self._size_bytes)

    async def fetched(self, group: Sequence[tuple[int, bytes]]) -> list[LeafAt]:
        """Return the leaves of a group, without those that `lost` was told of."""
        ids = [leaf_id for _, leaf_id in group]
        if self._lost is None:
            plain, unreadable = await self._index.nodes(ids, what=self._what), Unreadable()
        else:
            plain, unreadable = await self._index.readable(ids)
        leaves: list[LeafAt] = []
        malformed: list[bytes] = []
        for at, leaf_id in group:
            if leaf_id not in plain:
                continue
            try:
                leaf = decode_volume_leaf(leaf_id, plain[leaf_id], leaf_index=at, block_count_total=self._total)
            except HoldfastError as error:
                if self._lost is None or error.code is not ErrorCode.CORRUPT:
                    raise
                malformed.append(leaf_id)
            else:
                leaves.append((at, leaf_id, leaf))
        unreadable = replace(unreadable, corrupt=(*unreadable.corrupt, *malformed))
        if unreadable and self._lost is not None:
            bad = {*unreadable.damaged, *unreadable.unreachable}
            places: dict[bytes, list[tuple[int, int]]] = {}
            for at, leaf_id in group:
                if leaf_id in bad:
                    places.setdefault(leaf_id, []).append(self._bytes((at, at + 1)))
            self._lost(unreadable, places)
        return leaves


class LeafCursor:
    """Steps through the leaves of an earlier point beside a volume that is read.

    Where the earlier index turns out damaged it counts as empty from there on, which costs comparing, not correctness;
    `damage` then holds the ids.
    """

    def __init__(self, index: IndexReader, volume: VolumeRecord | None) -> None:
        """Begin before the first leaf; `volume` None is an empty volume."""
        self._groups = volume_leaves(index, volume) if volume is not None else None
        self._group: list[LeafAt] = []
        self._at = 0
        self.damage: tuple[bytes, ...] = ()

    async def leaf(self, leaf_index: int) -> tuple[bytes, VolumeLeaf | None]:
        """Return id and leaf at `leaf_index`, or (b"", None); indexes must ascend from call to call.

        Raises:
            HoldfastError: UNREACHABLE.
        """
        while self._groups is not None:
            while self._at < len(self._group):
                index, leaf_id, leaf = self._group[self._at]
                if index > leaf_index:
                    return b"", None
                if index == leaf_index:
                    return leaf_id, leaf
                self._at += 1
            try:
                self._group = await anext(self._groups)
                self._at = 0
            except StopAsyncIteration:
                self._groups = None
            except HoldfastError as error:
                if error.code not in DAMAGE:
                    raise
                self.damage = error.block_ids
                self._groups = None
        return b"", None

    async def close(self) -> None:
        """Stop fetching ahead."""
        if self._groups is not None:
            await self._groups.aclose()


LEAF_BLOCKS: Final = TREE_FAN_OUT
