"""What the second VM of a template adds to a store, in bytes: its own host name, keys, logs and some packages."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Final

from benchmarks.contenders.base import Saver
from benchmarks.contenders.borg import Borg, borg_version
from benchmarks.contenders.casync import Casync, casync_version
from benchmarks.contenders.restic import Restic, restic_version
from benchmarks.ext4 import change_files
from benchmarks.image import ImageSet
from benchmarks.measure import settle, stored_bytes
from benchmarks.packages import installed_packages
from benchmarks.vms.cluster import running
from benchmarks.vms.disks import MIB, grow, update_pages

_OWN_BYTES: Final = 20 * MIB


def make_second(images: ImageSet, disk: Path, scratch: Path) -> None:
    """Make `disk` a VM of the template: what a first boot and an hour of work leave behind."""
    grow(images.path(0), disk, images.size_bytes)
    scratch.mkdir(parents=True)
    dice = random.Random(2)
    own = {
        "/own/hostname": b"web-2\n",
        "/own/machine-id": dice.randbytes(16).hex().encode() + b"\n",
        "/own/ssh_host_ed25519_key": dice.randbytes(400),
        "/own/syslog": b"".join(
            f"2026-11-23T10:{at // 60 % 60:02}:{at % 60:02} web-2 service[{dice.randrange(30000)}]: ready\n".encode()
            for at in range(40_000)
        ),
    }
    add: dict[PurePosixPath, Path] = {}
    for place, data in own.items():
        source = scratch / PurePosixPath(place).name
        source.write_bytes(data)
        add[PurePosixPath(place)] = source
    taken = 0
    for package in reversed(list(installed_packages())):
        if taken >= _OWN_BYTES:
            break
        if package.content_bytes < _OWN_BYTES // 4:
            taken += package.content_bytes
            add |= {PurePosixPath(f"/own/{package.name}/{path.name}"): path for path in package.paths}
    change_files(disk, add=add, replace={}, there=())
    # What ran wrote its database, too.
    update_pages(disk, first_byte=64 * MIB, span_bytes=64 * MIB, pages=400, seed=3)


def measure_second(images: ImageSet, work: Path, say: Callable[[str], None]) -> dict[str, int]:
    """Return the bytes that saving a second VM adds, by program."""
    turn = work / "second"
    shutil.rmtree(turn, ignore_errors=True)
    turn.mkdir(parents=True)
    first, second = turn / "first.img", turn / "second.img"
    grow(images.path(0), first, images.size_bytes)
    make_second(images, second, turn / "scratch")
    added: dict[str, int] = {}
    peers: list[tuple[str, Saver]] = []
    if restic_version():
        peers.append(("restic", Restic()))
    if borg_version():
        peers += [("borg tuned", Borg(tuned=True)), ("borg defaults", Borg(tuned=False))]
    if casync_version():
        peers.append(("casync", Casync()))
    try:
        for name, peer in peers:
            added[name] = _peer(peer, first, second, turn / "peer")
            say(f"{name}: the second VM adds {added[name] / 1e6:.1f} MB")
        with running(turn) as cluster:
            manager = cluster.manager
            manager.register_vm("first", {"disk": first})
            template = manager.create_snapshot("first")
            settle()
            before = stored_bytes(cluster.folder)
            manager.register_vm("second", {"disk": second}, template=template)
            point = manager.create_snapshot("second")
            settle()
            added["holdfast"] = stored_bytes(cluster.folder) - before
            stats = manager.point(point).stats
            added["holdfast, sealed blocks alone"] = stats.stored_bytes
            say(f"holdfast: the second VM adds {added['holdfast'] / 1e6:.1f} MB, of which {stats.delta_blocks} deltas")
    finally:
        shutil.rmtree(turn)
    return added


def _peer(peer: Saver, first: Path, second: Path, folder: Path) -> int:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "store").mkdir(parents=True)
    disk = folder / "disk.img"
    grow(first, disk, first.stat().st_size)
    peer.open(folder / "store", disk)
    try:
        peer.save()
        settle()
        before = peer.stored_bytes()
        grow(second, disk, second.stat().st_size)
        peer.save()
        settle()
        return peer.stored_bytes() - before
    finally:
        peer.close()
        shutil.rmtree(folder)
