"""What the benchmark of VMs changes on its disks, and when it calls a goal met."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.vms.disks import (
    KIB,
    MIB,
    apply_changes,
    grow,
    longest_data,
    plan_changes,
    plan_overwrites,
    update_pages,
)
from benchmarks.vms.goals import judge


def test_changes_are_as_much_as_was_asked_for_and_never_twice_at_a_place() -> None:
    changes = plan_changes(within_bytes=900 * MIB, total_bytes=25 * MIB, seed=1)
    assert sum(length for _, length in changes) == 25 * MIB
    assert all(offset % (64 * KIB) == 0 for offset, _ in changes)
    assert all(offset + length <= following for (offset, length), (following, _) in pairwise(changes))
    assert max(offset + length for offset, length in changes) <= 900 * MIB
    assert changes != plan_changes(within_bytes=900 * MIB, total_bytes=25 * MIB, seed=2)


def test_disks_change_at_the_places_that_are_told_and_nowhere_else(tmp_path: Path) -> None:
    image, disk = tmp_path / "image", tmp_path / "disk"
    image.write_bytes(b"a" * 8 * MIB)
    grow(image, disk, 64 * MIB)
    assert disk.stat().st_size == 64 * MIB
    assert disk.stat().st_blocks * 512 < 9 * MIB, "the rest is a hole"
    changes = plan_changes(within_bytes=8 * MIB, total_bytes=MIB, seed=3)
    apply_changes(disk, changes, iter([b"b" * 700_000] * 2))
    pages = update_pages(disk, first_byte=4 * MIB, span_bytes=2 * MIB, pages=9, seed=4)
    assert len(pages) == 9
    told = bytearray(disk.stat().st_size)
    for offset, length in [*changes, *pages]:
        told[offset : offset + length] = b"\1" * length
    before = b"a" * 8 * MIB + bytes(56 * MIB)
    after = disk.read_bytes()
    differing = {at for at in range(0, 8 * MIB, 512) if before[at : at + 512] != after[at : at + 512]}
    assert differing, "something changed"
    assert all(any(told[at : at + 512]) for at in differing)
    assert before[8 * MIB :] == after[8 * MIB :]


def test_overwrites_leave_holes_alone(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with disk.open("wb") as stream:
        stream.truncate(64 * MIB)
        for at in (0, 10 * MIB, 40 * MIB):
            stream.seek(at)
            stream.write(b"d" * (2 * MIB if at else MIB))
    before = disk.stat().st_blocks
    changes = plan_overwrites(disk, total_bytes=2 * MIB, seed=1)
    assert sum(length for _, length in changes) == 2 * MIB
    apply_changes(disk, changes, iter([b"new" * MIB]))
    assert disk.stat().st_blocks == before
    assert longest_data(disk) in ((10 * MIB, 12 * MIB), (40 * MIB, 42 * MIB))


GOOD: dict[str, Any] = {
    "dirty": {"restic": 5.0, "holdfast": 0.4},
    "growth": {"1 GiB": 0.30, "4 GiB": 0.31, "16 GiB": 0.38},
    "second": {"restic": 40_000_000, "casync": 30_000_000, "holdfast": 20_000_000},
    "lineage": {"snapshot": 1.0, "fiftieth increment": 1.09},
    "boot": {"local file": 20.0, "over NBD": 24.9},
}


def test_every_goal_of_a_good_run_is_met() -> None:
    verdicts = judge(GOOD)
    assert len(verdicts) == 5
    assert all(verdict.met for verdict in verdicts)
    assert "12.5 times" in verdicts[0].figure


@pytest.mark.parametrize(
    "worse",
    [
        {"dirty": {"restic": 5.0, "holdfast": 0.51}},
        {"growth": {"1 GiB": 0.30, "16 GiB": 0.40}},
        {"second": {"restic": 40_000_000, "casync": 19_000_000, "holdfast": 20_000_000}},
        {"lineage": {"snapshot": 1.0, "fiftieth increment": 1.11}},
        {"boot": {"local file": 20.0, "over NBD": 25.1}},
    ],
)
def test_a_worse_figure_is_short(worse: dict[str, Any]) -> None:
    assert [verdict.met for verdict in judge(worse)] == [False]
    assert judge({}) == []
