"""How a simulated client writes: blocks to their owners, as the SDK does it, and trees of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from holdfast_core.model.block import Codec, Kind, SealedBlock
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.keys import KeyRing
from holdfast_core.model.layout import Layout
from holdfast_core.model.limits import TREE_FAN_OUT
from holdfast_core.model.tree import VolumeLeaf, VolumeTreeBuilder
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.blocks.putting import put_blocks
from holdfast_proto.v1.blocks_pb2 import VERDICT_OK
from holdfast_proto.v1.common_pb2 import Grant
from tests.sim.oracle import Content, Oracle
from tests.sim.world import Process

BLOCK_BYTES: Final = 64 * 1024
POSITIONS: Final = 3 * TREE_FAN_OUT
_PUT_TIMEOUT_S: Final = 6.0


@dataclass(frozen=True, slots=True)
class Place:
    """What a tree names at one position."""

    fingerprint: bytes
    block_id: bytes
    base_id: bytes = b""


@dataclass(frozen=True, slots=True)
class Index:
    """A volume's tree, read or built: what is at each position, and its leaves by number."""

    places: Mapping[int, Place]
    leaves: Mapping[int, bytes]
    root: bytes


class Upload:
    """The blocks of one session, on their way to the owners of the newest layout that the client knows.

    `asks` is how often it asks whether blocks are there before it sends them, `timeout_s` how long it waits for a node.
    """

    def __init__(
        self, process: Process, pool: NodePool, oracle: Oracle, session_id: str, grant: Grant, dice: random.Random
    ) -> None:
        """Begin with what the session's grant says."""
        self._process = process
        self._pool = pool
        self._oracle = oracle
        self._session_id = session_id
        self._dice = dice
        self.tenant = int(grant.keys.tenant)
        self.layouts: tuple[Layout, ...] = ()
        self.capability = ""
        self.take(grant)
        self.durable: dict[bytes, None] = {}
        self.asks = 0.6
        self.timeout_s = _PUT_TIMEOUT_S

    def take(self, grant: Grant) -> None:
        """Go on with a fresh grant."""
        self.layouts = tuple(map(Layout.from_message, grant.layouts))
        self.capability = grant.capability
        self._pool.update(grant.nodes)

    async def send(self, blocks: Iterable[SealedBlock], *, again: bool = False) -> bool:
        """Make blocks durable; return whether all are. `again` sends also what was durable before.

        Raises:
            HoldfastError: WRONG_EPOCH, after which the caller refreshes and sends again.
        """
        wanted = {block.id: block for block in blocks if again or block.id not in self.durable}
        if wanted and not again and self._dice.random() < self.asks:
            for block_id in await self._present(list(wanted)):
                self._note(block_id)
                del wanted[block_id]
        return not wanted or await self._put(list(wanted.values()))

    async def _present(self, ids: Sequence[bytes]) -> list[bytes]:
        """Ask the owners; return what a write quorum of them has."""
        layout = self.layouts[0]
        counts = dict.fromkeys(ids, 0)

        async def ask(node_id: str, asked: Sequence[bytes]) -> None:
            try:
                verdicts = await self._pool.has_blocks(
                    node_id, b"".join(asked), self.capability, layout_epoch=layout.epoch, timeout_s=self.timeout_s
                )
            except HoldfastError as error:
                if error.code is ErrorCode.WRONG_EPOCH:
                    raise
                return
            for block_id, verdict in zip(asked, verdicts, strict=True):
                counts[block_id] += verdict == VERDICT_OK

        await self._everybody([self._process.spawn(ask(*question)) for question in _by_owner(layout, ids).items()])
        return [block_id for block_id, count in counts.items() if count >= layout.write_quorum]

    async def _put(self, blocks: Sequence[SealedBlock]) -> bool:
        layout = self.layouts[0]
        counts = {block.id: 0 for block in blocks}
        bodies = {block.id: block for block in blocks}

        async def put(node_id: str, ids: Sequence[bytes]) -> None:
            try:
                await put_blocks(
                    self._pool,
                    node_id,
                    [bodies[block_id] for block_id in ids],
                    self.capability,
                    layout_epoch=layout.epoch,
                    timeout_s=self.timeout_s,
                )
            except HoldfastError as error:
                if error.code is ErrorCode.WRONG_EPOCH:
                    raise
                return
            for block_id in ids:
                counts[block_id] += 1
                if counts[block_id] == layout.write_quorum:
                    self._note(block_id)

        tasks = [self._process.spawn(put(*part)) for part in _by_owner(layout, list(bodies)).items()]
        pending: set[asyncio.Task[None]] = set(tasks)
        while pending and any(count < layout.write_quorum for count in counts.values()):
            # What is not needed for the quorum goes on by itself, as the SDK's sender does it.
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            _raise_first([task for task in tasks if task in done])
        return all(count >= layout.write_quorum for count in counts.values())

    async def _everybody(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        if tasks:
            await asyncio.wait(tasks)
            _raise_first(tasks)

    def _note(self, block_id: bytes) -> None:
        self.durable[block_id] = None
        self._oracle.lean(self._session_id, (self.tenant, block_id))


def _raise_first(tasks: Iterable[asyncio.Task[None]]) -> None:
    for task in tasks:
        if task.done() and not task.cancelled() and (error := task.exception()) is not None:
            raise error


def _by_owner(layout: Layout, ids: Iterable[bytes]) -> dict[str, list[bytes]]:
    groups: dict[str, list[bytes]] = {}
    for block_id in ids:
        for node_id in layout.owners_of_block(block_id):
            groups.setdefault(node_id, []).append(block_id)
    return groups


class Sealing:
    """Seals a client's blocks, and keeps each where the checker finds it."""

    def __init__(self, ring: KeyRing, oracle: Oracle) -> None:
        """Seal with the newest keys."""
        self.ring = ring
        self._oracle = oracle
        self.made: dict[bytes, SealedBlock] = {}

    def seal(self, kind: Kind, plain: bytes) -> SealedBlock:
        """Seal a block."""
        epoch = self.ring.structure_epoch_newest if kind is Kind.INDEX else self.ring.data_epoch_newest
        block = self.ring.sealer(kind, epoch).seal(plain, codec=Codec.STORED)
        self._oracle.bodies[(self.ring.tenant, block.id)] = block
        self.made[block.id] = block
        return block

    def keep_node(self, plain: bytes) -> bytes:
        """Seal an index node; return its id."""
        return self.seal(Kind.INDEX, plain).id


def build_index(
    sealing: Sealing, content: Content, old: Index, *, shunned: frozenset[bytes], deltas: random.Random
) -> Index:
    """Build a volume's tree, naming again what the old one has, except for blocks that are `shunned`.

    Some changed blocks name what was at their place as their base, as if they were deltas: nodes cannot tell.
    """
    ring = sealing.ring
    builder = VolumeTreeBuilder(POSITIONS, sealing.keep_node)
    places: dict[int, Place] = {}
    leaves: dict[int, bytes] = {}
    for number in range(POSITIONS // TREE_FAN_OUT):
        here = sorted(slot for slot in content if slot // TREE_FAN_OUT == number)
        before = {slot: place for slot, place in old.places.items() if slot // TREE_FAN_OUT == number}
        for slot in here:
            places[slot] = _placed(sealing, content[slot], before.get(slot), shunned, deltas)
        same = {slot: places[slot] for slot in here} == before
        if number in old.leaves and same and old.leaves[number] not in shunned:
            builder.reuse_leaf(number, old.leaves[number])
            leaves[number] = old.leaves[number]
        elif here:
            leaf = VolumeLeaf(
                slots=tuple(slot % TREE_FAN_OUT for slot in here),
                fingerprints=tuple(ring.fingerprint(content[slot]) for slot in here),
                block_ids=tuple(places[slot].block_id for slot in here),
                base_ids=tuple(places[slot].base_id for slot in here),
            )
            builder.add_leaf(number, leaf)
            leaves[number] = next(reversed(sealing.made))
    return Index(places, leaves, builder.finish())


def _placed(
    sealing: Sealing, plain: bytes, before: Place | None, shunned: frozenset[bytes], deltas: random.Random
) -> Place:
    fingerprint = sealing.ring.fingerprint(plain)
    if before is not None:
        known = before.block_id not in shunned and before.base_id not in shunned
        if before.fingerprint == fingerprint and known:
            return before
        if known and deltas.random() < 0.3:
            return Place(fingerprint, sealing.seal(Kind.VOLUME, plain).id, before.base_id or before.block_id)
    return Place(fingerprint, sealing.seal(Kind.VOLUME, plain).id)
