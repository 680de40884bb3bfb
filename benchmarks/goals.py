"""The figures that the project set out to reach, and how a run of the benchmark stands to them.

A goal is a ratio of medians of one run. Where it is missed, or the disk allows little more, the arithmetic of the disk
stands beside it: bytes stored, times copies, over the plain durable-write speed of the same turns, is a floor that no
program on this disk can pass, however fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.results import FIRST, INCREMENTAL, RESTORE, STEPS, StepFigures, Turn, median_durable_mb_s, median_step

ONE_NODE: Final = "holdfast 1 node"
THREE_NODES: Final = "holdfast 3 nodes"
RESTIC: Final = "restic"
BORG: Final = "borg defaults"
BORG_TUNED: Final = "borg tuned"
PEAK_BYTES_MAX: Final = 400_000_000


@dataclass(frozen=True, slots=True)
class Goal:
    """A ratio of speeds that should be reached: `ours` on `step` at least `factor` times as fast as `theirs`."""

    ours: str
    theirs: str
    step: str
    factor: float


GOALS: Final = (
    Goal(ONE_NODE, RESTIC, FIRST, 3.0),
    Goal(ONE_NODE, BORG_TUNED, FIRST, 1.0),
    Goal(THREE_NODES, RESTIC, FIRST, 1.5),
    Goal(ONE_NODE, RESTIC, INCREMENTAL, 4.0),
    Goal(ONE_NODE, BORG_TUNED, INCREMENTAL, 1.0),
    Goal(ONE_NODE, RESTIC, RESTORE, 2.0),
    Goal(ONE_NODE, BORG, RESTORE, 1.3),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a goal came out.

    Attributes:
        text: the goal in words.
        wanted: ratio to reach.
        reached: ratio that was reached.
        met: whether that is enough.
        arithmetic: the seconds behind it, and the disk's floor for steps that write.
    """

    text: str
    wanted: float
    reached: float
    met: bool
    arithmetic: str


def judge(turns: Sequence[Turn]) -> list[Verdict]:
    """Verdicts on all goals whose contenders took part, memory last."""
    verdicts = []
    for goal in GOALS:
        ours, theirs = median_step(turns, goal.ours, goal.step), median_step(turns, goal.theirs, goal.step)
        if ours is not None and theirs is not None:
            verdicts.append(_judge_ratio(turns, goal, ours, theirs))
    return verdicts + _judge_memory(turns)


def disk_floor_s(turns: Sequence[Turn], contender: str, step: str) -> tuple[float, str]:
    """Seconds that the plain disk needs for what a step of a contender added, all copies, and how that was reckoned."""
    at = STEPS.index(step)
    now = median_step(turns, contender, step)
    before = median_step(turns, contender, STEPS[at - 1]) if at else None
    if now is None:
        raise ValueError(f"{contender} did not take the step {step}")
    copies = next(turn.copies for turn in turns if turn.contender == contender)
    added = now.stored_bytes - (before.stored_bytes if before is not None else 0)
    speed = median_durable_mb_s(turns, contender)
    seconds = added / 1e6 / speed
    text = f"{added / copies / 1e6:.0f} MB x {copies} / {speed:.0f} MB/s = {seconds:.1f} s"
    return seconds, text


def _judge_ratio(turns: Sequence[Turn], goal: Goal, ours: StepFigures, theirs: StepFigures) -> Verdict:
    reached = theirs.done_s / ours.done_s
    allowed_s = theirs.done_s / goal.factor
    met = reached >= goal.factor if goal.factor != 1.0 else reached > 1.0
    arithmetic = f"{ours.done_s:.2f} s against {theirs.done_s:.2f} s; {allowed_s:.2f} s allowed"
    if goal.step != RESTORE:
        floor_s, reckoned = disk_floor_s(turns, goal.ours, goal.step)
        arithmetic += f"; disk floor {reckoned}"
        if not met and floor_s > allowed_s:
            arithmetic += ", which alone is above the goal: the disk is the limit"
    wanted = f"at least {goal.factor:g} times" if goal.factor != 1.0 else "faster than"
    return Verdict(
        text=f"{goal.step}: {goal.ours} {wanted} {goal.theirs}",
        wanted=goal.factor,
        reached=reached,
        met=met,
        arithmetic=arithmetic,
    )


def _judge_memory(turns: Sequence[Turn]) -> list[Verdict]:
    peaks = [
        (figures.peak_rss_bytes, turn.contender, step)
        for turn in turns
        if turn.contender in (ONE_NODE, THREE_NODES)
        for step, figures in turn.steps.items()
    ]
    if not peaks:
        return []
    peak, contender, step = max(peaks)
    return [
        Verdict(
            text="peak memory of the client below 400 MB",
            wanted=1.0,
            reached=PEAK_BYTES_MAX / peak,
            met=peak < PEAK_BYTES_MAX,
            arithmetic=f"{peak / 1e6:.0f} MB at most, in {contender}, {step}",
        )
    ]
