"""Reading all of a volume in windows, several at once, each block handed to a sink by the thread that opened it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import Final

from holdfast.content import WINDOW_BYTES, ContentReader, Entry, Sink
from holdfast.damage import DamageReport, Places
from holdfast.index import IndexReader, LeafAt, volume_leaves
from holdfast.results import Progress, ProgressCallback
from holdfast_core.model.limits import TREE_FAN_OUT
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.blocks.reader import Unreadable
from holdfast_proto.v1.records_pb2 import VolumeRecord

WINDOWS_IN_FLIGHT: Final = 4


def leaf_windows(leaves: Sequence[LeafAt], volume: VolumeRecord) -> list[list[Entry]]:
    """Return the entries of some leaves in windows of about `WINDOW_BYTES`; keys are byte offsets in the volume."""
    block_bytes, size = volume.block_bytes, volume.size_bytes
    per_window = max(1, WINDOW_BYTES // block_bytes)
    entries: list[Entry] = []
    for index, _, leaf in leaves:
        first = index * TREE_FAN_OUT
        for slot, fingerprint, block_id, base_id in zip(
            leaf.slots, leaf.fingerprints, leaf.block_ids, leaf.base_ids, strict=True
        ):
            offset = (first + slot) * block_bytes
            entries.append(Entry(offset, min(block_bytes, size - offset), fingerprint, block_id, base_id))
    return [entries[at : at + per_window] for at in range(0, len(entries), per_window)]


async def read_volume(
    index: IndexReader,
    content: ContentReader,
    volume: VolumeRecord,
    sink: Sink,
    damage: DamageReport,
    progress: Callback,
    *,
    windows: asyncio.Semaphore | None = None,
) -> int:
    """Read all of a volume into `sink`; returns the number of blocks. Damage is collected, not raised.

    `windows` bounds what is in flight, for volumes that are read together.

    Raises:
        HoldfastError: UNREACHABLE, DENIED, KEY_MISMATCH, or what the sink raises.
    """
    count = 0
    slots = windows or asyncio.Semaphore(WINDOWS_IN_FLIGHT)

    async def read(entries: Sequence[Entry]) -> None:
        try:
            found = await content.read(entries, sink, block_bytes=volume.block_bytes)
            if found is not None:
                damage.add(found, volume.name)
            progress(sum(entry.length for entry in entries))
        finally:
            slots.release()

    def lost(unreadable: Unreadable, places: Places) -> None:
        damage.add_index(unreadable, volume.name, places)

    async with plain_task_group() as group, aclosing(volume_leaves(index, volume, lost)) as groups:
        async for leaves in groups:
            for entries in leaf_windows(leaves, volume):
                count += len(entries)
                await slots.acquire()
                group.create_task(read(entries))
    return count


class Callback:
    """Counts bytes and tells a progress callback."""

    def __init__(self, phase: str, total: int, progress: ProgressCallback | None) -> None:
        """Begin at zero of `total` bytes."""
        self._phase = phase
        self._total = total
        self._progress = progress
        self.done = 0

    def __call__(self, count: int) -> None:
        """Count `count` more bytes."""
        self.done += count
        if self._progress is not None:
            self._progress(Progress(self._phase, min(self.done, self._total), self._total))

    def finish(self) -> None:
        """Tell that all is done; holes are not counted one by one."""
        self(self._total - self.done)
