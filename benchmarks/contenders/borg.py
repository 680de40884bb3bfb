"""borg as Debian ships it: with its defaults, and tuned for disk images."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

from benchmarks.contenders.base import Contender, Saved
from benchmarks.measure import run_measured, stored_bytes


class Borg(Contender):
    """`borg create` of the image file into a local repository, repokey encryption, LZ4.

    Args:
        tuned: fixed 4 MiB chunks and holes skipped on reading, its best setting for saving disks; restores stay sparse.
    """

    copies = 1

    def __init__(self, *, tuned: bool) -> None:
        self._create = ["--chunker-params", "fixed,4194304", "--sparse"] if tuned else []
        self._extract = ["--sparse"] if tuned else []
        self.name = "borg tuned" if tuned else "borg defaults"

    def open(self, folder: Path, disk: Path) -> None:
        """Make the repository."""
        self._folder = folder
        self._disk = disk
        self._repository = folder / "repository"
        self._points = 0
        self._environment = {
            "BORG_PASSPHRASE": "a benchmark has no secrets",
            "BORG_BASE_DIR": str(folder / "base"),
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
        }
        self._run(["init", "--encryption", "repokey", str(self._repository)], folder)

    def save(self) -> Saved:
        """Make the next archive."""
        self._points += 1
        archive = f"{self._repository}::{self._points}"
        return self._run(["create", "--compression", "lz4", *self._create, archive, self._disk.name], self._disk.parent)

    def restore(self, folder: Path) -> tuple[Saved, Path]:
        """Extract the newest archive."""
        archive = f"{self._repository}::{self._points}"
        saved = self._run(["extract", *self._extract, archive], folder)
        return replace(saved, replicated_s=0.0), folder / self._disk.name

    def stored_bytes(self) -> int:
        """Bytes of the repository, without the cache."""
        return stored_bytes(self._repository)

    def close(self) -> None:
        """Nothing runs."""

    def _run(self, arguments: list[str], cwd: Path) -> Saved:
        took = run_measured(["borg", *arguments], scratch=self._folder, cwd=cwd, environment=self._environment)
        return Saved(done_s=took.wall_s, client=took, server_cpu_s=0.0, replicated_s=took.wall_s)


def borg_version() -> str | None:
    """The version's line, or None where borg is not installed."""
    if shutil.which("borg") is None:
        return None
    return subprocess.run(["borg", "--version"], check=True, capture_output=True, text=True).stdout.strip()
