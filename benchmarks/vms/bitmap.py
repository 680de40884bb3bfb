"""The same increments out of a running QEMU: its dirty bitmap tells what changed, at one moment."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import settle
from benchmarks.vms.cluster import running, timed
from benchmarks.vms.disks import MIB, grow, plan_changes, real_bytes
from tests.support.qemu import Drive, Qemu

_WITHIN_BYTES = 900 * MIB


def measure_bitmap(image: Path, work: Path, runs: int, dirty_bytes: int, say: Callable[[str], None]) -> float:
    """Let QEMU write `dirty_bytes` to a disk between backups; return the median seconds of an incremental."""
    folder = work / "bitmap"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    disk, piece = folder / "disk.img", folder / "piece"
    grow(image, disk, image.stat().st_size)
    content = real_bytes()
    seconds: list[float] = []
    try:
        with running(folder) as cluster, Qemu([Drive.raw("disk", disk)]) as machine:
            manager = cluster.manager
            manager.register_vm("vm", {"disk": machine.uri("disk")})
            snapshot = manager.create_snapshot("vm")
            for run in range(2 * runs):
                waiting = b""
                changes = plan_changes(within_bytes=_WITHIN_BYTES, total_bytes=dirty_bytes, seed=100 + run)
                for offset, length in changes:
                    while len(waiting) < length:
                        waiting += next(content)
                    piece.write_bytes(waiting[:length])
                    waiting = waiting[length:]
                    machine.io("disk", f"write -s {piece} {offset} {length}")
                settle()
                made: list[str] = []
                seconds.append(timed(lambda made=made: made.append(manager.incremental_backup("vm", snapshot))))  # type: ignore[misc]
                read = manager.point(made[0]).volumes[0].reading.value
                say(f"run {run + 1}, holdfast by QEMU's bitmap: {seconds[-1]:.3f} s ({read})")
    finally:
        shutil.rmtree(folder)
    return statistics.median(seconds)
