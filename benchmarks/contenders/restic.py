"""restic as Debian ships it: encryption is always on, compression as it comes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from benchmarks.contenders.base import Contender, Saved
from benchmarks.measure import run_measured, stored_bytes


class Restic(Contender):
    """`restic backup` of the image file into a local repository."""

    name = "restic"
    copies = 1

    def open(self, folder: Path, disk: Path) -> None:
        """Make the repository; repository format 2, which compresses with Zstandard, where this restic knows it."""
        self._folder = folder
        self._disk = disk
        self._repository = folder / "repository"
        password = folder / "password"
        password.write_text("a benchmark has no secrets\n")
        self._base = ["restic", "-q", "--repo", str(self._repository), "--password-file", str(password)]
        self._base += ["--cache-dir", str(folder / "cache")]
        run_measured([*self._base, "init", "--repository-version", "2"], scratch=folder)

    def save(self) -> Saved:
        """Back the image up."""
        took = run_measured([*self._base, "backup", self._disk.name], scratch=self._folder, cwd=self._disk.parent)
        return Saved(done_s=took.wall_s, client=took, server_cpu_s=0.0, replicated_s=took.wall_s)

    def restore(self, folder: Path) -> tuple[Saved, Path]:
        """Restore the newest snapshot."""
        took = run_measured([*self._base, "restore", "latest", "--target", str(folder)], scratch=self._folder)
        saved = Saved(done_s=took.wall_s, client=took, server_cpu_s=0.0, replicated_s=0.0)
        return saved, folder / self._disk.name

    def stored_bytes(self) -> int:
        """Bytes of the repository, without the cache."""
        return stored_bytes(self._repository)

    def close(self) -> None:
        """Nothing runs."""


def restic_version() -> str | None:
    """The version's line, or None where restic is not installed."""
    if shutil.which("restic") is None:
        return None
    said = subprocess.run(["restic", "version"], check=True, capture_output=True, text=True).stdout
    return " ".join(said.split()[:2])
