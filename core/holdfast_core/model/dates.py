"""Dates in UTC, as rules and messages name them. Pure: counts days since 1970 and reads no clock.

The proleptic Gregorian calendar; days to dates as in Howard Hinnant's chrono-Compatible Low-Level Date Algorithms,
weeks as in ISO 8601: they begin on Monday and belong to the year of their Thursday.
"""

from __future__ import annotations

from typing import Final

_DAY_MS: Final = 86_400_000
_DAYS_BEFORE_1970: Final = 719_162
"""From 1 January of the year 1."""
_SHIFT_DAYS: Final = 719_468
"""From 1 March of the year 0."""
_ERA_DAYS: Final = 146_097
_THURSDAY: Final = 3


def hour_of(unix_ms: int) -> str:
    """Return the hour that a time is in, e.g. "2026-11-29 18:00"."""
    return f"{day_of(unix_ms)} {unix_ms % _DAY_MS // 3_600_000:02d}:00"


def day_of(unix_ms: int) -> str:
    """Return the day, e.g. "2026-11-29"."""
    year, month, day = _date(unix_ms // _DAY_MS)
    return f"{year:04d}-{month:02d}-{day:02d}"


def week_of(unix_ms: int) -> str:
    """Return the ISO week, e.g. "2026-W48"."""
    days = unix_ms // _DAY_MS
    thursday = days - (days + _THURSDAY) % 7 + _THURSDAY
    year, _, _ = _date(thursday)
    return f"{year:04d}-W{(thursday - _new_year(year)) // 7 + 1:02d}"


def month_of(unix_ms: int) -> str:
    """Return the month, e.g. "2026-11"."""
    return day_of(unix_ms).rpartition("-")[0]


def year_of(unix_ms: int) -> str:
    """Return the year, e.g. "2026"."""
    return f"{_date(unix_ms // _DAY_MS)[0]:04d}"


def second_of(unix_ms: int) -> str:
    """Return the second, as messages tell a time, e.g. "2026-11-29 18:23:35Z"."""
    within_s = unix_ms % _DAY_MS // 1000
    return f"{day_of(unix_ms)} {within_s // 3600:02d}:{within_s // 60 % 60:02d}:{within_s % 60:02d}Z"


def _date(days: int) -> tuple[int, int, int]:
    """Return year, month and day of a day counted from 1 January 1970."""
    era, of_era = divmod(days + _SHIFT_DAYS, _ERA_DAYS)
    year_of_era = (of_era - of_era // 1460 + of_era // 36_524 - of_era // 146_096) // 365
    day_of_year = of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    shifted = (5 * day_of_year + 2) // 153
    month = shifted + 3 if shifted < 10 else shifted - 9
    return year_of_era + era * 400 + (month <= 2), month, day_of_year - (153 * shifted + 2) // 5 + 1


def _new_year(year: int) -> int:
    """Return the day on which a year begins, counted from 1 January 1970."""
    before = year - 1
    return 365 * before + before // 4 - before // 100 + before // 400 - _DAYS_BEFORE_1970
