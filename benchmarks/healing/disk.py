"""What a plain program needs to copy as many bytes durably, on the same disk in the same run."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

from benchmarks.measure import settle

_PIECE_BYTES: Final = 1024 * 1024


def durable_copy_s(folder: Path, size_bytes: int) -> float:
    """Seconds to copy a file of `size_bytes`, which is in the page cache, to another one below `folder`.

    By `read` and `write` in pieces of 1 MiB, one after another, and one `fdatasync` at the end: then it is on the disk.
    """
    source, target = folder / "copy-source", folder / "copy-target"
    try:
        with source.open("wb", buffering=0) as stream:
            for at in range(0, size_bytes, _PIECE_BYTES):
                stream.write(os.urandom(min(_PIECE_BYTES, size_bytes - at)))
        settle()
        start_s = time.monotonic()
        with source.open("rb", buffering=0) as data, target.open("wb", buffering=0) as out:
            while piece := data.read(_PIECE_BYTES):
                out.write(piece)
            os.fdatasync(out.fileno())
        return time.monotonic() - start_s
    finally:
        source.unlink(missing_ok=True)
        target.unlink(missing_ok=True)
