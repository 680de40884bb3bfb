"""ext4 images without root: made by mkfs.ext4, changed by debugfs, checked by e2fsck.

debugfs writes into the image's own file system (its allocator, its directories, its inode tables), so a change has the
shape of a real one: new data in free space, and metadata blocks changed in many places.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Final

FS_BLOCK_BYTES: Final = 4096
# A fixed UUID and hash seed: the same tree gives nearly the same image (times differ).
_IDENTITY: Final = "686f6c64-6661-7374-8000-62656e636800"
_EXTENT = re.compile(r"^\s*\d+/\s*\d+\s+\d+/\s*\d+\s+(\d+) -\s+(\d+)\s+(\d+) -\s+(\d+)\s+(\d+)")


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of a file's bytes that lies in one piece in the image; all in bytes."""

    file_offset: int
    image_offset: int
    length: int


def make_filesystem(image: Path, *, size_bytes: int, tree: Path) -> None:
    """Make `image` a sparse file of `size_bytes` holding an ext4 file system with the content of `tree`.

    Raises:
        FileNotFoundError: e2fsprogs is not on this machine.
        subprocess.CalledProcessError: the tree does not fit, or mkfs failed.
    """
    with open(image, "wb") as out:
        out.truncate(size_bytes)
    options = ["-q", "-F", "-b", str(FS_BLOCK_BYTES), "-U", _IDENTITY, "-E", f"hash_seed={_IDENTITY}"]
    _run([_tool("mkfs.ext4"), *options, "-L", "bench", "-d", str(tree), str(image)])


def change_files(
    image: Path,
    *,
    add: Mapping[PurePosixPath, Path],
    replace: Mapping[PurePosixPath, Path],
    there: Iterable[PurePosixPath],
) -> None:
    """Write files into the image's file system.

    Args:
        image: file with an ext4 file system in it.
        add: place inside (absolute) to source; a source that is a symbolic link becomes one. A place that is there
            already stays as it is.
        replace: likewise, for files that are there and are removed first.
        there: what the file system holds already, folders above all; folders that are missing are made.

    Raises:
        RuntimeError: debugfs refused one of the steps.
    """
    commands = [f"rm {_quote(place)}" for place in replace]
    known = set(there)
    for place, source in sorted({**add, **replace}.items()):
        if place in known and place not in replace:
            continue
        for folder in [*reversed(place.parents)][1:]:
            if folder not in known:
                known.add(folder)
                commands += [f"cd {_quote(folder.parent)}", f"mkdir {_quote(folder.name)}"]
        # debugfs takes a slash in the name of a written file literally; so go there first.
        commands.append(f"cd {_quote(place.parent)}")
        if source.is_symlink():
            commands.append(f"symlink {_quote(place.name)} {_quote(source.readlink())}")
        else:
            commands.append(f"write {_quote(source)} {_quote(place.name)}")
    _debug(image, "\n".join(commands) + "\n")


def file_extents(image: Path, place: PurePosixPath) -> list[Extent]:
    """Where the bytes of the file at `place` lie in the image, in the order of the file."""
    answer = _run([_tool("debugfs"), "-R", f"dump_extents -l {_quote(place)}", str(image)])
    extents = []
    for line in answer.splitlines():
        match = _EXTENT.match(line)
        if match:
            logical, _, physical, _, count = (int(text) for text in match.groups())
            extents.append(
                Extent(
                    file_offset=logical * FS_BLOCK_BYTES,
                    image_offset=physical * FS_BLOCK_BYTES,
                    length=count * FS_BLOCK_BYTES,
                )
            )
    if not extents:
        raise RuntimeError(f"debugfs names no extents for {place}")
    return extents


def update_file(image: Path, place: PurePosixPath, source: Path) -> int:
    """Make the file at `place` hold what `source` holds, written where it lies; returns how many blocks were written.

    A file that has grown gets further blocks from the file system's allocator; one may not have become smaller.

    Raises:
        RuntimeError: debugfs did not find the file, or room for it.
        ValueError: the source is smaller than the file.
    """
    size = source.stat().st_size
    quoted = _quote(place)
    found = re.search(r"Size: (\d+)", _run([_tool("debugfs"), "-R", f"stat {quoted}", str(image)]))
    if found is None:
        raise RuntimeError(f"debugfs does not find {place}")
    if size < int(found.group(1)):
        raise ValueError(f"{place} has {found.group(1)} bytes, and shall have {size}")
    if size > sum(extent.length for extent in file_extents(image, place)) or size > int(found.group(1)):
        # Blocks that are there stay; those that are missing, holes among them, come as written and hold nothing yet.
        end = -(-size // FS_BLOCK_BYTES) - 1
        commands = f"fallocate {quoted} 0 {end}\nset_inode_field {quoted} size {size}\n"
        _debug(image, commands)
    written = 0
    with open(source, "rb") as content, open(image, "r+b") as disk:
        for extent in file_extents(image, place):
            for at in range(0, min(extent.length, size - extent.file_offset), FS_BLOCK_BYTES):
                block = os.pread(content.fileno(), FS_BLOCK_BYTES, extent.file_offset + at)
                if os.pread(disk.fileno(), len(block), extent.image_offset + at) != block:
                    os.pwrite(disk.fileno(), block, extent.image_offset + at)
                    written += 1
    return written


def check_filesystem(image: Path) -> None:
    """Raise CalledProcessError if e2fsck finds anything to mend."""
    _run([_tool("e2fsck"), "-fn", str(image)])


def _debug(image: Path, commands: str) -> None:
    answer = subprocess.run(
        [_tool("debugfs"), "-w", "-f", "-", str(image)],
        input=commands,
        check=True,
        capture_output=True,
        text=True,
        errors="replace",
    )
    # debugfs exits with 0 whatever happens and talks on stderr; its first line is its version.
    complaints = [line for line in answer.stderr.splitlines() if line and not line.startswith("debugfs ")]
    if complaints:
        raise RuntimeError(f"debugfs could not change the image: {complaints[0]} ({len(complaints)} complaints)")


def _tool(name: str) -> str:
    # The tools of root are often not on a user's path; none of these needs root.
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        raise FileNotFoundError(f"{name} is not installed; `apt-get install e2fsprogs` brings it")
    return found


def _quote(path: PurePath | str) -> str:
    return '"' + str(path).replace('"', '""') + '"'


def _run(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, errors="replace").stdout
