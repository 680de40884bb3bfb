"""Which of the blocks that somebody reports lie under the point or object that was being read.

A block that nobody ever stored has no owner with good bytes either. Whoever may report damage on one VM could mark
anything as lost, and while a mark stands every commit of the tenant walks its whole tree; so a report counts only for
what its resource names. An index node that cannot be read is named by the node above it and counts; what it names in
turn nobody can tell, and it does not count.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence

from holdfast_coordinator.barrier import NODES_PER_READ, Walk
from holdfast_core.model.block import Opener, SealedBlock
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.layout import Layout
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.blocks.reader import BlockReader


class DamageScope:
    """Looks ids up in trees of one tenant."""

    def __init__(self, pool: NodePool, capability: Callable[[], str], opener: Opener) -> None:
        """Bind to the nodes; `capability` reads the index, and `opener` needs the structure key alone."""
        self._pool = pool
        self._capability = capability
        self._opener = opener

    async def named(
        self, block_ids: Iterable[bytes], walks: Iterable[Walk], layouts: Sequence[Layout]
    ) -> frozenset[bytes]:
        """Return those ids that the trees name, as index node or as block; it stops once all have been met.

        Raises:
            HoldfastError: what a node refuses that no other would answer differently.
        """
        sought = set(block_ids)
        met: set[bytes] = set()
        reader = BlockReader(self._pool, lambda: layouts, self._capability)
        for walk in walks:
            unreadable: set[bytes] = set()
            while sought - met:
                # What could not be read stays wanted, so it is asked past.
                wanted = [id_ for id_ in walk.wanted(NODES_PER_READ + len(unreadable)) if id_ not in unreadable]
                if not wanted:
                    break
                met.update(sought.intersection(wanted))
                blocks, _ = await reader.fetch_readable(wanted)
                unreadable.update(block_id for block_id in wanted if block_id not in blocks)
                unreadable.update(await asyncio.to_thread(self._feed, walk, blocks))
                for ids in walk.take():
                    met.update(sought.intersection(ids))
        return frozenset(met)

    def _feed(self, walk: Walk, blocks: Mapping[bytes, SealedBlock]) -> list[bytes]:
        """Open index nodes and pass them to the walk one by one; return those that are none."""
        malformed = []
        for block_id, block in blocks.items():
            try:
                walk.feed({block_id: self._opener.open(block)})
            except HoldfastError as error:
                if error.code is not ErrorCode.CORRUPT:
                    raise
                malformed.append(block_id)
        return malformed
