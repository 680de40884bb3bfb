"""What security costs a save: the same first snapshot and incremental with it off, on, and on with TLS (ADR 0088)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.compare import save_days
from benchmarks.contenders.secured import SETTINGS, Secured
from benchmarks.image import ImageSet
from benchmarks.results import FIRST, INCREMENTAL, StepFigures, median_of

SECURITY_STEPS: Final = (FIRST, INCREMENTAL)
LOSS_MAX: Final = 0.10
"""Part of the throughput with security off that security may take."""


@dataclass(frozen=True, slots=True)
class SecurityTurn:
    """Both steps with one setting, on a fresh cluster.

    Attributes:
        setting: off, on or tls.
        steps: by the names in SECURITY_STEPS.
    """

    setting: str
    steps: dict[str, StepFigures]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a setting costs in one step.

    Attributes:
        step: which.
        setting: on or tls.
        throughput: of `off`'s throughput, what is left, by medians; 1.0 is all of it.
        cpu: CPU seconds of client and services together, over those of `off`.
        met: whether less than `LOSS_MAX` is lost.
    """

    step: str
    setting: str
    throughput: float
    cpu: float
    met: bool


def measure_security(images: ImageSet, *, work: Path, runs: int, say: Callable[[str], None]) -> list[SecurityTurn]:
    """Give every setting `runs` turns, interleaved, the order shifted by one each run; return all turns.

    Raises:
        benchmarks.measure.CommandFailed: a client failed.
        RuntimeError: a service did not start.
    """
    turns = []
    for run in range(runs):
        for at in range(len(SETTINGS)):
            setting = SETTINGS[(run + at) % len(SETTINGS)]
            turn = _take_turn(Secured(setting), images, work)
            turns.append(turn)
            seconds = ", ".join(f"{step} {figures.done_s:.2f} s" for step, figures in turn.steps.items())
            say(f"run {run + 1} of {runs}, security {setting}: {seconds}")
    return turns


def _take_turn(cluster: Secured, images: ImageSet, work: Path) -> SecurityTurn:
    shutil.rmtree(work, ignore_errors=True)
    disk, folder = work / "vm" / "disk.img", work / "contender"
    for made in (disk.parent, folder):
        made.mkdir(parents=True)
    steps = save_days(cluster, images, folder, disk, SECURITY_STEPS)
    cluster.close()
    shutil.rmtree(work)
    return SecurityTurn(cluster.name, steps)


def median_setting(turns: Sequence[SecurityTurn], setting: str, step: str) -> StepFigures:
    """The median of every figure of a step over a setting's turns. Raises ValueError if there is none."""
    return median_of([turn.steps[step] for turn in turns if turn.setting == setting])


def costs(turns: Sequence[SecurityTurn]) -> list[Cost]:
    """What each setting but `off` costs in each step."""
    found = []
    for step in SECURITY_STEPS:
        off = median_setting(turns, SETTINGS[0], step)
        for setting in SETTINGS[1:]:
            figures = median_setting(turns, setting, step)
            throughput = off.done_s / figures.done_s
            cpu = (figures.client_cpu_s + figures.server_cpu_s) / (off.client_cpu_s + off.server_cpu_s)
            found.append(Cost(step, setting, throughput, cpu, met=throughput > 1.0 - LOSS_MAX))
    return found
