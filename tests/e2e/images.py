"""Disk images for the scenarios: sparse, odd, repeatable from a seed."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

KIB = 1024
MIB = 1024 * KIB


def make_image(path: Path, *, size_bytes: int, data_bytes: int, seed: int) -> None:
    """Write a sparse image: runs of half-compressible data at seeded places, holes between."""
    source = random.Random(seed)
    with path.open("wb") as image:
        image.truncate(size_bytes)
        left = data_bytes
        while left > 0:
            run = min(left, source.randrange(4 * KIB, 512 * KIB))
            image.seek(source.randrange(0, max(1, size_bytes - run)))
            image.write(source.randbytes(run // 2) + b"state of a virtual machine\n" * (run // 54))
            left -= run


def change_image(path: Path, *, edits: int, seed: int) -> None:
    """Overwrite `edits` seeded pages of 4 KiB in place."""
    source = random.Random(seed)
    size_bytes = path.stat().st_size
    with path.open("r+b") as image:
        for _ in range(edits):
            image.seek(source.randrange(0, size_bytes - 4 * KIB))
            image.write(source.randbytes(4 * KIB))


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
