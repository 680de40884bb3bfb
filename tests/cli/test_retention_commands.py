"""`holdfast lock`, `unlock` and `retention`: what is typed, printed and answered."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.cli.exits import REFUSED, USAGE
from holdfast.cli.main import run
from holdfast.cli.times import parse_end
from holdfast.testing import MemoryCluster
from holdfast_core.model.errors import ErrorCode, HoldfastError


@pytest.fixture(scope="module")
def cluster() -> Iterator[MemoryCluster]:
    with MemoryCluster() as running:
        yield running


class Shell:
    """Runs command lines in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def both(self, *words: str, code: int = 0) -> tuple[str, str]:
        """Run a command that ends with this code; return what it prints and what it says."""
        self._capsys.readouterr()
        ended = run(words)
        captured = self._capsys.readouterr()
        assert ended == code, captured
        return captured.out.strip(), captured.err.strip()

    def __call__(self, *words: str, code: int = 0) -> str:
        """Run a command that ends with this code; return its output, or what it says of an error."""
        out, err = self.both(*words, code=code)
        return err if code else out

    def json_of_failure(self, *words: str, code: int) -> Any:
        """Run a command that ends with this code; return what it prints as JSON."""
        return json.loads(self.both(*words, "--json", code=code)[0])

    def json(self, *words: str) -> Any:
        """Run a command; return what it prints as JSON."""
        return json.loads(self(*words, "--json"))


@pytest.fixture
def shell(cluster: MemoryCluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.setenv("HOLDFAST_COORDINATOR", cluster.coordinator_address)
    monkeypatch.setenv("HOLDFAST_TOKEN", cluster.token)
    return Shell(capsys)


def register(shell: Shell, folder: Path, vm: str, backups: int) -> list[str]:
    """A VM with a snapshot and backups; returns the ids."""
    disk = folder / f"{vm}.raw"
    disk.write_bytes(bytes(4096))
    shell("vm", "register", vm, "--volume", f"root={disk}")
    points = [shell("snapshot", vm)]
    points += [shell("backup", vm, points[0]) for _ in range(backups)]
    return points


def test_a_point_is_locked_shown_and_unlocked(shell: Shell, tmp_path: Path) -> None:
    (point,) = register(shell, tmp_path, "locked", 0)
    assert shell("lock", point, "--until", "2031-02-03T04:05Z") == f"{point} is locked until 2031-02-03 04:05:00Z"
    assert shell("lock", point, "--until", "2030-01-01") == f"{point} is locked until 2031-02-03 04:05:00Z"
    assert shell("points", "locked").splitlines()[1].endswith("2031-02-03 04:05:00Z")
    assert "locked until 2031-02-03 04:05:00Z by admin" in shell("show", point)
    assert shell.json("points", "locked")[0]["lock"]["principal"] == "admin"
    for words in (("forget", point), ("vm", "discard", "locked")):
        assert "locked until 2031-02-03 04:05:00Z" in shell(*words, code=REFUSED)
    assert shell("unlock", point) == ""
    assert shell("points", "locked").splitlines()[1].endswith(" -")
    shell("forget", point)
    assert "ended already" in shell("lock", point, "--until", "2020-01-01", code=USAGE)
    assert "--until" in shell("lock", point, code=USAGE)


@pytest.mark.slow
def test_rules_are_set_shown_and_applied(shell: Shell, tmp_path: Path) -> None:
    points = register(shell, tmp_path, "ruled", 3)
    assert shell("retention", "show", "ruled") == "ruled has no rules; all its points are kept"
    assert shell("retention", "set", "ruled", "--keep-last", "2", "--keep-yearly", "1") == ""
    assert shell("retention", "show", "ruled") == "keep-last 2 keep-yearly 1"
    assert "retention   keep-last 2 keep-yearly 1" in shell("vm", "show", "ruled")
    assert shell.json("retention", "show", "ruled")["retention"]["keep_last"] == 2
    rows = [line.split("  ") for line in shell("retention", "apply", "ruled", "--dry-run").splitlines()]
    assert [row[0] for row in rows] == ["ID", *points[::-1]]
    assert [[cell.strip() for cell in row if cell][2] for row in rows[1:]] == ["kept", "kept", "goes", "goes"]
    assert len(shell.json("points", "ruled")) == 4
    told = shell("retention", "apply", "ruled")
    assert told.count("forgotten") == 2
    assert "last 1, yearly 20" in told
    assert [point["point_id"] for point in shell.json("points", "ruled")] == points[2:]
    assert shell("retention", "set", "ruled", "--none") == ""
    assert shell.json("retention", "show", "ruled")["retention"] is None
    only = shell.json("retention", "apply", "ruled", "--keep-daily", "1")
    assert [point["forgotten"] for point in only] == [False, True]


@pytest.mark.parametrize(
    "words",
    [
        ("set", "ruled"),
        ("set", "ruled", "--none", "--keep-last", "1"),
        ("set", "ruled", "--keep-last", "-1"),
        ("set", "ruled", "--keep-last", "1000001"),
        ("apply", "ruled", "--keep-hourly", "many"),
    ],
)
def test_rules_that_make_no_sense_are_refused(shell: Shell, words: tuple[str, ...]) -> None:
    assert shell("retention", *words, code=USAGE)


def test_ends_are_dates_times_and_durations() -> None:
    hours = {"12h": 12, "30d": 720, "6w": 1008, "1y": 8760}
    assert {text: parse_end(text) for text in hours} == {
        text: datetime.timedelta(hours=count) for text, count in hours.items()
    }
    assert parse_end("2027-01-31") == datetime.datetime(2027, 1, 31, tzinfo=datetime.UTC)
    assert parse_end("2027-01-31 18:00") == datetime.datetime(2027, 1, 31, 18, tzinfo=datetime.UTC)
    assert parse_end("2027-01-31T18:00+02:00") == datetime.datetime(2027, 1, 31, 16, tzinfo=datetime.UTC)
    assert isinstance(parse_end("9" * 30 + "y"), datetime.timedelta)
    for text in ("", "tomorrow", "30", "5m", "2027-02-31", "-3d"):
        with pytest.raises(HoldfastError) as caught:
            parse_end(text)
        assert caught.value.code is ErrorCode.INVALID_ARGUMENT
