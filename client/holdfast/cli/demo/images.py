"""Disk images of real files, made without root: ext4 where its tools are, else files laid out by hand.

Both make a sparse raw file, and change it in place as a guest would, so that an incremental backup has real work.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

from holdfast.cli.demo.files import Changes, SourceFile
from holdfast_core.model.errors import ErrorCode, HoldfastError

# Debian puts them where a user's PATH does not look.
TOOL_PATH: Final = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
_STEP_BYTES: Final = 4096
_INODES_SPARE: Final = 4096
_COPY_BYTES: Final = 4 * 1024 * 1024


class ImageMaker(Protocol):
    """A way to make a disk.

    Attributes:
        description: what the image is, for people.
    """

    description: str

    def make(self, image: Path, files: Sequence[SourceFile], *, size_bytes: int) -> None:
        """Make a sparse image of `size_bytes` that holds the files."""
        ...

    def copy(self, image: Path, target: Path) -> None:
        """Copy a disk, holes as holes."""
        ...

    def change(self, image: Path, changes: Changes) -> None:
        """Change the disk in place."""
        ...


def choose_maker(work: Path, *, tool_path: str = TOOL_PATH) -> ImageMaker:
    """Return the best way that this machine has; `work` is a folder for what is needed on the way."""
    mkfs, debugfs = (shutil.which(tool, path=tool_path) for tool in ("mkfs.ext4", "debugfs"))
    if mkfs is not None and debugfs is not None:
        return Ext4Maker(mkfs=mkfs, debugfs=debugfs, fsck=shutil.which("e2fsck", path=tool_path), work=work)
    return LaidOutMaker()


class Ext4Maker:
    """A real ext4 file system: made by `mkfs.ext4 -d` from a folder, changed by `debugfs -w`, checked by `e2fsck`."""

    description = "a real ext4 file system (mkfs.ext4 -d; changed in place by debugfs)"

    def __init__(self, *, mkfs: str, debugfs: str, fsck: str | None, work: Path) -> None:
        self._mkfs = mkfs
        self._debugfs = debugfs
        self._fsck = fsck
        self._work = work

    def make(self, image: Path, files: Sequence[SourceFile], *, size_bytes: int) -> None:
        """Make the file system in `image`.

        Raises:
            HoldfastError: INTERNAL if a tool fails, with what it said.
        """
        staging = self._work / "staging"
        for file in files:
            target = staging / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file.path, target)
        with image.open("wb") as empty:
            empty.truncate(size_bytes)
        inodes = str(2 * len(files) + _INODES_SPARE)
        _run([self._mkfs, "-q", "-F", "-E", "root_owner=0:0", "-N", inodes, "-d", str(staging), str(image)])
        shutil.rmtree(staging)

    def copy(self, image: Path, target: Path) -> None:
        """Copy a disk, holes as holes."""
        copy_sparse(image, target)

    def change(self, image: Path, changes: Changes) -> None:
        """Remove and write files through the file system's own structures.

        Raises:
            HoldfastError: INTERNAL if a tool fails or the file system is not clean afterwards.
        """
        lines = [f"rm /{name}" for name in changes.removed]
        made: set[str] = set()
        for file in changes.written:
            # debugfs makes entries in its current directory alone, so it is sent there first.
            *folders, name = file.name.split("/")
            for depth, folder in enumerate(folders):
                inside = "/" + "/".join(folders[:depth])
                if f"{inside}/{folder}" not in made:
                    made.add(f"{inside}/{folder}")
                    lines += [f"cd {inside}", f"mkdir {folder}"]
            lines += [f"cd /{'/'.join(folders)}", f"rm {name}", f"write {file.path} {name}"]
        script = self._work / "changes.debugfs"
        script.write_text("\n".join(lines) + "\n")
        complaints = _run([self._debugfs, "-w", "-f", str(script), str(image)])
        script.unlink()
        # debugfs ends with 0 whatever its commands did. A `mkdir` may find the folder there and an `rm` nothing to
        # remove; nothing else may fail.
        for line in complaints.splitlines():
            if line.startswith(("cd:", "write:")):
                raise HoldfastError(ErrorCode.INTERNAL, f"debugfs did not change {image} as it should: {line}")
        if self._fsck is not None:
            _run([self._fsck, "-f", "-n", str(image)])


class LaidOutMaker:
    """No file system: files one after another at steps of 4 KiB, each behind a line with its name and length.

    It is what a disk full of real files looks like to a backup, without a claim to be one that mounts.
    """

    description = "real files laid out at steps of 4 KiB (mkfs.ext4 and debugfs are not installed)"

    def __init__(self) -> None:
        # Per image: where each file lies and how much room it has, and where the free end begins.
        self._places: dict[Path, dict[str, tuple[int, int]]] = {}
        self._ends: dict[Path, int] = {}

    def make(self, image: Path, files: Sequence[SourceFile], *, size_bytes: int) -> None:
        """Lay the files out from the start."""
        self._places[image], self._ends[image] = {}, 0
        with image.open("wb") as disk:
            disk.truncate(size_bytes)
        self.change(image, Changes(removed=(), written=tuple(files)))

    def change(self, image: Path, changes: Changes) -> None:
        """Zero what is removed; put what is written in its old place if it fits there, else at the end."""
        places = self._places[image]
        with image.open("r+b") as disk:
            for name in changes.removed:
                at, room = places.pop(name)
                disk.seek(at)
                disk.write(bytes(room))
            for file in changes.written:
                content = f"{file.name} {file.size_bytes}\n".encode() + file.path.read_bytes()
                room = -(-len(content) // _STEP_BYTES) * _STEP_BYTES
                at, had = places.get(file.name, (0, 0))
                if had < room:
                    at = self._ends[image]
                    self._ends[image] += room
                    places[file.name] = (at, room)
                disk.seek(at)
                disk.write(content)

    def copy(self, image: Path, target: Path) -> None:
        """Copy a disk, holes as holes."""
        copy_sparse(image, target)
        self._places[target], self._ends[target] = dict(self._places[image]), self._ends[image]


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a file, holes as holes."""
    size = source.stat().st_size
    with source.open("rb") as reader, target.open("wb") as writer:
        writer.truncate(size)
        at = 0
        while at < size:
            try:
                at = os.lseek(reader.fileno(), at, os.SEEK_DATA)
            except OSError:
                break  # ENXIO: nothing but a hole is left
            end = os.lseek(reader.fileno(), at, os.SEEK_HOLE)
            while at < end:
                piece = os.pread(reader.fileno(), min(_COPY_BYTES, end - at), at)
                os.pwrite(writer.fileno(), piece, at)
                at += len(piece)


def _run(command: Sequence[str]) -> str:
    """Run a tool and return what it wrote to stderr."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HoldfastError(
            ErrorCode.INTERNAL, f"{command[0]} failed (exit code {done.returncode}): {done.stderr or done.stdout}"
        )
    return done.stderr
