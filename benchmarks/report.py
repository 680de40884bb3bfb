"""The benchmark's tables, in Markdown so that they can go into the documentation as they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.codec import CodecFigures
from benchmarks.contenders.secured import SETTINGS
from benchmarks.goals import BORG, BORG_TUNED, RESTIC, Verdict
from benchmarks.image import ImageSet
from benchmarks.results import STEPS, Turn, contenders, median_durable_mb_s, median_step
from benchmarks.security import LOSS_MAX, SECURITY_STEPS, Cost, SecurityTurn, median_setting
from benchmarks.stages import StageFigures

_REFERENCES = (RESTIC, BORG_TUNED, BORG)


def image_table(images: ImageSet) -> str:
    """What the days of the image hold and change."""
    rows = [
        [
            day.name,
            _mb(day.allocated_bytes),
            _mb(day.data_bytes),
            _mb(day.new_bytes_64k),
            _mb(day.new_bytes_4m),
        ]
        for day in images.days
    ]
    head = ["image", "allocated MB", "not zero MB", "new at 64 KiB, MB", "new at 4 MiB, MB"]
    return _table(head, rows)


def steps_table(turns: Sequence[Turn]) -> str:
    """Medians of every step of every contender, with ratios to the peers (how many times as fast)."""
    rows = []
    for step in STEPS:
        references = {name: median_step(turns, name, step) for name in _REFERENCES}
        for name in contenders(turns):
            figures = median_step(turns, name, step)
            if figures is None:
                continue
            ratios = [
                f"{reference.done_s / figures.done_s:.2f}" if reference is not None else ""
                for reference in references.values()
            ]
            rows.append(
                [
                    step,
                    name,
                    f"{figures.done_s:.2f}",
                    f"{figures.replicated_s:.2f}" if figures.replicated_s else "",
                    f"{figures.client_cpu_s:.1f}",
                    f"{figures.server_cpu_s:.1f}",
                    _mb(figures.peak_rss_bytes),
                    _mb(figures.stored_bytes) if figures.stored_bytes else "",
                    *ratios,
                ]
            )
    head = ["step", "program", "s", "all copies s", "client CPU s", "server CPU s", "client MB", "kept MB"]
    return _table([*head, *(f"x {name}" for name in _REFERENCES)], rows)


def disk_line(turns: Sequence[Turn]) -> str:
    """The machine's plain durable-write speed of the run."""
    speeds = sorted(turn.durable_mb_s for turn in turns)
    return (
        f"Plain sequential durable write beside it: median {median_durable_mb_s(turns):.0f} MB/s "
        f"({speeds[0]:.0f} to {speeds[-1]:.0f} over {len(speeds)} writes)."
    )


def goals_table(verdicts: Iterable[Verdict]) -> str:
    """Goal by goal: wanted, reached, and the arithmetic."""
    rows = [
        ["met" if verdict.met else "SHORT", verdict.text, f"{verdict.reached:.2f}", verdict.arithmetic]
        for verdict in verdicts
    ]
    return _table(["", "goal", "reached", "arithmetic"], rows)


def security_table(turns: Sequence[SecurityTurn], found: Sequence[Cost]) -> str:
    """Medians of both steps by setting, and what is left of the throughput without security."""
    by_place = {(cost.step, cost.setting): cost for cost in found}
    rows = []
    for step in SECURITY_STEPS:
        for setting in SETTINGS:
            figures = median_setting(turns, setting, step)
            cost = by_place.get((step, setting))
            seconds = sorted(turn.steps[step].done_s for turn in turns if turn.setting == setting)
            rows.append(
                [
                    step,
                    setting,
                    f"{figures.done_s:.2f}",
                    f"{seconds[0]:.2f} to {seconds[-1]:.2f}",
                    f"{figures.replicated_s:.2f}",
                    f"{figures.client_cpu_s:.2f}",
                    f"{figures.server_cpu_s:.2f}",
                    "1.00" if cost is None else f"{cost.throughput:.2f}",
                    "1.00" if cost is None else f"{cost.cpu:.2f}",
                    "" if cost is None else _verdict(cost),
                ]
            )
    head = ["step", "security", "s", "turns", "all copies s", "client CPU s", "server CPU s", "throughput", "CPU"]
    return _table([*head, f"less than {LOSS_MAX:.0%} lost"], rows)


def _verdict(cost: Cost) -> str:
    lost = 1.0 - cost.throughput
    return f"{'met' if cost.met else 'SHORT'}: " + (f"{lost:.1%} lost" if lost > 0 else "nothing lost")


def codec_table(figures: Iterable[CodecFigures]) -> str:
    """Codecs at 64 KiB."""
    rows = [
        [
            each.name,
            f"{each.ratio:.2f}",
            *(
                f"{rate:.0f}" if rate else ""
                for rate in (each.compress_mb_s, each.decompress_mb_s, each.seal_mb_s, each.open_mb_s)
            ),
        ]
        for each in figures
    ]
    return _table(["codec", "ratio", "compress MB/s", "decompress MB/s", "seal MB/s", "open MB/s"], rows)


def stage_table(figures: Iterable[StageFigures]) -> str:
    """Where the CPU goes in a first snapshot."""
    rows = [
        [each.name, each.per, _mb(each.bytes_done), f"{each.cpu_s:.2f}", f"{each.wall_s:.2f}", f"{each.mb_s:.0f}"]
        for each in figures
    ]
    return _table(["stage", "times", "MB", "CPU s", "wall s", "MB/s"], rows)


def _mb(count: int) -> str:
    return f"{count / 1e6:.0f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[at]) for row in [head, *rows]) for at in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )
