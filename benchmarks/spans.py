"""Reading sparse images: which ranges hold data, what a day changed, and getting an image into the page cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from blake3 import blake3

_READ_BYTES: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Novelty:
    """What an image adds to a store that has the images before it, at one block size.

    Attributes:
        data_bytes: bytes in blocks that are not all zero.
        new_bytes: bytes in blocks whose content the earlier images do not have anywhere, each content counted once.
    """

    data_bytes: int
    new_bytes: int


def allocated_ranges(image: Path) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the ranges of a sparse file that are not holes, in bytes."""
    with open(image, "rb") as source:
        size = os.fstat(source.fileno()).st_size
        at = 0
        while at < size:
            try:
                start = os.lseek(source.fileno(), at, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but holes from here on
                return
            at = os.lseek(source.fileno(), start, os.SEEK_HOLE)
            yield start, at


def data_blocks(image: Path, block_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yield (block number, content) of every block that touches allocated space and is not all zero."""
    zero = bytes(block_bytes)
    last = -1
    with open(image, "rb") as source:
        for start, end in allocated_ranges(image):
            for number in range(max(start // block_bytes, last + 1), -(-end // block_bytes)):
                last = number
                block = os.pread(source.fileno(), block_bytes, number * block_bytes)
                if block != zero[: len(block)]:
                    yield number, block


def novelty(images: list[Path], *, block_bytes: int) -> list[Novelty]:
    """For each image in turn, what it adds to those before it."""
    seen: set[bytes] = set()
    result = []
    for image in images:
        data = new = 0
        for _, block in data_blocks(image, block_bytes):
            data += len(block)
            digest = blake3(block).digest()
            if digest not in seen:
                seen.add(digest)
                new += len(block)
        result.append(Novelty(data_bytes=data, new_bytes=new))
    return result


def warm(image: Path) -> int:
    """Read a whole image, holes too, so that every peer finds it in the page cache; return its size in bytes."""
    total = 0
    with open(image, "rb", buffering=0) as source:
        while piece := source.read(_READ_BYTES):
            total += len(piece)
    return total


def digest(path: Path) -> str:
    """BLAKE3 of a whole file, as hex."""
    hasher = blake3(max_threads=blake3.AUTO)
    with open(path, "rb", buffering=0) as source:
        while piece := source.read(_READ_BYTES):
            hasher.update(piece)
    return hasher.hexdigest()
