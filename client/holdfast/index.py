"""Index nodes on the client's side: fetched and opened in groups, a volume's leaves in order with one group ahead."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Final

from holdfast_core.model.block import Opener, SealedBlock
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import TREE_FAN_OUT
from holdfast_core.model.tree import VolumeLeaf, VolumeWalk, decode_volume_leaf
from holdfast_core.runtime.blocks.reader import BlockReader
from holdfast_proto.v1.records_pb2 import VolumeRecord

LEAVES_PER_FETCH: Final = 64
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

    def _open(self, sealed: Mapping[bytes, SealedBlock]) -> dict[bytes, bytes]:
        return {node_id: self._opener.open(block) for node_id, block in sealed.items()}


def block_count_of(volume: VolumeRecord) -> int:
    """Return the number of block positions of a volume, zero blocks too."""
    return -(-volume.size_bytes // volume.block_bytes) if volume.size_bytes else 0


LeafAt = tuple[int, bytes, VolumeLeaf]
"""Leaf index, leaf id, leaf."""


async def volume_leaves(index: IndexReader, volume: VolumeRecord) -> AsyncGenerator[list[LeafAt], None]:
    """Yield the leaves of a volume in order, in groups; the next group is fetched while one is used.

    Raises:
        HoldfastError: CORRUPT, MISSING or UNREACHABLE, naming the index nodes.
    """
    total = block_count_of(volume)
    walk = VolumeWalk(volume.root, total)
    ahead: asyncio.Task[list[LeafAt]] | None = None
    what = f"the index of volume {volume.name}"
    waiting: list[tuple[int, bytes]] = []
    try:
        while True:
            while len(waiting) < LEAVES_PER_FETCH and not walk.done:
                walk.feed(await index.nodes(walk.wanted(), what=what))
                waiting.extend(walk.take_leaves())
            waiting.extend(walk.take_leaves())
            group, waiting = waiting[:LEAVES_PER_FETCH], waiting[LEAVES_PER_FETCH:]
            upcoming = asyncio.create_task(_fetch_leaves(index, group, total, what)) if group else None
            current, ahead = ahead, upcoming
            if current is not None:
                yield await current
            if upcoming is None:
                return
    finally:
        if ahead is not None and not ahead.done():
            ahead.cancel()
            await asyncio.wait([ahead])


async def _fetch_leaves(index: IndexReader, group: Sequence[tuple[int, bytes]], total: int, what: str) -> list[LeafAt]:
    plain = await index.nodes([leaf_id for _, leaf_id in group], what=what)
    return [
        (
            leaf_index,
            leaf_id,
            decode_volume_leaf(leaf_id, plain[leaf_id], leaf_index=leaf_index, block_count_total=total),
        )
        for leaf_index, leaf_id in group
    ]


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
