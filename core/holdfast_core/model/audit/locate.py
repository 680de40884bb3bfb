"""Says of lines that are not what was signed where they differ first, and how."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import TypeVar

Mark = TypeVar("Mark", bytes, int)


class What(enum.Enum):
    """What is wrong with the first record that is not right."""

    ALTERED = "altered"
    MISSING = "missing"
    REORDERED = "reordered"
    INSERTED = "inserted"
    UNSIGNED = "unsigned"
    FORGED_HEAD = "forged-head"


def first_difference(expected: Sequence[Mark], found: Sequence[Mark | None]) -> int | None:
    """Return the first place where two sequences differ, None if they are the same."""
    for at, (one, other) in enumerate(zip(expected, found, strict=False)):
        if one != other:
            return at
    return None if len(expected) == len(found) else min(len(expected), len(found))


def what_differs(
    expected: Sequence[Mark], found: Sequence[Mark | None], at: int, rest: Iterable[tuple[bool, Mark]]
) -> What:
    """Return what happened at the first place where two sequences differ.

    Args:
        expected: what should stand there, in order.
        found: what stands there; None for what is nothing of the kind.
        at: the place.
        rest: what comes after both, in order: True with what stands there, False with what should.
    """
    one = expected[at] if at < len(expected) else None
    other = found[at] if at < len(found) else None
    expected_later, found_again = one in found[at + 1 :], other in found[at + 1 :]
    found_later = other in expected[at + 1 :]
    for stands, mark in rest:
        if not stands:
            found_later |= mark == other
        else:
            expected_later |= mark == one
            found_again |= mark == other
    # What stands here belongs to a later place and is gone from there; else it is a copy, or nothing of this log.
    moved_up = other is not None and found_later and not found_again
    if at >= len(found):
        return What.REORDERED if expected_later else What.MISSING
    if at >= len(expected) or expected_later:
        return What.REORDERED if moved_up else What.INSERTED
    return What.MISSING if moved_up else What.ALTERED
