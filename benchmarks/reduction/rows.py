"""What the reduction report says: rows with their goal, the bytes behind them, and whether the goal is met. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class Goal:
    """What a row is to reach: `low` is where it is met, `high` the end of the range that was expected; shares of 1."""

    low: float
    high: float

    def __str__(self) -> str:
        """Return the range, as it stands in the tables."""
        return f"{self.low:.0%} and more" if self.low == self.high else f"{self.low:.0%} to {self.high:.0%} and more"


TEMPLATES: Final = Goal(0.60, 0.80)
TEXT: Final = Goal(0.30, 0.50)
DELTAS: Final = Goal(0.70, 0.90)
SELECTION: Final = Goal(0.95, 0.95)


@dataclass(frozen=True, slots=True)
class Share:
    """A reduction: what was left of how much.

    Attributes:
        what: what is counted.
        left_bytes: what was kept, stored or sent.
        whole_bytes: of how much.
    """

    what: str
    left_bytes: int
    whole_bytes: int

    @property
    def saved(self) -> float:
        """1 - left / whole: 0 where there was nothing to save on, below 0 where it grew."""
        return 1.0 - self.left_bytes / self.whole_bytes if self.whole_bytes else 0.0


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the report.

    Attributes:
        name: what is reduced.
        goal: how far.
        workload: what was measured on.
        formula: what `figure` is, in words.
        figure: what is judged.
        beside: other reductions of the same bytes, not judged.
        facts: counts and bytes that the reader may want to check with.
    """

    name: str
    goal: Goal
    workload: str
    formula: str
    figure: Share
    beside: tuple[Share, ...]
    facts: dict[str, int]

    @property
    def met(self) -> bool:
        """Whether the figure reaches the lower end of its goal."""
        return self.figure.whole_bytes > 0 and self.figure.saved >= self.goal.low


def record(row: Row) -> dict[str, Any]:
    """Return a row as it goes into the JSON, with what follows from its bytes."""
    kept = asdict(row) | {"saved": row.figure.saved, "met": row.met}
    kept["beside"] = [asdict(share) | {"saved": share.saved} for share in row.beside]
    return kept


def summary(rows: Iterable[Row]) -> str:
    """Return the table of all rows, in Markdown."""
    lines = ["| reduction | goal | measured | | bytes | formula |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        verdict = "met" if row.met else "**SHORT**"
        lines.append(
            f"| {row.name} | {row.goal} | {row.figure.saved:.1%} | {verdict} | {_bytes(row.figure)} | {row.formula} |"
        )
    return "\n".join(lines)


def details(row: Row) -> str:
    """Return what a row was measured on, and what was measured beside it."""
    lines = [f"{row.name}", f"  {row.workload}"]
    lines += [f"  * {share.what}: {share.saved:.1%} ({_bytes(share)})" for share in row.beside]
    lines.append("  * " + ", ".join(f"{name} {count:,}" for name, count in row.facts.items()))
    return "\n".join(lines)


def _bytes(share: Share) -> str:
    return f"1 - {share.left_bytes / 1e6:.1f} / {share.whole_bytes / 1e6:.1f} MB"
