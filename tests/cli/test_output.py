"""What is printed: JSON that mirrors values, tables that align, progress that does not flood."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from holdfast.cli.output import format_seconds, format_time, print_facts, print_json, print_table, to_json
from holdfast.cli.progress import shown
from holdfast.results import Progress
from holdfast_core.runtime.clock import ManualClock


class Colour(enum.Enum):
    RED = "red"


@dataclass(frozen=True, slots=True)
class Inner:
    data: bytes
    path: Path


@dataclass(frozen=True, slots=True)
class Outer:
    inner: tuple[Inner, ...]
    colour: Colour
    by_name: dict[str, int]
    nothing: None


def test_json_mirrors_values(capsys: pytest.CaptureFixture[str]) -> None:
    value = Outer((Inner(b"\x00\xff", Path("/a/b")),), Colour.RED, {"x": 1}, None)
    expected = {"inner": [{"data": "00ff", "path": "/a/b"}], "colour": "red", "by_name": {"x": 1}, "nothing": None}
    assert to_json(value) == expected
    print_json([value])
    assert json.loads(capsys.readouterr().out) == [expected]


def test_tables_align_and_numbers_stand_right(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("NAME", "SIZE"), [("a", "1 B"), ("long-name", "12.5 KiB")])
    assert capsys.readouterr().out == "NAME           SIZE\na               1 B\nlong-name  12.5 KiB\n"
    print_table(("NAME", "SIZE"), [])
    assert capsys.readouterr().out == "NAME  SIZE\n"
    print_facts({"state": "ready", "n": "1"})
    assert capsys.readouterr().out == "state  ready\nn      1\n"


def test_times() -> None:
    assert format_time(0) == "-"
    assert format_time(1_700_000_000_123) == "2023-11-14 22:13:20Z"
    assert format_seconds(0.4249) == "0.42 s"
    assert format_seconds(125.0) == "125 s"


def test_without_a_terminal_progress_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    clock = ManualClock()
    with shown("snapshot of vm", clock=clock) as update:
        for step in range(1, 201):
            clock.advance(0.1)
            update(Progress(phase="send", bytes_done=step << 20, bytes_total=200 << 20))
        clock.advance(6)
        update(Progress(phase="send", bytes_done=1 << 20, bytes_total=0))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert lines[0] == "holdfast: snapshot of vm: send 50 MiB of 200 MiB (25 %)"
    assert lines[-1] == "holdfast: snapshot of vm: send 1 MiB"


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with shown("snapshot of vm", clock=ManualClock()) as update:
        update(Progress(phase="commit", bytes_done=1, bytes_total=1))
    assert capsys.readouterr().err == ""
