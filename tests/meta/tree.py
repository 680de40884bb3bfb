"""The files of the repository, as the checks of this folder see them."""

from __future__ import annotations

import ast
import functools
import gc
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]

PRODUCT_FOLDERS: Final = ("core", "client", "coordinator", "storagenode", "protos")
"""Folders that go into the wheel."""


@functools.cache
def tracked() -> tuple[Path, ...]:
    """Every file that git tracks or would track, relative to the root, and that exists."""
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    paths = (Path(name) for name in listed.stdout.split("\0") if name)
    return tuple(sorted(path for path in paths if (ROOT / path).is_file()))


def is_generated(path: Path) -> bool:
    """Whether the protobuf compiler wrote it."""
    return "_pb2" in path.name


def python_files(*folders: str) -> Iterator[Path]:
    """Python files that people write, relative to the root; all of them, or those in the folders named."""
    for path in tracked():
        if path.suffix == ".py" and not is_generated(path) and (not folders or path.parts[0] in folders):
            yield path


def text_of(path: Path) -> str:
    """The text of a file of the tree."""
    return (ROOT / path).read_text(encoding="utf-8")


@functools.cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file of the tree."""
    tree = ast.parse(text_of(path), filename=str(path))
    # Kept for good, some million objects in all: to search them for garbage took 0.6 s whenever it came to it, here and
    # in every test that the same process runs later.
    gc.freeze()
    return tree
