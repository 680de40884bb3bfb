"""Real files of this machine for the demo's disks: what a template is filled with, and what is changed afterwards."""

from __future__ import annotations

import os
import random
import re
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_PLACES: Final = ("/usr/share", "/usr/lib", "/usr/bin", "/usr/include")
_FILE_BYTES_MAX: Final = 16 * 1024 * 1024
# The tools that write into images split their commands at blanks and quotes.
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9._+/@=,:-]+\Z", re.ASCII)

_SMALL_BYTES: Final = 16 * 1024
_SMALL_TAKEN_EACH: Final = 8

_EDITED: Final = 40
_REMOVED: Final = 20
_LOG_LINES: Final = 20_000


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of this machine.

    Attributes:
        path: where it is.
        name: where it goes on a disk, relative, with `/` between parts.
        size_bytes: how large it is.
    """

    path: Path
    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Changes:
    """What happens on a disk between two points in time.

    Attributes:
        removed: names that vanish.
        written: files that appear, or replace one of the same name.
    """

    removed: tuple[str, ...]
    written: tuple[SourceFile, ...]


def collect(bytes_wanted: int) -> list[SourceFile]:
    """Return readable files of this machine in a repeatable order, until `bytes_wanted` are together or none is left.

    The Python library comes first: it is on every machine that can run this. Of the many small files only some are
    taken: they are what takes time to lay out, and a few thousand of them show as much.
    """
    found: list[SourceFile] = []
    total = small = 0
    places = dict.fromkeys((sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), *_PLACES))
    for number, place in enumerate(places):
        for file in _walk(Path(place), f"files-{number}"):
            if file.size_bytes < _SMALL_BYTES:
                small += 1
                if small % _SMALL_TAKEN_EACH:
                    continue
            found.append(file)
            total += file.size_bytes
            if total >= bytes_wanted:
                return found
    return found


def _walk(place: Path, prefix: str) -> Iterator[SourceFile]:
    for folder, folders, names in os.walk(place):
        # Compiled files double the number of files and show nothing new.
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(names):
            path = Path(folder, name)
            inside = f"{prefix}/{path.relative_to(place)}"
            try:
                status = path.lstat()
            except OSError:
                continue  # it went away, as files of a living machine do
            usable = stat.S_ISREG(status.st_mode) and 0 < status.st_size <= _FILE_BYTES_MAX
            if usable and os.access(path, os.R_OK) and _PLAIN_NAME.match(inside):
                yield SourceFile(path=path, name=inside, size_bytes=status.st_size)


def plan_changes(present: Sequence[SourceFile], installed: Sequence[SourceFile], *, seed: int, folder: Path) -> Changes:
    """Return a day's changes: `installed` appears, some files are edited, some removed, and a log has grown.

    New contents are written below `folder`. The same seed makes the same choice.
    """
    draw = random.Random(seed)
    chosen = draw.sample(list(present), min(len(present), _EDITED + _REMOVED))
    edited, removed = chosen[:_EDITED], chosen[_EDITED:]
    folder.mkdir(parents=True)
    written = list(installed)
    for number, file in enumerate(edited):
        content = bytearray(file.path.read_bytes())
        at = draw.randrange(len(content))
        content[at:at] = f"\n# edited on day {seed}, change {number}\n".encode()
        copy = folder / f"edit-{number}"
        copy.write_bytes(content)
        written.append(SourceFile(path=copy, name=file.name, size_bytes=len(content)))
    log = folder / "log"
    log.write_text(
        "".join(f"day {seed} line {n}: request {draw.getrandbits(64):016x} served\n" for n in range(_LOG_LINES))
    )
    written.append(SourceFile(path=log, name=f"log-of-day-{seed}", size_bytes=log.stat().st_size))
    return Changes(removed=tuple(file.name for file in removed), written=tuple(written))
