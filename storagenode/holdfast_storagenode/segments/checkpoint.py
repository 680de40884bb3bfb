"""Writes checkpoints beside the traffic, so that the log to replay at start and the overlay in memory stay bounded."""

from __future__ import annotations

import threading
from typing import Final

import lmdb

from holdfast_core.model.limits import GIB
from holdfast_storagenode.segments.committer import GroupCommitter
from holdfast_storagenode.segments.index import Index
from holdfast_storagenode.segments.table import BlockTable

CHECKPOINT_ENTRIES: Final = 65_536
CHECKPOINT_BYTES: Final = 1 * GIB


class Checkpointer:
    """A thread that writes a checkpoint when enough was committed since the last one."""

    def __init__(self, index: Index, table: BlockTable, *, entries: int, size_bytes: int) -> None:
        self._index = index
        self._table = table
        self._entries = entries
        self._size_bytes = size_bytes
        self._committer: GroupCommitter | None = None
        self._writing = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._grown_bytes = 0
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)

    def start(self, committer: GroupCommitter) -> None:
        """Start the thread; `committer` guards the table."""
        self._committer = committer
        self._thread.start()

    def committed(self, size_bytes: int) -> None:
        """Take note of a commit of `size_bytes`; called by the committing thread."""
        self._grown_bytes += size_bytes
        if self._table.overlay_entries >= self._entries or self._grown_bytes >= self._size_bytes:
            self._wake.set()

    def write(self) -> bool:
        """Write a checkpoint of all that is committed; False, with nothing lost, if the index cannot take it."""
        committer = self._committer
        if committer is None:
            return False
        with self._writing:
            with committer.lock:
                changes, checkpoint = self._table.freeze(*committer.end)
                self._grown_bytes = 0
            written = False
            try:
                self._index.write(changes, checkpoint)
                written = True
            except lmdb.Error:
                # Most likely no space: the log still has everything, so the next try writes it.
                written = False
            finally:
                with committer.lock:
                    self._table.thaw(written=written)
            return written

    def close(self) -> None:
        """End the thread; the caller writes a last checkpoint after the last commit."""
        self._closing = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            if self._closing:
                return
            self.write()
