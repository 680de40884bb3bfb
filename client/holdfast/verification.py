"""Checking a point without restoring it: every block opened here, or every copy hashed by the nodes alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import aclosing

from holdfast.access import Access
from holdfast.content import ContentDamage, ContentReader, DamageReport, Entry
from holdfast.index import DAMAGE, IndexReader, volume_leaves
from holdfast.restoring.volumes import Callback, leaf_windows, read_volume
from holdfast.results import ProgressCallback, VerifyReport
from holdfast_core.model.errors import HoldfastError
from holdfast_core.model.layout import Layout
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.blocks.reader import REFRESHES_MAX, Unreadable
from holdfast_proto.v1.blocks_pb2 import VERDICT_CORRUPT, VERDICT_OK
from holdfast_proto.v1.records_pb2 import PointRecord, VolumeRecord


async def verify_content(
    index: IndexReader,
    content: ContentReader,
    point: PointRecord,
    damage: DamageReport,
    progress: ProgressCallback | None,
) -> VerifyReport:
    """Read, open and fingerprint every block of a point, one copy of each.

    Raises:
        HoldfastError: UNREACHABLE, DENIED, …; damage is collected in `damage`.
    """
    callback = Callback("verify", sum(volume.size_bytes for volume in point.volumes), progress)
    plain_bytes = 0

    def count(opened: Sequence[tuple[int, bytes]]) -> None:
        """Nothing is kept: reading has checked it."""

    blocks = 0
    for volume in point.volumes:
        before = callback.done
        blocks += await read_volume(index, content, volume, count, damage, callback)
        plain_bytes += callback.done - before
    callback.finish()
    return VerifyReport(point.point_id, blocks=blocks, plain_bytes=plain_bytes)


class CopyCheck:
    """Asks every owner to read and hash its copy of each block; needs no data key."""

    def __init__(self, access: Access, pool: NodePool) -> None:
        """Bind to an operation."""
        self._access = access
        self._pool = pool

    async def check(
        self, index: IndexReader, point: PointRecord, damage: DamageReport, progress: ProgressCallback | None
    ) -> VerifyReport:
        """Check all copies of all blocks that the point's index names.

        Raises:
            HoldfastError: UNREACHABLE, DENIED, …; damage is collected in `damage`.
        """
        callback = Callback("verify", sum(volume.size_bytes for volume in point.volumes), progress)
        blocks = thin = 0
        for volume in point.volumes:
            more, more_thin = await self._check_volume(index, volume, damage, callback)
            blocks += more
            thin += more_thin
        callback.finish()
        return VerifyReport(point.point_id, blocks=blocks, plain_bytes=0, thin_blocks=thin)

    async def _check_volume(
        self, index: IndexReader, volume: VolumeRecord, damage: DamageReport, callback: Callback
    ) -> tuple[int, int]:
        blocks = thin = 0
        try:
            async with aclosing(volume_leaves(index, volume)) as groups:
                async for leaves in groups:
                    leaf_entries = [Entry(at, 0, b"", leaf_id, b"") for at, leaf_id, _ in leaves]
                    for entries in (leaf_entries, *leaf_windows(leaves, volume)):
                        found, more_thin = await self._check(entries)
                        if found is not None:
                            damage.add(found, volume.name)
                        blocks += len(entries)
                        thin += more_thin
                        callback(sum(entry.length for entry in entries))
        except HoldfastError as error:
            if error.code not in DAMAGE:
                raise
            damage.add_index(error, volume.name, [(0, volume.size_bytes)])
        return blocks, thin

    async def _check(self, entries: Sequence[Entry]) -> tuple[ContentDamage | None, int]:
        """Ask the owners about some blocks; returns what no owner has whole, and how many lack a copy."""
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
        if not unreadable:
            return None, thin
        bad = {*unreadable.damaged, *unreadable.unreachable}
        named = tuple(entry for entry in entries if entry.block_id in bad or entry.base_id in bad)
        return ContentDamage(unreadable, named), thin

    async def _ask_owners(self, ids: Iterable[bytes], layouts: Sequence[Layout]) -> tuple[Unreadable, int]:
        owners = {
            block_id: tuple(dict.fromkeys(node for layout in layouts for node in layout.owners_of_block(block_id)))
            for block_id in ids
        }
        questions: dict[str, list[bytes]] = {}
        for block_id, nodes in owners.items():
            for node in nodes:
                questions.setdefault(node, []).append(block_id)
        async with plain_task_group() as group:
            tasks = {node: group.create_task(self._ask(node, asked)) for node, asked in questions.items()}
        answers = {node: task.result() for node, task in tasks.items()}
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

    async def _ask(self, node: str, ids: Sequence[bytes]) -> dict[bytes, int]:
        """Return a verdict an id; nothing from a node that does not answer."""
        try:
            verdicts = await self._pool.has_blocks(node, b"".join(ids), self._access.capability(), verify=True)
        except HoldfastError as error:
            if not error.retryable:
                raise
            return {}
        return dict(zip(ids, verdicts, strict=True))
