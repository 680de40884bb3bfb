"""Runs every contender through the same days of the same disk, in turns, on fresh repositories."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.contenders.base import Contender, Saved, Saver
from benchmarks.image import ImageSet
from benchmarks.measure import durable_write_s, settle
from benchmarks.results import FIRST, INCREMENTAL, RESTORE, SECOND_INCREMENTAL, StepFigures, Turn
from benchmarks.spans import digest, warm

_SAVES = (FIRST, INCREMENTAL, SECOND_INCREMENTAL)


class WrongBytes(RuntimeError):
    """A contender restored something other than it was given."""


def compare(
    images: ImageSet,
    make: Sequence[Callable[[], Contender]],
    *,
    work: Path,
    runs: int,
    say: Callable[[str], None],
) -> list[Turn]:
    """Give every contender `runs` turns, interleaved, the order shifted by one each run; return all turns.

    Raises:
        WrongBytes: a restored image is not the one that was saved.
        benchmarks.measure.CommandFailed: a contender failed.
    """
    wanted = digest(images.path(len(_SAVES) - 1))
    turns = []
    for run in range(runs):
        for at in range(len(make)):
            contender = make[(run + at) % len(make)]()
            turn = _take_turn(contender, images, work, wanted)
            turns.append(turn)
            seconds = ", ".join(f"{step} {figures.done_s:.2f} s" for step, figures in turn.steps.items())
            say(f"run {run + 1} of {runs}, {contender.name}: {seconds}; disk {turn.durable_mb_s:.0f} MB/s")
    return turns


def _take_turn(contender: Contender, images: ImageSet, work: Path, wanted: str) -> Turn:
    shutil.rmtree(work, ignore_errors=True)
    disk, folder, target = work / "vm" / "disk.img", work / "contender", work / "restored"
    for made in (disk.parent, folder, target):
        made.mkdir(parents=True)
    steps = save_days(contender, images, folder, disk, _SAVES)
    try:
        saved, image = contender.restore(target)
        steps[RESTORE] = _figures(saved, 0)
        if digest(image) != wanted:
            raise WrongBytes(f"{contender.name} did not restore what it saved")
    finally:
        contender.close()
    image.unlink()
    plain_bytes = steps[FIRST].stored_bytes
    plain_s = durable_write_s(images.path(0), work, total_bytes=plain_bytes)
    shutil.rmtree(work)
    settle()
    return Turn(contender.name, contender.copies, steps, durable_bytes=plain_bytes, durable_s=plain_s)


def save_days(
    contender: Saver, images: ImageSet, folder: Path, disk: Path, steps: Sequence[str]
) -> dict[str, StepFigures]:
    """Open a contender in `folder` and save the image's first days as they come, one for each step; it stays open.

    Raises:
        benchmarks.measure.CommandFailed: the contender failed, and is closed.
    """
    _insert(images.path(0), disk)
    figures: dict[str, StepFigures] = {}
    contender.open(folder, disk)
    with ExitStack() as failing:
        failing.callback(contender.close)
        for day, step in enumerate(steps):
            _insert(images.path(day), disk)
            warm(disk)
            settle()
            saved = contender.save()
            settle()
            figures[step] = _figures(saved, contender.stored_bytes())
        failing.pop_all()
    return figures


def _insert(image: Path, disk: Path) -> None:
    # The same path each day, another file behind it: a hard link costs nothing and looks like a changed disk to all.
    disk.unlink(missing_ok=True)
    os.link(image, disk)


def _figures(saved: Saved, stored_bytes: int) -> StepFigures:
    return StepFigures(
        done_s=saved.done_s,
        replicated_s=saved.replicated_s,
        client_cpu_s=saved.client.cpu_s,
        server_cpu_s=saved.server_cpu_s,
        peak_rss_bytes=saved.client.peak_rss_bytes,
        stored_bytes=stored_bytes,
        facts=saved.facts,
    )
