"""Writing plaintext to files: neighbours in one call, and the page cache left as it was."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from holdfast.content import Sink
from holdfast.restoring.targets import unwritable
from holdfast_core.model.limits import MIB

DROP_LAG_BYTES: Final = 64 * MIB
_IOV_MAX: Final = 512


class DropBehind:
    """Hands written pages back to the kernel, so that a restore does not push everything else out of its cache.

    The first advice on a range begins to write it back and does not wait; the second, once so much more has been
    written that it should be clean, frees the pages, which the next writes then take. Pages that are still dirty
    simply stay. Where fresh pages are dear this is most of a restore's cost (ADR 0053). Safe to share between threads.
    """

    def __init__(self, descriptor: int) -> None:
        """Bind to an open file."""
        self._descriptor = descriptor
        self._recent: deque[tuple[int, int]] = deque()
        self._lock = threading.Lock()
        self._recent_bytes = 0

    def wrote(self, offset: int, length: int) -> None:
        """Take note of a range that has just been written."""
        due: list[tuple[int, int]] = []
        with self._lock:
            self._recent.append((offset, length))
            self._recent_bytes += length
            while self._recent_bytes > DROP_LAG_BYTES:
                oldest = self._recent.popleft()
                self._recent_bytes -= oldest[1]
                due.append(oldest)
        for start, count in [(offset, length), *due]:
            os.posix_fadvise(self._descriptor, start, count, os.POSIX_FADV_DONTNEED)


def file_sink(descriptor: int, path: Path, *, place: Callable[[int], int] | None = None) -> Sink:
    """Return a sink that writes plaintexts at their keys, or where `place` says that a key lies in the file."""
    behind = DropBehind(descriptor)

    def write(opened: Sequence[tuple[int, bytes]]) -> None:
        placed = opened if place is None else [(place(offset), plain) for offset, plain in opened]
        try:
            for run in _runs(placed):
                behind.wrote(run[0][0], _write_all(descriptor, run))
        except OSError as error:
            raise unwritable(path, error) from error

    return write


def _runs(opened: Sequence[tuple[int, bytes]]) -> list[list[tuple[int, bytes]]]:
    """Return groups of pieces that lie one after another."""
    runs: list[list[tuple[int, bytes]]] = []
    end = -1
    for offset, plain in sorted(opened, key=lambda piece: piece[0]):
        if offset == end and len(runs[-1]) < _IOV_MAX:
            runs[-1].append((offset, plain))
        else:
            runs.append([(offset, plain)])
        end = offset + len(plain)
    return runs


def _write_all(descriptor: int, run: Sequence[tuple[int, bytes]]) -> int:
    """Write a run of neighbours; returns its length."""
    offset = run[0][0]
    total = sum(len(plain) for _, plain in run)
    written = os.pwritev(descriptor, [plain for _, plain in run], offset)
    while written < total:
        rest = b"".join(plain for _, plain in run)[written:]
        written += os.pwrite(descriptor, rest, offset + written)
    return total
