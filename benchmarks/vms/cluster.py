"""A cluster of processes and a manager in this one, as an orchestrator embeds it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contenders.holdfast import Holdfast
from benchmarks.measure import settle
from holdfast import StateManager


@dataclass(frozen=True, slots=True)
class Running:
    """A cluster that takes writes.

    Attributes:
        coordinator: HOST:PORT.
        manager: of this process.
        folder: where the cluster keeps everything.
    """

    coordinator: str
    manager: StateManager
    folder: Path


@contextmanager
def running(work: Path, *, nodes: int = 1) -> Iterator[Running]:
    """Run a cluster of so many nodes and copies below `work`."""
    folder = work / f"holdfast-{nodes}"
    folder.mkdir(parents=True)
    cluster = Holdfast(nodes=nodes)
    coordinator = cluster.start(folder)
    try:
        with StateManager(coordinator) as manager:
            yield Running(coordinator, manager, folder / "cluster")
    finally:
        cluster.close()


def timed(call: Callable[[], object]) -> float:
    """Make a call on a quiet disk and return its seconds."""
    settle()
    start = time.monotonic()
    call()
    return time.monotonic() - start


def drop_caches() -> bool:
    """Let the kernel forget what it has read; returns whether we may."""
    settle()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except PermissionError:
        return False
    return os.geteuid() == 0
