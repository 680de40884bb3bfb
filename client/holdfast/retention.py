"""How long points stay: rules that keep them, what rules made of each, and locks."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionRules:
    """Which points of a VM are kept: all that any of the rules keeps, and always the newest. Times are in UTC.

    Attributes:
        keep_last: so many of the newest points.
        keep_hourly: the newest point of each of so many newest hours that have one.
        keep_daily: likewise of days.
        keep_weekly: likewise of ISO weeks.
        keep_monthly: likewise of months.
        keep_yearly: likewise of years.
    """

    keep_last: int = 0
    keep_hourly: int = 0
    keep_daily: int = 0
    keep_weekly: int = 0
    keep_monthly: int = 0
    keep_yearly: int = 0

    @property
    def text(self) -> str:
        """The rules in one line, as the command takes them, e.g. "keep-last 2 keep-daily 7"."""
        counts = {name.replace("_", "-"): count for name, count in asdict(self).items() if count}
        return " ".join(f"{name} {count}" for name, count in counts.items())


@dataclass(frozen=True, slots=True)
class RetainedPoint:
    """What rules make of one living point.

    Attributes:
        point_id: the point.
        created_unix_ms: when it was made.
        reasons: why it stays, e.g. "daily 2026-11-29"; empty for one that goes.
        forgotten: whether this call forgot it.
    """

    point_id: str
    created_unix_ms: int
    reasons: tuple[str, ...]
    forgotten: bool


@dataclass(frozen=True, slots=True)
class PointLock:
    """A lock: nothing forgets its point, or discards its VM, before it ends.

    Attributes:
        point_id: the point.
        until_unix_ms: when it ends.
        principal: who set it.
        set_unix_ms: when it was set.
    """

    point_id: str
    until_unix_ms: int
    principal: str
    set_unix_ms: int
