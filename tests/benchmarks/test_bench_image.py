"""The image builder, on a file system of a few megabytes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path, PurePosixPath

import pytest

from benchmarks.ext4 import change_files, check_filesystem, file_extents, make_filesystem
from benchmarks.image import MIB, Plan, build, load_or_build
from benchmarks.packages import Package, choose, content_bytes, fitting_bytes


def package(name: str, paths: dict[Path, int] | None = None, *, size: int = 0) -> Package:
    """A package of some files, or of a size alone."""
    paths = paths or {}
    return Package(
        name=name, priority="optional", paths=tuple(sorted(paths)), content_bytes=size or sum(paths.values())
    )


@pytest.fixture
def packages(tmp_path: Path) -> list[Package]:
    """Forty packages of a file each and a link, with content that is real in its fashion: every file differs."""
    made = []
    for number in range(40):
        folder = tmp_path / "source" / f"package-{number}"
        folder.mkdir(parents=True)
        content = b"".join(hashlib.sha256(f"{number} {at}".encode()).digest() for at in range(2048))
        (folder / "file with a space").write_bytes(content)
        (folder / "link").symlink_to("file with a space")
        made.append(package(f"package-{number}", {folder / "file with a space": len(content), folder / "link": 0}))
    return made


def test_the_choice_fills_the_days_in_order() -> None:
    """Giants are left out, what does not fit is passed over, and the later day gets what comes after."""
    names = [package("giant", size=600), *(package(f"p{at}", size=49) for at in range(30))]
    choice = choose(names, first_bytes=1000, later_bytes=100)
    assert [each.name for each in choice.first] == [f"p{at}" for at in range(20)]
    assert content_bytes(choice.first) <= 1000
    assert content_bytes(choice.later) <= 100
    assert not set(choice.first) & set(choice.later)


def test_a_machine_with_few_packages_scales_both_days() -> None:
    """Half of what was wished for gives half of each day."""
    assert fitting_bytes([package("a", size=40), package("b", size=15)], wished_first=1000, wished_later=100) == (50, 5)
    assert fitting_bytes([package("a", size=40)] * 100, wished_first=1000, wished_later=100) == (1000, 100)


def test_files_are_added_and_replaced_inside(tmp_path: Path) -> None:
    """debugfs puts files, folders and links where they belong, and the file system stays whole."""
    tree = tmp_path / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/status").write_bytes(b"old" * 3000)
    image = tmp_path / "image"
    make_filesystem(image, size_bytes=16 * MIB, tree=tree)
    new = tmp_path / "new file"
    new.write_bytes(os.urandom(3 * 4096))
    link = tmp_path / "link"
    link.symlink_to("somewhere else")
    change_files(
        image,
        add={PurePosixPath("/usr/new folder/new file"): new, PurePosixPath("/usr/link"): link},
        replace={PurePosixPath("/etc/status"): new},
        there={PurePosixPath("/etc"), PurePosixPath("/etc/status")},
    )
    check_filesystem(image)
    for place in ("/usr/new folder/new file", "/etc/status"):
        content = b""
        for extent in file_extents(image, PurePosixPath(place)):
            with open(image, "rb") as source:
                source.seek(extent.image_offset)
                content += source.read(extent.length)
        assert content == new.read_bytes()
    with pytest.raises(RuntimeError, match="debugfs could not change the image"):
        change_files(image, add={PurePosixPath("/usr/link"): link}, replace={}, there=())


@pytest.mark.slow
def test_three_days_build_upon_one_another(tmp_path: Path, packages: list[Package]) -> None:
    """Day 0 holds the first packages, day 1 adds about the later ones, day 2 changes pages in place and logs."""
    plan = Plan(size=32 * MIB, first=1_600_000, later=400_000, pages=64 * 4096, log=100_000)
    folder = tmp_path / "images-1-32m"
    folder.mkdir()
    build(folder, packages, plan)
    images = load_or_build(tmp_path, size_bytes=32 * MIB, say=lambda _: None)
    assert [day.name for day in images.days] == ["day0", "day1", "day2"]
    assert images.packages_first > images.packages_later > 0
    first, second, third = images.days
    assert first.new_bytes_64k >= 1_400_000
    assert 250_000 <= second.new_bytes_64k < first.new_bytes_64k
    assert 0 < third.new_bytes_64k < first.new_bytes_64k
    assert all(day.new_bytes_64k <= day.data_bytes for day in images.days)
    assert all(images.path(at).stat().st_size == 32 * MIB for at in range(3))
    assert first.allocated_bytes < 32 * MIB
