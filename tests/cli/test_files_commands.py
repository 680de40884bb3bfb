"""`holdfast files` against a real cluster: sets of a directory and of a disk's snapshot, as text and as JSON."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.client.files.images import MIB, make_image
from tests.client.files.trees import likenesses, make_tree
from tests.e2e.harness import COMMAND, Up

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

ID = re.compile(r"(snap|bkp|app)-[a-z2-7]{26}\Z")


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    cluster = Up(tmp_path_factory.mktemp("up") / "data").start()
    yield cluster
    assert cluster.stop() == 0


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tree(tmp_path_factory.mktemp("source") / "source")
    (folder / ".env").write_text("TOKEN=x")
    return folder


def answer(up: Up, *arguments: str) -> Any:
    return json.loads(up.ok(*arguments, "--json"))


def test_files_of_a_directory(up: Up, source: Path, tmp_path: Path) -> None:
    storage_id = up.ok("files", "put", "task-1", str(source), "--exclude", "/many/", "--no-secrets")
    assert ID.match(storage_id)
    expected = {
        path: each for path, each in likenesses(source).items() if path.partition(b"/")[0] not in (b"many", b".env")
    }
    listed = answer(up, "files", "ls", storage_id, "-r")
    assert {bytes.fromhex(each["path_bytes"]) for each in listed} == expected.keys()
    assert up.ok("files", "ls", storage_id, "dir").splitlines()[1].startswith("-0750")
    assert "dangling -> /nowhere/at/all" in up.ok("files", "ls", storage_id)
    assert "odd \\udcff\\udcfe\\n name" in up.ok("files", "ls", storage_id)
    target = tmp_path / "target"
    assert up.ok("files", "get", storage_id, "--to", str(target), "--durable").endswith(f"in {target}")
    assert likenesses(target) == expected
    assert up.ok("files", "get", storage_id, "zweiter name", "--stdout") == "small"
    shown = answer(up, "show", storage_id)
    assert (shown["form"], shown["origin"]["file_count"]) == ("files", len(expected))


def test_files_of_a_point(up: Up, source: Path, tmp_path: Path) -> None:
    disk = make_image(tmp_path / "disk.raw", source, size=64 * MIB)
    up.ok("vm", "register", "ext", "--volume", f"root={disk}")
    snapshot = up.ok("snapshot", "ext")
    assert [each["path"] for each in answer(up, "files", "ls", snapshot, "dir/sub")] == ["dir/sub/small.txt"]
    up.ok("files", "get", snapshot, "dir", "--to", str(tmp_path / "dir"), "--volume", "root")
    assert (tmp_path / "dir" / "dir" / "sub" / "small.txt").read_text() == "small\n"
    result = answer(up, "files", "get", snapshot, "--include", "*.bin", "--to", str(tmp_path / "bin"))
    assert (result["file_count"], result["data_bytes"]) == (1, os.stat(source / "big.bin").st_size)
    storage_id = up.ok("files", "put", "task-2", "--point", snapshot, "--root", "/dir", "--include", "*.txt")
    assert [each["path"] for each in answer(up, "files", "ls", storage_id, "-r")] == ["sub", "sub/small.txt"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("put", "task"), 2, "--point"),
        (("put", "task", "SOURCE", "--root", "/x"), 2, "belong to --point"),
        (("put", "task", "SOURCE", "--include", "*.none"), 3, "nothing was kept"),
        (("put", "task", "SOURCE", "--include", "!x"), 2, "exclude"),
        (("put", "task", "SOURCE/big.bin"), 1, "cannot be read"),
        (("get", "app-none"), 2, "--to DIR"),
        (("get", "app-none", "--stdout"), 2, "exactly one path"),
        (("get", "app-none", "--to", "SOURCE"), 3, "app-none"),
        (("ls", "snap-none"), 3, "snap-none"),
    ],
)
def test_mistakes_end_with_one_plain_line(
    up: Up, source: Path, arguments: tuple[str, ...], code: int, says: str
) -> None:
    words = [each.replace("SOURCE", str(source)) for each in arguments]
    done = subprocess.run(
        [*COMMAND, "files", *words, "--coordinator", up.address], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout
