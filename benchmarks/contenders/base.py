"""What the benchmark asks of a program that keeps disk images."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from benchmarks.measure import Measured


@dataclass(frozen=True, slots=True)
class Saved:
    """One point in time was saved, or restored.

    Attributes:
        done_s: seconds from the start of the client's process until the result stands: the point is committed, the
            image restored. For a program that just exits then, its wall time.
        client: what the client's process took, from start to exit.
        server_cpu_s: what other processes of the contender used meanwhile; 0 where it has none.
        replicated_s: seconds from the start until every copy was durable; 0 for a restore.
        facts: further figures that the contender reports of itself.
    """

    done_s: float
    client: Measured
    server_cpu_s: float
    replicated_s: float
    facts: dict[str, float] = field(default_factory=dict)


class Saver(Protocol):
    """A fresh repository in a folder of its own that points are saved into; used for one run and closed."""

    def open(self, folder: Path, disk: Path) -> None:
        """Make the repository below `folder`, for the disk image at `disk` (whose content changes from day to day)."""

    def save(self) -> Saved:
        """Save the disk image as it is now; the second and later calls are incremental where that is a difference."""

    def stored_bytes(self) -> int:
        """Bytes that the repository occupies on the disk now, all copies."""

    def close(self) -> None:
        """Stop what runs; the caller removes the folder."""


class Contender(Saver, Protocol):
    """One of the programs that are compared."""

    name: str
    copies: int

    def restore(self, folder: Path) -> tuple[Saved, Path]:
        """Restore the newest point into an empty folder and return the image there."""
