"""Disks that change by a known amount at known places."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from benchmarks.spans import allocated_ranges

KIB: Final = 1024
MIB: Final = 1024 * KIB
Changes = list[tuple[int, int]]
"""(offset, length) of what was written."""

_ALIGNED: Final = 64 * KIB
_RUNS: Final = (64 * KIB, 128 * KIB, 256 * KIB, MIB)


def grow(image: Path, disk: Path, size_bytes: int) -> None:
    """Make `disk` a sparse copy of `image` with `size_bytes`, the rest a hole."""
    disk.unlink(missing_ok=True)
    subprocess.run(["cp", "--sparse=always", "--reflink=never", str(image), str(disk)], check=True)
    os.truncate(disk, max(size_bytes, image.stat().st_size))


def plan_changes(*, within_bytes: int, total_bytes: int, seed: int) -> Changes:
    """Return places of `total_bytes`, in runs of 64 KiB to 1 MiB, none twice, ascending."""
    dice = random.Random(seed)
    taken: set[int] = set()
    changes: Changes = []
    left = total_bytes
    while left > 0:
        length = min(dice.choice(_RUNS), left)
        first = dice.randrange((within_bytes - length) // _ALIGNED)
        slots = range(first, first - (-length // _ALIGNED))
        if taken.isdisjoint(slots):
            taken.update(slots)
            changes.append((first * _ALIGNED, length))
            left -= length
    return sorted(changes)


def plan_overwrites(disk: Path, *, total_bytes: int, seed: int) -> Changes:
    """Return places of `total_bytes`, one block of 64 KiB each, that hold data already: the disk does not fill up."""
    slots = data_slots(disk)
    chosen = random.Random(seed).sample(slots, total_bytes // _ALIGNED)
    return sorted((slot * _ALIGNED, _ALIGNED) for slot in chosen)


def data_slots(disk: Path) -> list[int]:
    """Return the numbers of the blocks of 64 KiB that lie in data as a whole."""
    return [slot for start, end in allocated_ranges(disk) for slot in range(-(-start // _ALIGNED), end // _ALIGNED)]


def longest_data(disk: Path) -> tuple[int, int]:
    """Return the longest range (start, end) that holds data."""
    return max(allocated_ranges(disk), key=lambda found: found[1] - found[0])


def real_bytes() -> Iterator[bytes]:
    """Yield files of this machine, without end: what guests write compresses about as they do."""
    folders = (Path("/usr/lib"), Path("/usr/share"))
    files = [
        path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()
    ]
    random.Random(7).shuffle(files)
    while True:
        for path in files:
            yield path.read_bytes()


def apply_changes(disk: Path, changes: Changes, content: Iterator[bytes]) -> None:
    """Write content at every place."""
    waiting = b""
    with disk.open("r+b") as stream:
        for offset, length in changes:
            while len(waiting) < length:
                waiting += next(content)
            stream.seek(offset)
            stream.write(waiting[:length])
            waiting = waiting[length:]


def update_pages(disk: Path, *, first_byte: int, span_bytes: int, pages: int, seed: int) -> Changes:
    """Write so many random 4 KiB pages within a span, half of each page new; return where."""
    dice = random.Random(seed)
    changes: Changes = []
    with disk.open("r+b") as stream:
        for page in sorted(dice.sample(range(span_bytes // 4096), pages)):
            at = first_byte + page * 4096
            stream.seek(at)
            stream.write(dice.randbytes(512) + f"row {page} ".encode() * 150)
            changes.append((at, 2048))
    return changes
