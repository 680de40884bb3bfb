"""Disks for the report: one template with this machine's package files, and what is done to copies of it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from benchmarks.ext4 import change_files, make_filesystem
from benchmarks.packages import Package, choose, copy_packages, fitting_bytes

STATUS = PurePosixPath("/var/lib/dpkg/status")
Content = bytes | Path
"""What a file is to hold: bytes, or what another file holds."""


@dataclass(frozen=True, slots=True)
class Template:
    """A disk that others are copied from.

    Attributes:
        image: sparse file with an ext4 file system.
        places: everything in it, absolute.
        packages: what is installed in it.
        others: packages that are not, for copies to install.
    """

    image: Path
    places: frozenset[PurePosixPath]
    packages: tuple[Package, ...]
    others: tuple[Package, ...]


def build_template(
    folder: Path, packages: Sequence[Package], *, size_bytes: int, filled_bytes: int, others_bytes: int
) -> Template:
    """Build `template.img` in `folder`, filled with packages; fewer where this machine has not that many."""
    filled, others = fitting_bytes(packages, wished_first=filled_bytes, wished_later=others_bytes)
    choice = choose(packages, first_bytes=filled, later_bytes=others)
    tree = folder / "tree"
    copy_packages(tree, choice.first)
    for place, content in template_files(choice.first).items():
        target = tree / place.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    image = folder / "template.img"
    make_filesystem(image, size_bytes=size_bytes, tree=tree)
    places = frozenset(PurePosixPath("/", path.relative_to(tree)) for path in tree.rglob("*"))
    shutil.rmtree(tree)
    return Template(image, places, choice.first, choice.later)


def template_files(packages: Sequence[Package]) -> dict[PurePosixPath, bytes]:
    """Files of a template that its copies replace."""
    return {
        STATUS: status_text(packages),
        PurePosixPath("/etc/hostname"): b"template\n",
        PurePosixPath("/etc/hosts"): b"127.0.0.1 localhost\n127.0.1.1 template\n",
        PurePosixPath("/etc/machine-id"): b"uninitialized\n",
        PurePosixPath("/var/log/dpkg.log"): "".join(
            f"2026-10-01 08:00:{at % 60:02} status installed {package.name}\n" for at, package in enumerate(packages)
        ).encode(),
    }


def status_text(packages: Sequence[Package]) -> bytes:
    """Return dpkg's list of what is installed."""
    return "".join(
        f"Package: {package.name}\nStatus: install ok installed\nPriority: {package.priority}\n"
        f"Installed-Size: {package.content_bytes // 1024}\nDescription: {package.name}, {len(package.paths)} files\n\n"
        for package in packages
    ).encode()


def copy_sparse(source: Path, target: Path) -> None:
    """Copy an image, holes as holes, sharing nothing with it."""
    subprocess.run(["cp", "--sparse=auto", "--reflink=never", str(source), str(target)], check=True)


def put_files(
    image: Path, files: Mapping[PurePosixPath, Content], *, there: frozenset[PurePosixPath], scratch: Path
) -> frozenset[PurePosixPath]:
    """Write files into an image's file system, as new files under their names; returns what is there then."""
    scratch.mkdir(exist_ok=True)
    sources: dict[PurePosixPath, Path] = {}
    made = []
    for number, (place, content) in enumerate(files.items()):
        if isinstance(content, Path):
            sources[place] = content
        else:
            sources[place] = scratch / f"{number}"
            sources[place].write_bytes(content)
            made.append(sources[place])
    change_files(
        image,
        add={place: source for place, source in sources.items() if place not in there},
        replace={place: source for place, source in sources.items() if place in there},
        there=there,
    )
    for path in made:
        os.unlink(path)
    return there.union(sources, *(place.parents for place in sources))
