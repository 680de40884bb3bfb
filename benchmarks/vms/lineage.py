"""Restoring the fiftieth increment beside restoring the snapshot: a point is a complete image, not a chain."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Final

from benchmarks.spans import digest
from benchmarks.vms.cluster import running, timed
from benchmarks.vms.disks import MIB, apply_changes, grow, longest_data, plan_overwrites, real_bytes, update_pages

INCREMENTS: Final = 50
_DATABASE_BYTES: Final = 64 * MIB


def measure_lineage(image: Path, work: Path, runs: int, say: Callable[[str], None]) -> dict[str, float]:
    """Make fifty increments of database pages and new files; return seconds to restore first and last, by turns.

    Raises:
        RuntimeError: the last one did not restore what was saved.
    """
    folder = work / "lineage"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    disk = folder / "disk.img"
    grow(image, disk, image.stat().st_size)
    content = real_bytes()
    # Only data is overwritten: both images hold as much, and what differs is where their blocks come from.
    start, end = longest_data(disk)
    database_bytes = min(_DATABASE_BYTES, end - start) // MIB * MIB
    try:
        with running(folder) as cluster:
            manager = cluster.manager
            manager.register_vm("vm", {"disk": disk})
            snapshot = parent = manager.create_snapshot("vm")
            for number in range(INCREMENTS):
                files = plan_overwrites(disk, total_bytes=MIB, seed=number)
                apply_changes(disk, files, content)
                pages = update_pages(disk, first_byte=start, span_bytes=database_bytes, pages=100, seed=1000 + number)
                parent = manager.incremental_backup("vm", snapshot, changed=[*files, *pages], since=parent)
            deltas = sum(point.stats.delta_blocks for point in manager.points("vm"))
            say(f"{INCREMENTS} increments, {deltas} blocks coded as deltas")
            seconds: dict[str, list[float]] = {"snapshot": [], "fiftieth increment": []}
            for turn in range(2 * runs):
                order = [("snapshot", ""), ("fiftieth increment", parent)]
                for name, backup in order if turn % 2 == 0 else reversed(order):
                    target = folder / "restored"
                    seconds[name].append(
                        timed(lambda backup=backup, target=target: manager.restore_vm(snapshot, backup, target=target))  # type: ignore[misc]
                    )
                    if backup and digest(target / "disk.raw") != digest(disk):
                        raise RuntimeError("the fiftieth increment did not restore what was saved")
                    shutil.rmtree(target)
                    say(f"turn {turn + 1}, {name}: {seconds[name][-1]:.2f} s")
    finally:
        shutil.rmtree(folder)
    return {name: statistics.median(values) for name, values in seconds.items()}
