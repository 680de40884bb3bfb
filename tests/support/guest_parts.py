"""What a small real guest is made of: Debian's cloud kernel, a first root in memory, and a root disk of busybox.

The kernel's package comes from the system's own package source and is kept, unpacked, below the user's cache folder;
`HOLDFAST_TEST_KERNEL` names a package file instead. Everything else is made in a fraction of a second.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from tests.support.qemu import program, tool

_KERNEL: Final = "linux-image-cloud-amd64"
_KERNEL_FILE: Final = os.environ.get("HOLDFAST_TEST_KERNEL")
_MODULES: Final = (
    "virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk",
)  # fmt: skip
_AGENT_MODULES: Final = ("virtio_console",)

_FIRST_PROGRAM: Final = """\
#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs dev /dev
$b mount -t proc proc /proc
for m in MODULES; do $b insmod /modules/$m.ko; done
for o in $($b cat /proc/cmdline); do
    case $o in
        root=*) root=${o#root=} ;;
        holdfast.agent) for m in AGENT_MODULES; do $b insmod /modules/$m.ko; done ;;
    esac
done
while [ ! -b $root ]; do $b usleep 10000; done
$b mount -t ext4 -o rw $root /new || $b mount -t ext4 -o ro $root /new
$b umount /proc
$b mount --move /dev /new/dev
exec $b switch_root /new /sbin/init
"""
_INITTAB: Final = """\
::sysinit:/etc/rc
ttyS0::respawn:/bin/getty -L 115200 ttyS0 vt100
::ctrlaltdel:/bin/reboot
::shutdown:/bin/umount -a -r
"""
_RC: Final = """\
#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /run
hostname guest
[ -x /usr/sbin/qemu-ga ] && [ -c /dev/vport0p1 ] && qemu-ga -m virtio-serial -p /dev/vport0p1 -d -f /run/qemu-ga.pid
exit 0
"""


@dataclass(frozen=True, slots=True)
class GuestParts:
    """What QEMU boots a guest with, beside its root disk."""

    kernel: Path
    first_root: Path


@functools.cache
def guest_parts() -> GuestParts:
    """Return kernel and first root; got and made when there are none yet. Safe in several processes at once.

    Raises:
        AssertionError: the package cannot be had; it says why.
    """
    with _locked_cache() as cache:
        unpacked = _unpacked(cache, "kernel", _KERNEL, _KERNEL_FILE)
        (kernel,) = (unpacked / "boot").glob("vmlinuz-*")
        archive = _first_root(unpacked)
        first_root = cache / f"first-root-{hashlib.sha256(archive).hexdigest()[:16]}.cpio"
        if not first_root.exists():
            whole = first_root.with_suffix(f".{os.getpid()}")
            whole.write_bytes(archive)
            whole.rename(first_root)
    return GuestParts(kernel, first_root)


@functools.cache
def agent_program() -> Path:
    """Return the path of QEMU's guest agent, got as the kernel is. Raises AssertionError if it cannot be had."""
    installed = Path("/usr/sbin/qemu-ga")
    if installed.exists():
        return installed
    with _locked_cache() as cache:
        return _unpacked(cache, "agent", "qemu-guest-agent", None) / "usr/sbin/qemu-ga"


def make_root(
    path: Path, *, size_bytes: int = 64 << 20, files: Mapping[str, bytes] = MappingProxyType({}), agent: bool = False
) -> Path:
    """Make a root disk: one ext4 file system without a partition table, sparse, of a guest that boots to `login:`.

    Args:
        path: where it goes.
        size_bytes: its size.
        files: further files by their path in the guest.
        agent: with QEMU's guest agent in it.
    """
    with tempfile.TemporaryDirectory(prefix="holdfast-root-") as folder:
        root = Path(folder)
        for name in ("bin", "dev", "etc", "proc", "root", "run", "sbin", "srv", "sys", "tmp", "usr/sbin", "var"):
            (root / name).mkdir(parents=True)
        _copy_program(Path(program("busybox")), root, "bin/busybox")
        for name in tool("busybox", "--list").split():
            if name != "busybox":
                (root / "bin" / name).symlink_to("/bin/busybox")
        (root / "sbin/init").symlink_to("/bin/busybox")
        (root / "var/run").symlink_to("/run")
        if agent:
            _copy_program(agent_program(), root, "usr/sbin/qemu-ga")
        given = {
            "etc/inittab": _INITTAB.encode(),
            "etc/rc": _RC.encode(),
            "etc/passwd": b"root::0:0:root:/root:/bin/sh\n",
            "etc/group": b"root:x:0:\n",
            **{name.lstrip("/"): content for name, content in files.items()},
        }
        for name, content in given.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        (root / "etc/rc").chmod(0o755)
        path.unlink(missing_ok=True)
        with path.open("wb") as image:
            image.truncate(size_bytes)
        tool("mkfs.ext4", "-q", "-F", "-d", root, "-E", "root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0", path)
    return path


def _first_root(unpacked: Path) -> bytes:
    """Return the archive of the first root: busybox, the modules that reach a disk, and a program of a dozen lines."""
    with tempfile.TemporaryDirectory(prefix="holdfast-first-root-") as folder:
        root = Path(folder)
        for name in ("bin", "dev", "modules", "new", "proc"):
            (root / name).mkdir()
        _copy_program(Path(program("busybox")), root, "bin/busybox")
        for module in (*_MODULES, *_AGENT_MODULES):
            (found,) = (unpacked / "lib/modules").rglob(f"{module}.ko")
            shutil.copyfile(found, root / "modules" / found.name)
        first = _FIRST_PROGRAM.replace("AGENT_MODULES", " ".join(_AGENT_MODULES)).replace("MODULES", " ".join(_MODULES))
        (root / "init").write_text(first)
        (root / "init").chmod(0o755)
        return _cpio(root)


def _cpio(root: Path) -> bytes:
    """Pack a folder in the format "newc" (kernel documentation, `driver-api/early-userspace/buffer-format`)."""
    packed = bytearray()
    for number, path in enumerate(sorted(root.rglob("*")), start=1):
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            content = os.fsencode(path.readlink())
        else:
            content = path.read_bytes() if path.is_file() else b""
        packed += _cpio_entry(os.fsencode(path.relative_to(root)), number, status.st_mode, content)
    return bytes(packed + _cpio_entry(b"TRAILER!!!", 0, 0, b""))


def _cpio_entry(name: bytes, number: int, mode: int, content: bytes) -> bytes:
    fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % each for each in fields) + name + b"\0"
    return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)


def _copy_program(source: Path, root: Path, name: str) -> None:
    """Copy a program and the shared libraries that it is linked with."""
    shutil.copyfile(source, root / name)
    (root / name).chmod(0o755)
    linked = subprocess.run([program("ldd"), source], capture_output=True, text=True, check=False)
    for line in linked.stdout.splitlines():
        found = re.search(r"(?:=> )?(/\S+) \(0x", line)
        if found is not None:
            library = Path(found.group(1))
            target = root / str(library).lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(library.resolve(), target)
            target.chmod(0o755)


@contextmanager
def _locked_cache() -> Iterator[Path]:
    """Hold the cache folder alone: the processes of one test run want the same package at the same moment."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = base / "holdfast-tests"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield cache


def _unpacked(cache: Path, name: str, package: str, file: str | None) -> Path:
    """Return the folder of a package's files, got and unpacked if it is not there."""
    kept = cache / (name if file is None else f"{name}-{hashlib.sha256(file.encode()).hexdigest()[:16]}")
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            found = Path(file) if file is not None else _download(package, Path(folder))
            tool("dpkg", "-x", found, Path(folder) / "files")
            (Path(folder) / "files").rename(kept)
    return kept


def _download(package: str, folder: Path) -> Path:
    """Get a package's file, or that of the one it stands for, with package lists of our own where there are none."""
    options: list[str] = []
    if not _depends(package, options):
        for name in ("state/lists/partial", "cache/archives/partial"):
            (folder / name).mkdir(parents=True)
        # The system's keys and sources as they are, but lists that need no rights to write.
        options = ["-o", f"Dir::State={folder / 'state'}", "-o", f"Dir::Cache={folder / 'cache'}"]
        tool("apt-get", *options, "update", "--quiet")
    depends = _depends(package, options)
    images = re.findall(r"Depends: (linux-image-\S+)", depends)
    tool("apt-get", *options, "download", "--quiet", images[0] if images else package, cwd=folder)
    (found,) = folder.glob("*.deb")
    return found


def _depends(package: str, options: list[str]) -> str:
    asked = subprocess.run(
        [program("apt-cache"), *options, "depends", package], capture_output=True, text=True, check=False
    )
    return asked.stdout
