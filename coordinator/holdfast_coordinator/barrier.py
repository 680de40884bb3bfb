"""The barrier before a commit: everything that a new tree names must be durable. DESIGN section 10.

The index nodes that the older point does not share are read with the structure key and checked for form; every id they
newly name, and their own, is asked of the owners. Memory is bounded by `CHECKED_IDS` however large the volume is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Final, Protocol

from holdfast_coordinator.commit_rules import positions
from holdfast_coordinator.grants import Grants
from holdfast_core.model.block import Opener, SealedBlock
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.layout import Layout
from holdfast_core.model.limits import ERROR_BLOCK_IDS_MAX
from holdfast_core.model.tree import DiffWalk, NewReferences, ObjectScan
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.blocks.presence import check_durable
from holdfast_core.runtime.blocks.reader import REFUSED_FACT, REFUSED_KIND, BlockReader
from holdfast_proto.v1.records_pb2 import ObjectRecord, VolumeRecord

# Ids among which repeats are found and counted once; about 150 bytes each are in use.
CHECKED_IDS: Final = 32_768
# Ids that one question is about at least, unless it is the last: half of what as many nodes name as are read at once,
# so that the first of them are asked about without delay. The next ones are read until the answer is there; a question
# costs an owner 2 ms whatever is asked.
ASKED_IDS: Final = 4_096
NODES_PER_READ: Final = 64


class Walk(Protocol):
    """What `DiffWalk` and `ObjectScan` have in common."""

    @property
    def done(self) -> bool:
        """Whether everything has been found."""

    def wanted(self, limit: int = NODES_PER_READ) -> list[bytes]:
        """Return ids of index nodes to bring next."""

    def feed(self, nodes: Mapping[bytes, bytes]) -> None:
        """Take their plaintexts."""

    def take(self) -> NewReferences:
        """Return what was found so far."""


@dataclass(slots=True)
class Findings:
    """What a barrier found out.

    Attributes:
        checked: ids that were asked for, repeats counted.
        under_replicated: ids that are durable, but not on all owners.
        new_bytes: what the newly named blocks hold unsealed, at most; what the tenant's quota is charged with.
        suspects: ids that were named and are recorded as damaged.
    """

    checked: int = 0
    under_replicated: int = 0
    new_bytes: int = 0
    suspects: set[bytes] = field(default_factory=set)


class Barrier:
    """Checks trees of one tenant under one set of layouts."""

    def __init__(
        self, pool: NodePool, layouts: Sequence[Layout], grants: Grants, opener: Opener, *, collection_epoch: int = 0
    ) -> None:
        """Bind to the nodes; `opener` needs the structure key alone.

        Blocks that are found are stamped with `collection_epoch`, so that none of them is collected before the commit.
        """
        self._pool = pool
        self._layouts = layouts
        self._asker = partial(grants.presence_asker, collection_epoch)
        self._opener = opener
        self._reader = BlockReader(pool, lambda: layouts, grants.index_reader)

    async def check_volumes(
        self, volumes: Sequence[VolumeRecord], older: Mapping[str, VolumeRecord], damaged: frozenset[bytes]
    ) -> Findings:
        """Check a point's volumes; `older` vouches for what they inherit, unless anything is damaged at all.

        Raises:
            HoldfastError: NOT_DURABLE with the ids that too few owners hold; CORRUPT if an index node is malformed;
                UNREACHABLE if too few owners answered to tell; WRONG_EPOCH if a node knows a newer layout.
        """
        findings = Findings()
        for volume in volumes:
            old = older.get(volume.name)
            named = None
            if old is not None and not damaged:
                named = await self._checked_against(volume, old, damaged, findings)
            if named is None:
                named = await self._check_new(DiffWalk(volume.root, positions(volume), b"", 0), damaged, findings)
                if damaged and old is not None:
                    named = min(named, await self._named_beyond(volume, old, most=named))
            findings.new_bytes += min(named * volume.block_bytes, volume.size_bytes)
        return findings

    async def _checked_against(
        self, volume: VolumeRecord, old: VolumeRecord, damaged: frozenset[bytes], findings: Findings
    ) -> int | None:
        """Check what a volume names beyond an older one; None if that could not be read to the end."""
        if not old.root:
            return None
        walk = DiffWalk(volume.root, positions(volume), old.root, positions(old))
        try:
            return await self._check(walk, damaged, findings)
        except HoldfastError as error:
            if error.code not in (ErrorCode.MISSING, ErrorCode.CORRUPT):
                raise
            # The older tree may be what cannot be read: then nothing vouches, and all is asked for.
            return None

    async def _named_beyond(self, volume: VolumeRecord, old: VolumeRecord, *, most: int) -> int:
        """Count the blocks that a volume names beyond an older one, `most` if that cannot be told.

        Damage anywhere makes a commit vouch for everything anew; that is no reason to charge for everything anew.
        """
        walk = DiffWalk(volume.root, positions(volume), old.root, positions(old))
        named = 0
        try:
            while not walk.done:
                named += len(set((await self._step(walk)).block_ids))
        except HoldfastError as error:
            if error.code not in (ErrorCode.MISSING, ErrorCode.CORRUPT):
                raise
            return most
        return named

    async def check_object(self, stored: ObjectRecord, damaged: frozenset[bytes]) -> Findings:
        """Check an object. Raises as `check_volumes`."""
        findings = Findings()
        scan = ObjectScan(stored.root, block_count=stored.block_count, size_bytes=stored.size_bytes)
        await self._check_new(scan, damaged, findings)
        return findings

    async def _check_new(self, walk: Walk, damaged: frozenset[bytes], findings: Findings) -> int:
        """Check a tree of which every node should be readable because the client has just written it."""
        try:
            return await self._check(walk, damaged, findings)
        except HoldfastError as error:
            if error.code is not ErrorCode.MISSING:
                raise
            raise not_durable(error.block_ids) from error

    async def _check(self, walk: Walk, damaged: frozenset[bytes], findings: Findings) -> int:
        """Check all that a walk finds; return how many blocks it named, index nodes left out."""
        named = 0
        collected: dict[bytes, None] = {}
        asked = 0
        async with plain_task_group() as group:
            asking: asyncio.Task[None] | None = None
            while not walk.done:
                found = await self._step(walk)
                before = len(collected)
                collected.update(dict.fromkeys(found.block_ids))
                named += len(collected) - before
                collected.update(dict.fromkeys(found.index_ids))
                for ids in found:
                    findings.suspects.update(damaged.intersection(ids))
                full = len(collected) >= CHECKED_IDS
                if full or walk.done or len(collected) - asked >= ASKED_IDS:
                    # One at a time: reading the next nodes goes on meanwhile, and what waits stays bounded.
                    if asking is not None:
                        await asking
                    asking = group.create_task(self._ask(tuple(islice(collected, asked, None)), findings))
                    asked = len(collected)
                if full:
                    collected, asked = {}, 0
        return named

    async def _step(self, walk: Walk) -> NewReferences:
        """Bring a walk nodes that it wants, and return what it finds in them."""
        blocks = await self._fetch(walk.wanted(NODES_PER_READ))
        # Opening and parsing some dozens of nodes is milliseconds of pure computing: in a thread, so that heartbeats
        # and other sessions are served meanwhile.
        return await asyncio.to_thread(self._digest, walk, blocks)

    async def _fetch(self, node_ids: Sequence[bytes]) -> Mapping[bytes, SealedBlock]:
        """Bring index nodes; our capability shows us nothing else, so a block of another kind is a malformed tree."""
        try:
            return await self._reader.fetch(node_ids, what="the index")
        except HoldfastError as error:
            if error.code is not ErrorCode.DENIED:
                raise
            if error.facts.get(REFUSED_FACT) != REFUSED_KIND:
                raise _cut_off(error) from error
            raise HoldfastError(
                ErrorCode.CORRUPT, "the tree names as an index node a block that is none", block_ids=node_ids
            ) from error

    def _digest(self, walk: Walk, blocks: Mapping[bytes, SealedBlock]) -> NewReferences:
        walk.feed({block_id: self._opener.open(block) for block_id, block in blocks.items()})
        return walk.take()

    async def _ask(self, block_ids: Sequence[bytes], findings: Findings) -> None:
        try:
            durability = await check_durable(self._pool, self._layouts, self._asker, block_ids)
        except HoldfastError as error:
            if error.code is not ErrorCode.DENIED:
                raise
            raise _cut_off(error) from error
        if durability.missing:
            raise not_durable(durability.missing)
        findings.checked += len(block_ids)
        findings.under_replicated += len(durability.under_replicated)


def _cut_off(error: HoldfastError) -> HoldfastError:
    """Return the error for nodes that refuse this coordinator's own capability: another coordinator may do better."""
    return HoldfastError(
        ErrorCode.UNREACHABLE,
        f"storage nodes refuse this coordinator's capability; compare its clock with theirs: {error.message}",
        block_ids=error.block_ids,
    )


def not_durable(block_ids: Sequence[bytes]) -> HoldfastError:
    """Return the error for blocks that were named but are not on enough owners."""
    return HoldfastError(
        ErrorCode.NOT_DURABLE,
        f"{len(block_ids)} blocks that the commit names are not on enough nodes; send them again and commit again",
        facts={"missing": str(len(block_ids))},
        block_ids=block_ids[:ERROR_BLOCK_IDS_MAX],
    )
