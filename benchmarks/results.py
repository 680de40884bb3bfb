"""What a run of the benchmark found, as values that go into its JSON, and their medians."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

FIRST = "first"
INCREMENTAL = "incremental"
SECOND_INCREMENTAL = "second incremental"
RESTORE = "restore"
STEPS = (FIRST, INCREMENTAL, SECOND_INCREMENTAL, RESTORE)


@dataclass(frozen=True, slots=True)
class StepFigures:
    """One step of one contender in one run; seconds and bytes.

    Attributes:
        done_s: until the point was committed or the image restored.
        replicated_s: until every copy was durable; 0 for a restore.
        client_cpu_s: CPU of the client.
        server_cpu_s: CPU of the contender's other processes meanwhile.
        peak_rss_bytes: of the client.
        stored_bytes: what the repository occupies afterwards, all copies; 0 for a restore.
        facts: what the contender says of itself.
    """

    done_s: float
    replicated_s: float
    client_cpu_s: float
    server_cpu_s: float
    peak_rss_bytes: int
    stored_bytes: int
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Turn:
    """All steps of one contender in one run, on a fresh repository.

    Attributes:
        contender: its name.
        copies: of each block.
        steps: by the names in STEPS.
        durable_bytes: bytes then written plainly to the same disk, for comparison: as many as its first step stored.
        durable_s: how long that took, fdatasync included.
    """

    contender: str
    copies: int
    steps: Mapping[str, StepFigures]
    durable_bytes: int
    durable_s: float

    @property
    def durable_mb_s(self) -> float:
        """The disk's plain durable-write speed in this turn, MB a second."""
        return self.durable_bytes / 1e6 / self.durable_s


def contenders(turns: Iterable[Turn]) -> list[str]:
    """Names of the contenders, in the order in which they came first."""
    return list(dict.fromkeys(turn.contender for turn in turns))


def median_step(turns: Sequence[Turn], contender: str, step: str) -> StepFigures | None:
    """The median of every figure of a step over a contender's turns, each figure on its own; None without any."""
    found = [turn.steps[step] for turn in turns if turn.contender == contender and step in turn.steps]
    if not found:
        return None
    return median_of(found)


def median_of(found: Sequence[StepFigures]) -> StepFigures:
    """The median of every figure of a step, each figure on its own; peaks are the highest of all.

    Raises:
        ValueError: there is nothing to take it of.
    """
    if not found:
        raise ValueError("there is no median of nothing")
    names = set.intersection(*(set(figures.facts) for figures in found))
    return StepFigures(
        done_s=statistics.median(figures.done_s for figures in found),
        replicated_s=statistics.median(figures.replicated_s for figures in found),
        client_cpu_s=statistics.median(figures.client_cpu_s for figures in found),
        server_cpu_s=statistics.median(figures.server_cpu_s for figures in found),
        peak_rss_bytes=max(figures.peak_rss_bytes for figures in found),
        stored_bytes=int(statistics.median(figures.stored_bytes for figures in found)),
        facts={name: statistics.median(figures.facts[name] for figures in found) for name in sorted(names)},
    )


def median_durable_mb_s(turns: Iterable[Turn], contender: str | None = None) -> float:
    """Median of the disk's plain durable-write speed, over one contender's turns or all."""
    return statistics.median(turn.durable_mb_s for turn in turns if contender in (None, turn.contender))
