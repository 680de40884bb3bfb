"""The disk images of the benchmark: a Debian guest on three days, built once and kept below `.bench/`.

Day 0 is the guest after its installation. Day 1 installs further packages: new files in free space, a package database
rewritten, folders and tables changed. Day 2 writes logs and updates random 4 KiB pages of a database file in place.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from benchmarks.ext4 import change_files, check_filesystem, file_extents, make_filesystem
from benchmarks.packages import Package, choose, content_bytes, copy_packages, fitting_bytes, installed_packages
from benchmarks.spans import allocated_ranges, novelty

MIB: Final = 1024 * 1024
_FORMAT: Final = 1
_PAGE_BYTES: Final = 4096
_STATUS: Final = PurePosixPath("/var/lib/dpkg/status")
_PAGES: Final = PurePosixPath("/var/lib/guest/pages.db")
_LOG: Final = PurePosixPath("/var/log/guest.log")


@dataclass(frozen=True, slots=True)
class Plan:
    """How large everything is, in bytes; all follows from the size of the disk."""

    size: int
    first: int
    later: int
    pages: int
    log: int

    @staticmethod
    def of_size(size: int) -> Plan:
        """The plan of a disk of `size` bytes: 29 % filled, a day's installs of 5 %, a database of 1/64."""
        pages = max(size // 64 // _PAGE_BYTES, 16) * _PAGE_BYTES
        return Plan(size=size, first=size * 29 // 100 - pages, later=size * 5 // 100, pages=pages, log=size // 512)


@dataclass(frozen=True, slots=True)
class Day:
    """One image and its measure.

    Attributes:
        name: `day0`, `day1` or `day2`.
        allocated_bytes: what the sparse file occupies.
        data_bytes: bytes in 64 KiB blocks that are not all zero.
        new_bytes_64k: bytes in 64 KiB blocks that no earlier day has.
        new_bytes_4m: the same in 4 MiB blocks.
    """

    name: str
    allocated_bytes: int
    data_bytes: int
    new_bytes_64k: int
    new_bytes_4m: int


@dataclass(frozen=True, slots=True)
class ImageSet:
    """The three days of one guest, as files in a folder."""

    folder: Path
    size_bytes: int
    packages_first: int
    packages_later: int
    days: tuple[Day, ...]

    def path(self, day: int) -> Path:
        """The image of a day."""
        return self.folder / f"{self.days[day].name}.img"


def load_or_build(cache: Path, *, size_bytes: int, say: Callable[[str], None]) -> ImageSet:
    """Return the images of this size, building them where the cache has none.

    Raises:
        FileNotFoundError: dpkg or e2fsprogs is not on this machine.
    """
    folder = cache / f"images-{_FORMAT}-{size_bytes // MIB}m"
    if not (folder / "set.json").is_file():
        say(f"building the disk images ({size_bytes // MIB} MiB, sparse) from this machine's package files; once only")
        building = folder.with_name(folder.name + ".building")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        packages = list(installed_packages())
        build(building, packages, Plan.of_size(size_bytes))
        building.rename(folder)
    return _load(folder)


def build(folder: Path, packages: Sequence[Package], plan: Plan) -> None:
    """Build the three images of `plan` and their measure into `folder`."""
    first_bytes, later_bytes = fitting_bytes(packages, wished_first=plan.first, wished_later=plan.later)
    choice = choose(packages, first_bytes=first_bytes, later_bytes=later_bytes)
    dice = random.Random(plan.size)
    tree = folder / "tree"
    day0, day1, day2 = (folder / f"day{day}.img" for day in range(3))
    _stage(tree, choice.first, plan, dice)
    make_filesystem(day0, size_bytes=plan.size, tree=tree)
    there = {PurePosixPath("/", path.relative_to(tree)) for path in tree.rglob("*")}
    shutil.rmtree(tree)

    _copy_sparse(day0, day1)
    _install(day1, choice.later, there, folder, dice)
    _copy_sparse(day1, day2)
    _work(day2, plan, dice, folder)
    for image in (day0, day1, day2):
        check_filesystem(image)

    small = novelty([day0, day1, day2], block_bytes=64 * 1024)
    large = novelty([day0, day1, day2], block_bytes=4 * MIB)
    days = [
        Day(
            name=image.stem,
            allocated_bytes=sum(end - start for start, end in allocated_ranges(image)),
            data_bytes=small[at].data_bytes,
            new_bytes_64k=small[at].new_bytes,
            new_bytes_4m=large[at].new_bytes,
        )
        for at, image in enumerate((day0, day1, day2))
    ]
    facts = {
        "size_bytes": plan.size,
        "packages_first": len(choice.first),
        "packages_later": len(choice.later),
        "content_first": content_bytes(choice.first),
        "content_later": content_bytes(choice.later),
        "days": [asdict(day) for day in days],
    }
    (folder / "set.json").write_text(json.dumps(facts, indent=2))


def _load(folder: Path) -> ImageSet:
    facts = json.loads((folder / "set.json").read_text())
    return ImageSet(
        folder=folder,
        size_bytes=facts["size_bytes"],
        packages_first=facts["packages_first"],
        packages_later=facts["packages_later"],
        days=tuple(Day(**day) for day in facts["days"]),
    )


def _stage(tree: Path, packages: Sequence[Package], plan: Plan, dice: random.Random) -> None:
    copy_packages(tree, packages)
    status = tree / _STATUS.relative_to("/")
    status.parent.mkdir(parents=True, exist_ok=True)
    status.write_text(_status_text(packages))
    (tree / "var/log").mkdir(parents=True, exist_ok=True)
    pages = tree / _PAGES.relative_to("/")
    pages.parent.mkdir(parents=True)
    with open(pages, "wb") as out:
        for number in range(plan.pages // _PAGE_BYTES):
            out.write(_page(number, 0, dice))


def _install(
    image: Path, packages: Sequence[Package], there: set[PurePosixPath], scratch: Path, dice: random.Random
) -> None:
    add = {PurePosixPath(path): path for package in packages for path in package.paths}
    status = scratch / "status"
    status.write_text(_status_text(packages) * 2)
    log = scratch / "log"
    log.write_text("".join(_log_line(at, dice) for at in range(20 * len(packages))))
    change_files(image, add={**add, _LOG: log}, replace={_STATUS: status}, there=there)
    status.unlink()
    log.unlink()


def _work(image: Path, plan: Plan, dice: random.Random, scratch: Path) -> None:
    log = scratch / "log"
    with open(log, "w") as out:
        while out.tell() < plan.log:
            out.write(_log_line(out.tell(), dice))
    change_files(image, add={}, replace={_LOG: log}, there={_LOG.parent, _LOG.parent.parent})
    log.unlink()
    # A database writes pages where they are; so this goes past the file system, straight into the file's extents.
    extents = file_extents(image, _PAGES)
    count = plan.pages // _PAGE_BYTES
    with open(image, "r+b") as disk:
        for number in sorted(dice.sample(range(count), count // 4)):
            at = number * _PAGE_BYTES
            extent = next(e for e in extents if e.file_offset <= at < e.file_offset + e.length)
            disk.seek(extent.image_offset + at - extent.file_offset)
            disk.write(_page(number, 1, dice))


def _page(number: int, version: int, dice: random.Random) -> bytes:
    records = bytearray(f"page {number} version {version}\n".encode())
    while len(records) < _PAGE_BYTES:
        key = dice.getrandbits(64)
        records += (
            f"{key:016x} account-{key % 9973} balance {dice.randrange(10**6)} note {dice.choice(_NOTES)}\n".encode()
        )
    return bytes(records[:_PAGE_BYTES])


_NOTES: Final = ("paid in full", "open since last month", "to be checked", "moved to another ledger", "closed")


def _log_line(at: int, dice: random.Random) -> str:
    clock = f"10:{at // 60 % 60:02}:{at % 60:02}"
    return f"2026-11-22T{clock} guest service[{dice.randrange(30_000)}]: done in {dice.randrange(9_999)} us\n"


def _status_text(packages: Sequence[Package]) -> str:
    return "".join(
        f"Package: {package.name}\nStatus: install ok installed\nPriority: {package.priority}\n"
        f"Installed-Size: {package.content_bytes // 1024}\nDescription: {package.name}, {len(package.paths)} files\n\n"
        for package in packages
    )


def _copy_sparse(source: Path, target: Path) -> None:
    subprocess.run(["cp", "--sparse=auto", "--reflink=never", str(source), str(target)], check=True)
