"""Two ways to check blocks: fetch one copy of each and open it, or let every owner read and hash its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from holdfast.access import Access
from holdfast.content import ContentDamage, ContentReader, Entry
from holdfast.verifying.trees import Place
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.layout import Layout
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.blocks.reader import REFRESHES_MAX, Unreadable
from holdfast_proto.v1.blocks_pb2 import VERDICT_CORRUPT, VERDICT_OK


class BlockCheck(Protocol):
    """A way to check blocks."""

    plain_bytes: int
    thin_blocks: int

    async def nodes(self, places: Sequence[Place]) -> ContentDamage | None:
        """Check index nodes beyond having read them; returns which are damaged."""

    async def blocks(self, entries: Sequence[Entry], block_bytes: int) -> ContentDamage | None:
        """Check blocks; returns which are damaged."""


class ContentCheck:
    """Fetches one copy of each block, opens it and compares its fingerprint."""

    thin_blocks = 0

    def __init__(self, content: ContentReader) -> None:
        """Bind to an operation."""
        self.plain_bytes = 0
        self._content = content

    async def nodes(self, places: Sequence[Place]) -> ContentDamage | None:
        """See `BlockCheck`; reading them was the check."""
        return None

    async def blocks(self, entries: Sequence[Entry], block_bytes: int) -> ContentDamage | None:
        """See `BlockCheck`."""
        found = await self._content.read(entries, _nothing_kept, block_bytes=block_bytes)
        lost = sum(entry.length for entry in found.entries) if found is not None else 0
        self.plain_bytes += sum(entry.length for entry in entries) - lost
        return found


def _nothing_kept(opened: Sequence[tuple[int, bytes]]) -> None:
    """Take plaintexts that were only to be checked."""


class CopyCheck:
    """Asks every owner to read and hash its copy of each block; needs no data key."""

    plain_bytes = 0

    def __init__(self, access: Access, pool: NodePool) -> None:
        """Bind to an operation."""
        self.thin_blocks = 0
        self._access = access
        self._pool = pool

    async def nodes(self, places: Sequence[Place]) -> ContentDamage | None:
        """See `BlockCheck`."""
        return await self.blocks([Entry(place.start, 0, b"", place.node_id, b"") for place in places], 0)

    async def blocks(self, entries: Sequence[Entry], block_bytes: int) -> ContentDamage | None:
        """See `BlockCheck`."""
        await self._access.freshen()
        ids = {each for entry in entries for each in (entry.block_id, entry.base_id) if each}
        layouts = self._access.layouts()
        unreadable, thin = await self._ask_owners(ids, layouts)
        for _ in range(REFRESHES_MAX):
            # As in reading: owners let go of what a newer layout has elsewhere.
            if not unreadable or not await self._access.changed_since(layouts):
                break
            layouts = self._access.layouts()
            unreadable, thin = await self._ask_owners(ids, layouts)
        else:
            unreadable = Unreadable(unreachable=(*unreadable.damaged, *unreadable.unreachable))
        self.thin_blocks += thin
        if not unreadable:
            return None
        bad = {*unreadable.damaged, *unreadable.unreachable}
        named = tuple(entry for entry in entries if entry.block_id in bad or entry.base_id in bad)
        return ContentDamage(unreadable, named)

    async def _ask_owners(self, ids: Iterable[bytes], layouts: Sequence[Layout]) -> tuple[Unreadable, int]:
        owners = {
            block_id: tuple(dict.fromkeys(node for layout in layouts for node in layout.owners_of_block(block_id)))
            for block_id in ids
        }
        questions: dict[str, list[bytes]] = {}
        for block_id, nodes in owners.items():
            for node in nodes:
                questions.setdefault(node, []).append(block_id)
        refused: dict[str, HoldfastError] = {}
        async with plain_task_group() as group:
            tasks = {node: group.create_task(self._ask(node, asked, refused)) for node, asked in questions.items()}
        answers = {node: task.result() for node, task in tasks.items()}
        if refused and len(refused) == len(questions):
            raise next(iter(refused.values()))
        missing, corrupt, unreachable = [], [], []
        thin = 0
        for block_id, nodes in owners.items():
            verdicts = [answers[node].get(block_id, 0) for node in nodes]
            if VERDICT_OK in verdicts:
                thin += any(answers[node].get(block_id) != VERDICT_OK for node in layouts[0].owners_of_block(block_id))
            elif 0 in verdicts:
                unreachable.append(block_id)
            elif VERDICT_CORRUPT in verdicts:
                corrupt.append(block_id)
            else:
                missing.append(block_id)
        return Unreadable(tuple(missing), tuple(corrupt), tuple(unreachable)), thin

    async def _ask(self, node: str, ids: Sequence[bytes], refused: dict[str, HoldfastError]) -> Mapping[bytes, int]:
        """Return a verdict an id; nothing from a node that does not answer, or that says no, which goes to `refused`.

        One node alone, whose clock is off or which is hostile, keeps nobody from checking.
        """
        try:
            verdicts = await self._pool.has_blocks(node, b"".join(ids), self._access.capability(), verify=True)
        except HoldfastError as error:
            if error.code is ErrorCode.DENIED:
                refused[node] = error
            elif not error.retryable:
                raise
            return {}
        return dict(zip(ids, verdicts, strict=True))
