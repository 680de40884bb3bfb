"""Which points of a VM rules keep: a pure plan that says of each point why it stays, or that it goes (ADR 0131).

Rules are unions, as those of restic's `forget --keep-*`: each keeps what it keeps, whatever the others say. A rule of a
period keeps the newest point of each of the newest N periods that have one, so a machine that was off for a month does
not lose what it had before. All times are UTC.

Invariants:
    * No rules keep everything, and rules that would keep nothing are refused.
    * The newest point stays, and so does what is locked or pinned, whatever the rules say.
    * Applied again to what it kept, at the same moment, a plan lets nothing more go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from holdfast_core.model.dates import day_of, hour_of, month_of, second_of, week_of, year_of
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import RETENTION_COUNT_MAX
from holdfast_proto.v1.records_pb2 import PointRecord, RetentionRules

NEWEST: Final = "newest point of the VM"
NO_RULES: Final = "no rules"

# Name of a rule, its field, and the period that a point falls into.
_PERIODS: Final[tuple[tuple[str, str, Callable[[int], str]], ...]] = (
    ("hourly", "keep_hourly", hour_of),
    ("daily", "keep_daily", day_of),
    ("weekly", "keep_weekly", week_of),
    ("monthly", "keep_monthly", month_of),
    ("yearly", "keep_yearly", year_of),
)
_FIELDS: Final = ("keep_last", *(field for _, field, _ in _PERIODS))


@dataclass(frozen=True, slots=True)
class PlannedPoint:
    """A living point, and why it is kept; it goes where there is no reason."""

    point_id: str
    number: int
    created_unix_ms: int
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RetentionPlan:
    """What rules make of the living points of a VM, newest first."""

    points: tuple[PlannedPoint, ...]

    @property
    def kept(self) -> tuple[str, ...]:
        """Ids of the points that stay, newest first."""
        return tuple(point.point_id for point in self.points if point.reasons)

    @property
    def going(self) -> tuple[str, ...]:
        """Ids of the points that go, oldest first."""
        return tuple(point.point_id for point in reversed(self.points) if not point.reasons)


def check_rules(rules: RetentionRules) -> None:
    """Check rules that somebody gives.

    Raises:
        HoldfastError: INVALID_ARGUMENT if they keep nothing; LIMIT_EXCEEDED for a count of more than a million.
    """
    counts = [getattr(rules, field) for field in _FIELDS]
    if not any(counts):
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT,
            "these rules keep nothing; give at least one --keep-…, or no rules at all, which keeps everything",
        )
    if max(counts) > RETENTION_COUNT_MAX:
        raise HoldfastError(ErrorCode.LIMIT_EXCEEDED, f"a rule keeps {RETENTION_COUNT_MAX} points at most")


def told_rules(rules: RetentionRules | None) -> str:
    """Return rules in one line, as they are given on the command line; "keeps everything" for none."""
    if rules is None:
        return "keeps everything"
    return " ".join(
        f"{field.replace('_', '-')} {getattr(rules, field)}" for field in _FIELDS if getattr(rules, field)
    )


def plan_retention(
    points: Sequence[PointRecord],
    rules: RetentionRules | None,
    locks: Mapping[str, int],
    pinned: Mapping[str, Sequence[str]],
    now_unix_ms: int,
) -> RetentionPlan:
    """Return what becomes of the points of one VM.

    Args:
        points: points of the VM in any order; lineage stubs do not count.
        rules: the rules, as `check_rules` passes them; None keeps everything.
        locks: when the locks of points end, in Unix milliseconds, by point id.
        pinned: further reasons to keep points, by point id, e.g. "template of web-2".
        now_unix_ms: the time by which locks end.
    """
    living = [point for point in points if not point.forgotten]
    by_number = sorted(living, key=lambda point: point.number, reverse=True)
    reasons: dict[str, list[str]] = {point.point_id: [] for point in living}
    if rules is None:
        for point in living:
            reasons[point.point_id].append(NO_RULES)
    else:
        for rank, point in enumerate(by_number[: rules.keep_last], start=1):
            reasons[point.point_id].append(f"last {rank}")
        by_time = sorted(living, key=lambda point: (point.created_unix_ms, point.number), reverse=True)
        for name, field, period_of in _PERIODS:
            for point_id, period in _newest_of_periods(by_time, getattr(rules, field), period_of):
                reasons[point_id].append(f"{name} {period}")
    for point in by_number[:1]:
        reasons[point.point_id].append(NEWEST)
    for point_id, own in reasons.items():
        if locks.get(point_id, 0) > now_unix_ms:
            own.append(f"locked until {second_of(locks[point_id])}")
        own.extend(pinned.get(point_id, ()))
    return RetentionPlan(
        tuple(
            PlannedPoint(point.point_id, point.number, point.created_unix_ms, tuple(reasons[point.point_id]))
            for point in by_number
        )
    )


def _newest_of_periods(
    by_time: Sequence[PointRecord], count: int, period_of: Callable[[int], str]
) -> list[tuple[str, str]]:
    """Return the newest point of each of the newest `count` periods that have one, with the period."""
    found: dict[str, str] = {}
    for point in by_time:
        if len(found) == count:
            # Times go down from here: what follows is of the last period found, or of older ones.
            break
        found.setdefault(period_of(point.created_unix_ms), point.point_id)
    return [(point_id, period) for period, point_id in found.items()]
