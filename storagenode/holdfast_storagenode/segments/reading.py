"""Reads blocks from segments: neighbours in one call, every block hashed, what does not match told apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from holdfast_core.model.block import SealedBlock, verify
from holdfast_core.model.errors import HoldfastError
from holdfast_core.model.limits import KIB, MIB
from holdfast_storagenode.segments.disk import Disk
from holdfast_storagenode.segments.files import SegmentFiles
from holdfast_storagenode.segments.index import Entry
from holdfast_storagenode.segments.record import RECORD_HEADER_BYTES

# Reading over a gap of this size is cheaper than another call; a run is bounded so that it does not hold much memory.
_GAP_BYTES_MAX: Final = 16 * KIB
_RUN_BYTES_MAX: Final = 2 * MIB


@dataclass(frozen=True, slots=True)
class Wanted:
    """A block to read: its position in the answer, its id and its entry."""

    at: int
    block_id: bytes
    entry: Entry


def read_blocks(
    files: SegmentFiles, disk: Disk, wanted: Sequence[Wanted]
) -> Iterator[tuple[Wanted, SealedBlock | None]]:
    """Yield each wanted block with what was read, None where the bytes do not match the id or cannot be read.

    Raises:
        FileNotFoundError: a segment was removed meanwhile; look the rest up again.
    """
    ordered = sorted(wanted, key=lambda item: (item.entry.segment, item.entry.offset))
    runs = list(_runs(ordered))
    if len(runs) > 1:
        # The disk takes many at once, and one after another they would each wait for it.
        for run in runs:
            with files.reading(run[0].entry.segment) as fd:
                disk.announce(fd, *_place(run))
    for run in runs:
        begin, length = _place(run)
        with files.reading(run[0].entry.segment) as fd:
            try:
                data = disk.read_at(fd, length, begin)
            except OSError:
                # A sector that cannot be read is damage like any other: set aside, reported, repaired from a peer.
                data = b""
        for item in run:
            at = item.entry.offset + RECORD_HEADER_BYTES - begin
            yield item, _verified(item.block_id, data[at : at + item.entry.length])


def _place(run: Sequence[Wanted]) -> tuple[int, int]:
    """Return where a run's first block begins, and the bytes from there to the end of its last one."""
    begin = run[0].entry.offset + RECORD_HEADER_BYTES
    last = run[-1].entry
    return begin, last.offset + RECORD_HEADER_BYTES + last.length - begin


def _runs(ordered: Sequence[Wanted]) -> Iterator[list[Wanted]]:
    run: list[Wanted] = []
    for item in ordered:
        if run and not _joins(run, item):
            yield run
            run = []
        run.append(item)
    if run:
        yield run


def _joins(run: Sequence[Wanted], item: Wanted) -> bool:
    first, last, entry = run[0].entry, run[-1].entry, item.entry
    end = last.offset + RECORD_HEADER_BYTES + last.length
    return (
        entry.segment == first.segment
        and entry.offset - end <= _GAP_BYTES_MAX
        and entry.offset + entry.length - first.offset <= _RUN_BYTES_MAX
    )


def _verified(block_id: bytes, data: bytes) -> SealedBlock | None:
    try:
        return verify(block_id, data)
    except HoldfastError:
        return None
