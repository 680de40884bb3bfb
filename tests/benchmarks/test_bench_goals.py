"""The arithmetic of goals, medians and the disk's floor, on made-up turns."""

from __future__ import annotations

import pytest

from benchmarks.goals import BORG_TUNED, ONE_NODE, PEAK_BYTES_MAX, RESTIC, THREE_NODES, disk_floor_s, judge
from benchmarks.results import (
    FIRST,
    INCREMENTAL,
    RESTORE,
    StepFigures,
    Turn,
    contenders,
    median_durable_mb_s,
    median_step,
)


def figures(done_s: float, *, stored_bytes: int = 0, peak_rss_bytes: int = 100_000_000) -> StepFigures:
    """A step that took `done_s` and left `stored_bytes` in the repository."""
    return StepFigures(
        done_s=done_s,
        replicated_s=done_s,
        client_cpu_s=done_s,
        server_cpu_s=0.0,
        peak_rss_bytes=peak_rss_bytes,
        stored_bytes=stored_bytes,
    )


def turn(contender: str, steps: dict[str, StepFigures], *, copies: int = 1, durable_mb_s: float = 500.0) -> Turn:
    """A turn on a disk of the given speed."""
    return Turn(contender, copies, steps, durable_bytes=int(durable_mb_s * 1e6), durable_s=1.0)


def test_medians_are_taken_figure_by_figure() -> None:
    """One slow run does not move the median, and peaks are the highest of all."""
    turns = [
        turn(RESTIC, {FIRST: figures(seconds, peak_rss_bytes=peak)})
        for seconds, peak in ((9.0, 1), (30.0, 7), (10.0, 2))
    ]
    median = median_step(turns, RESTIC, FIRST)
    assert median is not None
    assert median.done_s == 10.0
    assert median.peak_rss_bytes == 7
    assert median_step(turns, RESTIC, RESTORE) is None
    assert contenders(turns) == [RESTIC]


def test_a_goal_is_met_exactly_at_its_factor() -> None:
    """Three times as fast is met at 3.0 and short below."""
    for ours_s, met in ((3.0, True), (3.01, False)):
        turns = [
            turn(RESTIC, {FIRST: figures(9.0, stored_bytes=1)}),
            turn(ONE_NODE, {FIRST: figures(ours_s, stored_bytes=500_000_000)}),
        ]
        verdict = judge(turns)[0]
        assert verdict.met is met
        assert verdict.reached == pytest.approx(9.0 / ours_s)


def test_faster_means_strictly_faster() -> None:
    """The goal against tuned borg is missed by a tie."""
    turns = [
        turn(BORG_TUNED, {FIRST: figures(4.0, stored_bytes=1)}),
        turn(ONE_NODE, {FIRST: figures(4.0, stored_bytes=1)}),
    ]
    assert [verdict.met for verdict in judge(turns)] == [False, True]


def test_goals_without_their_contender_are_left_out() -> None:
    """Where a peer is not installed, only the memory goal remains."""
    verdicts = judge([turn(ONE_NODE, {FIRST: figures(1.0, stored_bytes=1)})])
    assert [verdict.text for verdict in verdicts] == ["peak memory of the client below 400 MB"]


def test_the_floor_counts_what_a_step_added_in_all_copies() -> None:
    """The second step's floor is the difference of stored bytes over the disk's speed of the same turns."""
    steps = {FIRST: figures(9.0, stored_bytes=1_500_000_000), INCREMENTAL: figures(4.0, stored_bytes=1_800_000_000)}
    turns = [turn(THREE_NODES, steps, copies=3, durable_mb_s=300.0)]
    seconds, reckoned = disk_floor_s(turns, THREE_NODES, FIRST)
    assert seconds == pytest.approx(5.0)
    assert reckoned == "500 MB x 3 / 300 MB/s = 5.0 s"
    assert disk_floor_s(turns, THREE_NODES, INCREMENTAL)[0] == pytest.approx(1.0)
    assert median_durable_mb_s(turns) == pytest.approx(300.0)


def test_a_miss_that_the_disk_explains_says_so() -> None:
    """Where the floor alone is above the allowed time, the verdict names the disk."""
    turns = [
        turn(RESTIC, {FIRST: figures(6.0, stored_bytes=1)}),
        turn(THREE_NODES, {FIRST: figures(5.5, stored_bytes=1_500_000_000)}, copies=3, durable_mb_s=300.0),
    ]
    verdict = judge(turns)[0]
    assert not verdict.met
    assert "500 MB x 3 / 300 MB/s = 5.0 s" in verdict.arithmetic
    assert "the disk is the limit" in verdict.arithmetic


def test_peak_memory_is_judged_over_all_steps() -> None:
    """The highest peak of any step of any of our clusters decides."""
    turns = [
        turn(ONE_NODE, {FIRST: figures(1.0, stored_bytes=1)}),
        turn(THREE_NODES, {RESTORE: figures(1.0, peak_rss_bytes=PEAK_BYTES_MAX)}, copies=3),
    ]
    (verdict,) = judge(turns)
    assert not verdict.met
    assert "400 MB at most, in holdfast 3 nodes, restore" in verdict.arithmetic
