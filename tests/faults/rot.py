"""Bits that flip in the segment files of a node, behind its back."""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from holdfast_storagenode.segments.record import (
    FILE_HEADER_BYTES,
    RECORD_HEADER_BYTES,
    RecordFormat,
    RecordType,
)


@dataclass(frozen=True, slots=True, order=True)
class Copy:
    """One block's copy on a disk: where its bytes are."""

    kind: int
    block_id: bytes
    path: Path
    offset: int
    length: int


def copies(directory: Path) -> Iterator[Copy]:
    """Yield the copies in a node's segment files in the order of the log."""
    incarnation = bytes.fromhex(json.loads((directory / "node.json").read_text())["incarnation"])
    records = RecordFormat(incarnation)
    for path in sorted((directory / "segments").glob("*.seg")):
        content = path.read_bytes()
        at = FILE_HEADER_BYTES
        while (header := records.parse(content[at : at + RECORD_HEADER_BYTES])) is not None:
            if header.type is RecordType.BLOCK:
                yield Copy(header.kind, header.block_id, path, at + RECORD_HEADER_BYTES, header.length)
            at += header.record_bytes


def rot(directory: Path, source: random.Random, block_ids: Collection[bytes]) -> int:
    """Flip one bit of every copy of these blocks; return of how many."""
    rotten = [copy for copy in copies(directory) if copy.block_id in block_ids]
    for copy in rotten:
        place = copy.offset + source.randrange(copy.length)
        with copy.path.open("r+b") as segment:
            segment.seek(place)
            (byte,) = segment.read(1)
            segment.seek(place)
            segment.write(bytes([byte ^ 1 << source.randrange(8)]))
    return len(rotten)
