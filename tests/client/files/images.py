"""ext4 images for the tests: made by e2fsprogs without root, and changed behind the file system's back."""

from __future__ import annotations

import os
import struct
import subprocess
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

MIB = 1 << 20
SECTOR: Final = 512
_LINUX: Final = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")


class ImageFile:
    """A file as an image that can be read anywhere; counts what is read."""

    def __init__(self, path: Path) -> None:
        self.fetched: list[tuple[int, int]] = []
        self._data = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size_bytes = path.stat().st_size

    @property
    def fetched_bytes(self) -> int:
        return sum(length for _, length in self.fetched)

    def read(self, offset: int, length: int) -> bytes:
        assert offset + length <= self.size_bytes
        self.fetched.append((offset, length))
        return os.pread(self._data, length, offset)

    def close(self) -> None:
        if self._data >= 0:
            os.close(self._data)
            self._data = -1

    def __del__(self) -> None:
        self.close()


def run(*command: str | Path, check: bool = True) -> str:
    """Run a program of e2fsprogs, which belongs to root's path."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    done = subprocess.run(
        [str(each) for each in command], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def make_image(path: Path, source: Path, *options: str, size: int = 24 * MIB) -> Path:
    """Make an ext4 image of a folder."""
    with path.open("wb") as stream:
        stream.truncate(size)
    kind = () if "-t" in options else ("-t", "ext4")
    run("mke2fs", "-q", "-F", *kind, *options, "-d", source, path)
    return path


def debugfs(path: Path, *commands: str) -> None:
    """Change an image with debugfs, all commands in one run."""
    script = path.with_suffix(".debugfs")
    script.write_text("".join(f"{command}\n" for command in commands))
    run("debugfs", "-w", "-f", script, path)


def with_partitions(path: Path, images: Sequence[Path], *, table: str = "gpt") -> Path:
    """Make a disk with a table of partitions and an image in each, at 1 MiB and on."""
    starts, at = [], MIB
    for image in images:
        starts.append((at, image.stat().st_size))
        at += -(-image.stat().st_size // MIB) * MIB
    with path.open("wb") as disk:
        disk.truncate(at + MIB)
        for (start, _), image in zip(starts, images, strict=True):
            disk.seek(start)
            disk.write(image.read_bytes())
        write = _write_gpt if table == "gpt" else _write_mbr
        disk.seek(0)
        disk.write(write(starts, at + MIB))
    return path


def _write_gpt(partitions: Sequence[tuple[int, int]], size: int) -> bytes:
    """The first 34 sectors: protective MBR, header, 128 entries (UEFI specification, section 5.3)."""
    entries = b"".join(
        _LINUX.bytes_le
        + uuid.UUID(int=number + 1).bytes_le
        + struct.pack("<QQQ", start // SECTOR, (start + length) // SECTOR - 1, 0)
        + f"part {number + 1}".encode("utf-16-le").ljust(72, b"\0")
        for number, (start, length) in enumerate(partitions)
    ).ljust(128 * 128, b"\0")
    last = size // SECTOR - 1

    def header(checksum: int) -> bytes:
        return struct.pack(
            "<8sIIIIQQQQ16sQIII",
            b"EFI PART",
            0x10000,
            92,
            checksum,
            0,
            1,
            last,
            34,
            last - 33,
            uuid.UUID(int=99).bytes_le,
            2,
            128,
            128,
            zlib.crc32(entries),
        )

    mbr = bytes(446) + struct.pack("<B3sB3sII", 0, b"\0\2\0", 0xEE, b"\xff" * 3, 1, last)
    first = mbr.ljust(510, b"\0") + b"\x55\xaa"
    return first + header(zlib.crc32(header(0))).ljust(SECTOR, b"\0") + entries


def _write_mbr(partitions: Sequence[tuple[int, int]], size: int) -> bytes:
    entries = b"".join(
        struct.pack("<B3sB3sII", 0, b"\0\2\0", 0x83, b"\xff" * 3, start // SECTOR, length // SECTOR)
        for start, length in partitions
    )
    return (bytes(446) + entries).ljust(510, b"\0") + b"\x55\xaa"
