"""From power-on to the login prompt: from a local file, and from a recovery point over NBD whose data is not there yet.

The guest is a Debian of debootstrap with systemd and sshd, under emulation; the disk that it boots from is all that
differs. Before each boot the kernel's page cache is dropped, and what serves is started anew, so that nothing is warm.
"""

from __future__ import annotations

import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from benchmarks.ext4 import make_filesystem
from benchmarks.vms.cluster import drop_caches, running
from benchmarks.vms.disks import MIB
from holdfast import StateManager
from tests.support.guest import Drive, Guest

_SIZE_BYTES: Final = 2048 * MIB
_PACKAGES: Final = "systemd-sysv,udev,openssh-server,kmod"
_LOGIN_WITHIN_S: Final = 180.0
_MEMORY_MIB: Final = 512


def debian_image(cache: Path, say: Callable[[str], None]) -> Path:
    """Return an ext4 image of a minimal Debian with systemd, made once by debootstrap, which takes root and a minute.

    Raises:
        subprocess.CalledProcessError: debootstrap failed, for want of root or of a mirror.
    """
    image = cache / "debian-guest.img"
    if not image.exists():
        say("making a Debian guest by debootstrap; once only")
        tree = cache / "debian-guest"
        shutil.rmtree(tree, ignore_errors=True)
        subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", "bookworm", str(tree)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        (tree / "etc/fstab").write_text("/dev/vda / ext4 defaults 0 1\n")
        (tree / "etc/hostname").write_text("guest\n")
        shutil.rmtree(tree / "var/cache/apt", ignore_errors=True)
        making = image.with_suffix(".making")
        make_filesystem(making, size_bytes=_SIZE_BYTES, tree=tree)
        shutil.rmtree(tree)
        making.rename(image)
    return image


def _boot_s(drive: Drive) -> float:
    guest = Guest([drive], memory_mib=_MEMORY_MIB)
    begun = time.monotonic()
    guest.start()
    try:
        guest.wait_for_login(_LOGIN_WITHIN_S)
        return time.monotonic() - begun
    finally:
        guest.kill()


@contextmanager
def _served(coordinator: str, point: str, folder: Path) -> Iterator[tuple[Path, float]]:
    """Serve a point by the command; yields the socket and the seconds until it could be used."""
    path = folder / "nbd.sock"
    command = [sys.executable, "-m", "holdfast.cli.main", "serve", point, "--coordinator", coordinator]
    command += ["--socket", str(path), "--overlay", str(folder / "overlay")]
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("ready"):
            raise RuntimeError(f"`holdfast serve` did not become ready: {line!r}")
        yield path, time.monotonic() - begun
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        shutil.rmtree(folder / "overlay", ignore_errors=True)


def measure_boots(cache: Path, work: Path, runs: int, say: Callable[[str], None]) -> dict[str, float]:
    """Boot by turns from a local copy and over NBD; returns median seconds to the login prompt.

    The time over NBD includes starting `holdfast serve`.
    """
    image = debian_image(cache, say)
    folder = work / "boot"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    seconds: dict[str, list[float]] = {"local file": [], "over NBD": [], "restored first": []}
    local = folder / "local.img"
    try:
        with running(folder) as cluster:
            manager: StateManager = cluster.manager
            manager.register_vm("guest", {"root": image})
            point = manager.create_snapshot("guest")
            for run in range(runs):
                subprocess.run(["cp", "--sparse=always", "--reflink=never", str(image), str(local)], check=True)
                cold = drop_caches()
                seconds["local file"].append(_boot_s(Drive.raw("root", local)))
                drop_caches()
                with _served(cluster.coordinator, point, folder) as (path, started_s):
                    seconds["over NBD"].append(started_s + _boot_s(Drive.nbd_unix("root", path, "root")))
                drop_caches()
                begun = time.monotonic()
                restored = manager.restore_vm(point, target=folder / "restored")
                restore_s = time.monotonic() - begun
                seconds["restored first"].append(restore_s + _boot_s(Drive.raw("root", restored / "root.raw")))
                shutil.rmtree(restored)
                say(
                    f"run {run + 1}: "
                    + ", ".join(f"{name} {values[-1]:.1f} s" for name, values in seconds.items())
                    + ("" if cold else " (page cache not dropped: needs root)")
                )
    finally:
        shutil.rmtree(folder)
    return {name: statistics.median(values) for name, values in seconds.items()}
