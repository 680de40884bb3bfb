"""Increments that cost what is dirty: beside programs that read the whole disk, and on disks that grow."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from benchmarks.contenders.base import Saver
from benchmarks.contenders.borg import Borg, borg_version
from benchmarks.contenders.casync import Casync, casync_version
from benchmarks.contenders.restic import Restic, restic_version
from benchmarks.image import ImageSet
from benchmarks.measure import settle
from benchmarks.spans import warm
from benchmarks.vms.cluster import running, timed
from benchmarks.vms.disks import MIB, apply_changes, grow, plan_changes, real_bytes

DIRTY_BYTES: Final = 25 * MIB
GROWN_GIB: Final = (1, 4, 16)
_WITHIN_BYTES: Final = 900 * MIB


def measure_peers(images: ImageSet, work: Path, runs: int, say: Callable[[str], None]) -> dict[str, float]:
    """Save a 4 GiB disk, change 25 MB of it, save again; return each program's seconds for the second save.

    `holdfast` is told the places; `holdfast compared` is not, and reads everything that is allocated.
    """
    seconds: dict[str, list[float]] = {}
    peers: list[tuple[str, Saver]] = []
    if restic_version():
        peers.append(("restic", Restic()))
    if borg_version():
        peers.append(("borg tuned", Borg(tuned=True)))
    if casync_version():
        peers.append(("casync", Casync()))
    for run in range(runs):
        for name, peer in peers:
            seconds.setdefault(name, []).append(_peer_turn(peer, images, work / "turn", run))
            say(f"run {run + 1}, {name}: {seconds[name][-1]:.2f} s for {DIRTY_BYTES // MIB} MB dirty")
        for nodes in (1, 3):
            for name, took in _holdfast_turn(images, work / "turn", run, nodes).items():
                seconds.setdefault(name, []).append(took)
                say(f"run {run + 1}, {name}: {took:.3f} s")
    return {name: statistics.median(values) for name, values in seconds.items()}


def _peer_turn(peer: Saver, images: ImageSet, turn: Path, run: int) -> float:
    disk = _fresh_disk(images.path(0), turn)
    (turn / "peer").mkdir()
    peer.open(turn / "peer", disk)
    try:
        peer.save()
        apply_changes(disk, plan_changes(within_bytes=_WITHIN_BYTES, total_bytes=DIRTY_BYTES, seed=run), real_bytes())
        warm(disk)
        settle()
        return peer.save().done_s
    finally:
        peer.close()
        shutil.rmtree(turn)


def _holdfast_turn(images: ImageSet, turn: Path, run: int, nodes: int) -> dict[str, float]:
    disk = _fresh_disk(images.path(0), turn)
    content = real_bytes()
    suffix = "" if nodes == 1 else f", {nodes} nodes"
    try:
        with running(turn, nodes=nodes) as cluster:
            manager = cluster.manager
            manager.register_vm("vm", {"disk": disk})
            snapshot = parent = manager.create_snapshot("vm")
            found: dict[str, float] = {}
            for name, told in ((f"holdfast{suffix}", True), (f"holdfast compared{suffix}", False)):
                seed = run + (0 if told else 1000)
                changes = plan_changes(within_bytes=_WITHIN_BYTES, total_bytes=DIRTY_BYTES, seed=seed)
                apply_changes(disk, changes, content)
                warm(disk)
                made: list[str] = []
                found[name] = timed(
                    lambda parent=parent, changes=changes, told=told, made=made: made.append(  # type: ignore[misc]
                        manager.incremental_backup(
                            "vm", snapshot, changed=changes if told else None, since=parent if told else ""
                        )
                    )
                )
                parent = made[0]
            manager.verify(parent)
            return found
    finally:
        shutil.rmtree(turn)


def _fresh_disk(image: Path, turn: Path) -> Path:
    shutil.rmtree(turn, ignore_errors=True)
    turn.mkdir(parents=True)
    disk = turn / "disk.img"
    grow(image, disk, image.stat().st_size)
    warm(disk)
    return disk


def measure_growth(image: Path, work: Path, runs: int, say: Callable[[str], None]) -> dict[str, float]:
    """Save the same data on disks of 1, 4 and 16 GiB, and the same changes, told; return the seconds by size.

    The three take turns within one cluster, so that what else the machine does meets all of them.
    """
    seconds: dict[str, list[float]] = {f"{gib} GiB": [] for gib in GROWN_GIB}
    folder = work / "growth"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    within = image.stat().st_size * 9 // 10
    try:
        with running(folder) as cluster:
            manager = cluster.manager
            lines: dict[int, tuple[Path, str, str]] = {}
            for gib in GROWN_GIB:
                disk = folder / f"{gib}.img"
                grow(image, disk, gib * 1024 * MIB)
                manager.register_vm(f"vm-{gib}", {"disk": disk})
                snapshot = manager.create_snapshot(f"vm-{gib}")
                lines[gib] = (disk, snapshot, snapshot)
            for turn in range(runs * 2):
                for gib in _rotated(GROWN_GIB, turn):
                    disk, snapshot, parent = lines[gib]
                    changes = plan_changes(within_bytes=within, total_bytes=DIRTY_BYTES, seed=turn)
                    # Each disk gets content that no other has: none may live off another's blocks.
                    content = real_bytes()
                    for _ in range(50 * gib):
                        next(content)
                    apply_changes(disk, changes, content)
                    warm(disk)
                    made: list[str] = []
                    took = timed(
                        lambda gib=gib, snapshot=snapshot, parent=parent, changes=changes, made=made: made.append(  # type: ignore[misc]
                            manager.incremental_backup(f"vm-{gib}", snapshot, changed=changes, since=parent)
                        )
                    )
                    seconds[f"{gib} GiB"].append(took)
                    lines[gib] = (disk, snapshot, made[0])
                    say(f"turn {turn + 1}, {gib} GiB: {took:.3f} s")
    finally:
        shutil.rmtree(folder)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _rotated(items: Sequence[int], by: int) -> list[int]:
    at = by % len(items)
    return [*items[at:], *items[:at]]
