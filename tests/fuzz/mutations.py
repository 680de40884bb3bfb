"""Texts and bytes that were right and then went through a mutation: bits flipped, pieces cut, put in, exchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hypothesis import strategies as st

from holdfast_core.model.errors import ErrorCode, HoldfastError

T = TypeVar("T")

_PIECE_MAX = 48
_STEPS_MAX = 4


@st.composite
def mutated(draw: st.DrawFn, good: bytes, other: bytes | None = None) -> bytes:
    """`good` after one to four changes; pieces to put in are arbitrary, or from `other` (another right one)."""
    data = good
    for _ in range(draw(st.integers(1, _STEPS_MAX))):
        data = _changed(draw, data, good if other is None else other)
    return data


def _changed(draw: st.DrawFn, data: bytes, donor: bytes) -> bytes:
    way = draw(st.sampled_from(["flip", "cut", "insert", "splice", "end"]))
    at = draw(st.integers(0, max(0, len(data) - 1)))
    if way == "flip" and data:
        return data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]
    if way == "cut":
        return data[:at] + data[at + draw(st.integers(1, _PIECE_MAX)) :]
    if way == "splice":
        begin = draw(st.integers(0, len(donor)))
        piece = donor[begin : begin + draw(st.integers(1, _PIECE_MAX))]
        return data[:at] + piece + data[at + draw(st.integers(0, _PIECE_MAX)) :]
    if way == "end":
        return data[:at]
    return data[:at] + draw(st.binary(min_size=1, max_size=_PIECE_MAX)) + data[at:]


@st.composite
def mutated_text(draw: st.DrawFn, good: str, other: str | None = None) -> str:
    """As `mutated`, for ASCII text; what is no ASCII afterwards is any character, half of a pair included."""
    raw = draw(mutated(good.encode("ascii"), None if other is None else other.encode("ascii")))
    return raw.decode("ascii", draw(st.sampled_from(["surrogateescape", "replace", "ignore"])))


def outcome(parse: Callable[[], T], *allowed: ErrorCode) -> T | HoldfastError:
    """What `parse` returns, or the error it raises if that has one of the allowed codes; all others go on."""
    try:
        return parse()
    except HoldfastError as error:
        if error.code not in allowed:
            raise
        return error
