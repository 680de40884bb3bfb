"""casync as Debian ships it: chunks of 64 KiB on average, Zstandard, no encryption."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from benchmarks.contenders.base import Contender, Saved
from benchmarks.measure import run_measured, stored_bytes


class Casync(Contender):
    """`casync make` of the image as a blob into a local store."""

    name = "casync"
    copies = 1

    def open(self, folder: Path, disk: Path) -> None:
        """Name the store; the first save makes it."""
        self._folder = folder
        self._disk = disk
        self._store = folder / "store.castr"
        self._points = 0

    def save(self) -> Saved:
        """Chunk the image and add what is new."""
        self._points += 1
        index = self._folder / f"{self._points}.caibx"
        took = run_measured(
            ["casync", "make", f"--store={self._store}", str(index), str(self._disk)], scratch=self._folder
        )
        return Saved(done_s=took.wall_s, client=took, server_cpu_s=0.0, replicated_s=took.wall_s)

    def restore(self, folder: Path) -> tuple[Saved, Path]:
        """Put the newest image together again."""
        target = folder / self._disk.name
        index = self._folder / f"{self._points}.caibx"
        took = run_measured(
            ["casync", "extract", f"--store={self._store}", str(index), str(target)], scratch=self._folder
        )
        return Saved(done_s=took.wall_s, client=took, server_cpu_s=0.0, replicated_s=0.0), target

    def stored_bytes(self) -> int:
        """Bytes of the store and the indexes."""
        return stored_bytes(self._store) + sum(path.stat().st_size for path in self._folder.glob("*.caibx"))

    def close(self) -> None:
        """Nothing runs."""


def casync_version() -> str | None:
    """The version's line, or None where casync is not installed."""
    if shutil.which("casync") is None:
        return None
    return subprocess.run(["casync", "--version"], check=True, capture_output=True, text=True).stdout.split("\n")[0]
