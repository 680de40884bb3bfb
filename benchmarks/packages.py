"""Which of this machine's own package files go into the disk image, and on which day.

The content of a benchmark decides its result, so it is real (files of installed Debian or Ubuntu packages) and chosen
by a rule, not by hand: packages in the order of their priority, then of a hash of their name, as many as fit. The same
machine gives the same choice each time; another gives another image, and comparisons hold within one run only.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_PRIORITIES: Final = ("required", "important", "standard", "optional", "extra")
# One giant (a cloud vendor's tool of 500 MB) would make the whole image compress as it does.
_SHARE_MAX: Final = 0.05


@dataclass(frozen=True, slots=True)
class Package:
    """An installed package and the files of it that exist.

    Attributes:
        name: as dpkg names it, with its architecture where several can be installed.
        priority: dpkg's word for how needed it is.
        paths: regular files and symbolic links, absolute, parents resolved, in order.
        content_bytes: sum of the sizes of the regular files.
    """

    name: str
    priority: str
    paths: tuple[Path, ...]
    content_bytes: int


@dataclass(frozen=True, slots=True)
class Choice:
    """Packages of the first day and packages that a later day installs."""

    first: tuple[Package, ...]
    later: tuple[Package, ...]


def installed_packages(root: Path = Path("/")) -> Iterator[Package]:
    """Yield the packages installed below `root`, in the order in which they are chosen.

    Raises:
        FileNotFoundError: dpkg is not on this machine.
    """
    names: list[tuple[str, str]] = []
    listing = subprocess.run(
        ["dpkg-query", f"--root={root}", "-W", "-f", "${binary:Package}\t${Priority}\n"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for line in listing.splitlines():
        name, _, priority = line.partition("\t")
        names.append((name, priority))
    info = root / "var/lib/dpkg/info"
    for name, priority in sorted(names, key=_order):
        lists = [info / f"{name}.list", info / f"{name.partition(':')[0]}.list"]
        found = next((path for path in lists if path.is_file()), None)
        if found is not None:
            yield _read_package(name, priority, found.read_text().splitlines())


def choose(packages: Iterable[Package], *, first_bytes: int, later_bytes: int) -> Choice:
    """Fill the first day up to `first_bytes`, then the later day up to `later_bytes`, without going over.

    What does not fit is passed over, and whatever comes after the first day is full goes to the later one; a package
    larger than a small share of the first day is never taken.
    """
    first: list[Package] = []
    later: list[Package] = []
    free_first, free_later = first_bytes, later_bytes
    # Leave off once the gap is too small to matter, so that the later day gets a fair mix, not only what was too big.
    slack = first_bytes // 50
    for package in packages:
        if not package.content_bytes or package.content_bytes > first_bytes * _SHARE_MAX:
            continue
        if free_first > slack:
            if package.content_bytes <= free_first:
                first.append(package)
                free_first -= package.content_bytes
        elif package.content_bytes <= free_later:
            later.append(package)
            free_later -= package.content_bytes
        if free_first <= slack and free_later <= slack:
            break
    return Choice(first=tuple(first), later=tuple(later))


def fitting_bytes(packages: Iterable[Package], *, wished_first: int, wished_later: int) -> tuple[int, int]:
    """Scale both days down alike where the machine has fewer package files than wished."""
    wished = wished_first + wished_later
    there = sum(p.content_bytes for p in packages if p.content_bytes <= wished_first * _SHARE_MAX)
    share = min(1.0, there / wished)
    return int(wished_first * share), int(wished_later * share)


def copy_packages(tree: Path, packages: Iterable[Package]) -> None:
    """Copy the files of packages below the folder `tree`, at their places."""
    made: set[Path] = set()
    for package in packages:
        for source in package.paths:
            target = tree / source.relative_to("/")
            if target.parent not in made:
                target.parent.mkdir(parents=True, exist_ok=True)
                made.add(target.parent)
            if not os.path.lexists(target):
                shutil.copy2(source, target, follow_symlinks=False)


def content_bytes(packages: Sequence[Package]) -> int:
    """Sum of the file sizes of `packages`."""
    return sum(package.content_bytes for package in packages)


def _order(named: tuple[str, str]) -> tuple[int, bytes]:
    name, priority = named
    rank = _PRIORITIES.index(priority) if priority in _PRIORITIES else len(_PRIORITIES)
    return rank, hashlib.sha256(name.encode()).digest()


def _read_package(name: str, priority: str, listed: Sequence[str]) -> Package:
    paths: dict[Path, int] = {}
    for text in listed:
        # Merged /usr: dpkg lists /bin/ls, the file is /usr/bin/ls. Resolve the folder, keep a link a link.
        path = Path(os.path.realpath(os.path.dirname(text)), os.path.basename(text))
        if path.is_symlink():
            paths[path] = 0
        elif path.is_file() and os.access(path, os.R_OK):
            paths[path] = path.stat().st_size
    return Package(name=name, priority=priority, paths=tuple(sorted(paths)), content_bytes=sum(paths.values()))
