"""Marking: walking every tree of a tenant once, and remembering each id that it names.

Many walks go on side by side, so that one question to the nodes serves many small trees. Memory is bounded: by
`KNOWN_NODES` index nodes that are remembered as walked, by `PLAIN_BYTES` of their content, and by the bound of the
spool. What was forgotten of that is read again, and nothing else follows from it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Final

from holdfast_coordinator.collection.roots import Source
from holdfast_coordinator.collection.spool import MarkSpool
from holdfast_core.model.block import Opener, SealedBlock
from holdfast_core.model.errors import HoldfastError
from holdfast_core.model.limits import MIB

Fetch = Callable[[Sequence[bytes]], Awaitable[Mapping[bytes, SealedBlock]]]
"""Brings index nodes. Raises MISSING, CORRUPT, UNREACHABLE or DENIED with the ids that cannot be had."""

KNOWN_NODES: Final = 1_000_000
PLAIN_BYTES: Final = 64 * MIB
_WALKS: Final = 128
_NODES_PER_READ: Final = 256


class KnownNodes:
    """Ids of index nodes below which everything is marked, or will be by the time that all walks have ended.

    Two generations: when the younger one is full, it becomes the older one, and what was that is forgotten.
    """

    def __init__(self, most: int = KNOWN_NODES) -> None:
        """Remember at least half of `most`, and at most that many."""
        self._half = max(1, most // 2)
        self._young: set[bytes] = set()
        self._old: set[bytes] = set()

    def __contains__(self, node_id: object) -> bool:
        """Return whether a node is known."""
        return node_id in self._young or node_id in self._old

    def add(self, node_ids: Sequence[bytes]) -> None:
        """Remember nodes."""
        self._young.update(node_ids)
        if len(self._young) >= self._half:
            self._old, self._young = self._young, set()


class _Plaintexts:
    """Content of index nodes that was opened not long ago: a point's tree is compared with that of the one before."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._kept: OrderedDict[bytes, bytes] = OrderedDict()

    def get(self, node_id: bytes) -> bytes | None:
        plain = self._kept.get(node_id)
        if plain is not None:
            self._kept.move_to_end(node_id)
        return plain

    def put(self, node_id: bytes, plain: bytes) -> None:
        if node_id not in self._kept:
            self._bytes += len(plain)
        self._kept[node_id] = plain
        while self._bytes > self._most_bytes:
            self._bytes -= len(self._kept.popitem(last=False)[1])


class Marker:
    """Marks what trees of one tenant reach. Belongs to one collection."""

    def __init__(
        self,
        fetch: Fetch,
        opener: Opener,
        marks: MarkSpool,
        known: KnownNodes,
        *,
        plain_bytes: int = PLAIN_BYTES,
    ) -> None:
        """Bind to the nodes; `opener` needs the structure key alone, and the sources' walks pass by what is `known`."""
        self._fetch = fetch
        self._opener = opener
        self._marks = marks
        self._known = known
        self._plaintexts = _Plaintexts(plain_bytes)

    async def mark(self, sources: Iterator[Source]) -> None:
        """Walk all sources to their ends.

        Raises:
            HoldfastError: what an index node that cannot be read is told as, with a message that names the source; then
                nothing may be deleted on account of these marks.
        """
        active: list[Source] = []
        while True:
            active = [source for source in active if not source.walk.done]
            fresh = list(islice(sources, _WALKS - len(active)))
            for source in fresh:
                self._marks.add(source.block_ids)
            active += [source for source in fresh if not source.walk.done]
            if not active:
                if fresh:
                    continue
                return
            wanted = self._wanted(active)
            plain = {node_id: found for node_id in wanted if (found := self._plaintexts.get(node_id)) is not None}
            sealed = await self._fetched([node_id for node_id in wanted if node_id not in plain], active)
            await asyncio.to_thread(self._digest, active, plain, sealed)

    def _wanted(self, active: Sequence[Source]) -> list[bytes]:
        wanted: dict[bytes, None] = {}
        for source in active:
            if len(wanted) >= _NODES_PER_READ:
                break
            wanted.update(dict.fromkeys(source.walk.wanted(_NODES_PER_READ - len(wanted))))
        return list(wanted)

    async def _fetched(self, node_ids: Sequence[bytes], active: Sequence[Source]) -> Mapping[bytes, SealedBlock]:
        if not node_ids:
            return {}
        try:
            return await self._fetch(node_ids)
        except HoldfastError as error:
            lacking = set(error.block_ids)
            for source in active:
                if not lacking.isdisjoint(source.walk.wanted(_NODES_PER_READ)):
                    raise _named(error, source) from error
            raise

    def _digest(self, active: Sequence[Source], plain: dict[bytes, bytes], sealed: Mapping[bytes, SealedBlock]) -> None:
        """Feed the walks and mark what they find; runs in a worker thread, alone."""
        for node_id, block in sealed.items():
            plain[node_id] = self._opened(node_id, block, active)
            self._plaintexts.put(node_id, plain[node_id])
        for source in active:
            try:
                source.walk.feed(plain)
            except HoldfastError as error:
                raise _named(error, source) from error
            index_ids, block_ids = source.walk.take()
            if index_ids:
                self._known.add(index_ids)
                self._marks.add(index_ids)
                self._marks.add(block_ids)

    def _opened(self, node_id: bytes, block: SealedBlock, active: Sequence[Source]) -> bytes:
        try:
            return bytes(self._opener.open(block))
        except HoldfastError as error:
            source = next(source for source in active if node_id in source.walk.wanted(_NODES_PER_READ))
            raise _named(error, source) from error


def _named(error: HoldfastError, source: Source) -> HoldfastError:
    return HoldfastError(
        error.code, f"{source.what} cannot be read: {error.message}", facts=error.facts, block_ids=error.block_ids
    )
