"""Times that people type: a date, a date and time, or how long from now."""

from __future__ import annotations

import datetime
import re
from types import MappingProxyType
from typing import Final

from holdfast_core.model.errors import ErrorCode, HoldfastError

_DURATION = re.compile(r"(\d+)([hdwy])", re.ASCII)
_HOURS: Final = MappingProxyType({"h": 1, "d": 24, "w": 7 * 24, "y": 365 * 24})
_DURATION_HOURS_MAX: Final = 200 * 366 * 24


def parse_end(text: str) -> datetime.datetime | datetime.timedelta:
    """Return the time or the duration that a text names: 2027-01-31, 2027-01-31T18:00Z, 12h, 30d, 6w, 1y.

    A time without a zone is in UTC, a date its first moment, a year 365 days.

    Raises:
        HoldfastError: INVALID_ARGUMENT if it names none.
    """
    duration = _DURATION.fullmatch(text)
    if duration is not None:
        hours = int(duration[1]) * _HOURS[duration[2]]
        return datetime.timedelta(hours=min(hours, _DURATION_HOURS_MAX))
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError as error:
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT,
            f"{text!r} is no time; give a date as 2027-01-31 or 2027-01-31T18:00Z, or a duration as 12h, 30d, 6w or 1y",
        ) from error
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=datetime.UTC)
