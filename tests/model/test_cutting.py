"""Cuts of application data: whole, bounded, keyed, the same however the bytes come, and stable under insertion."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from holdfast_core.model.cutting import CUT_BYTES_MAX, CUT_BYTES_MIN, Cutter
from tests.model.strategies import stream

KEY = bytes(range(32))
DATA = stream("application data", 6_000_000)


def cut(data: bytes, *, pieces: int = 10**9, key: bytes = KEY) -> list[bytes]:
    """Cut bytes that are handed over in pieces of a size."""
    cutter = Cutter(key)
    cuts: list[bytes] = []
    for at in range(0, len(data), pieces):
        cuts += cutter.feed(memoryview(data)[at : at + pieces])
    return cuts + cutter.finish()


@settings(max_examples=15)
@given(size=st.integers(0, len(DATA)), pieces=st.integers(50_000, 5_000_000))
def test_cuts_depend_on_the_bytes_alone(size: int, pieces: int) -> None:
    data = DATA[:size]
    cuts = cut(data, pieces=pieces)
    assert b"".join(cuts) == data
    assert cuts == cut(data)
    assert all(CUT_BYTES_MIN <= len(each) <= CUT_BYTES_MAX for each in cuts[:-1])
    assert all(0 < len(each) <= CUT_BYTES_MAX for each in cuts[-1:])


@settings(max_examples=200)
@given(key=st.binary(min_size=32, max_size=32))
@example(bytes(32))
@example(b"\xff" * 32)
@example(b"\0" * 7 + b"\x80" + bytes(24))
def test_any_key_will_do(key: bytes) -> None:
    data = DATA[:300_000]
    assert b"".join(cut(data, key=key)) == data


def test_cuts_are_a_quarter_mebibyte_or_so() -> None:
    cuts = cut(DATA)
    assert 150_000 < len(DATA) / len(cuts) < 400_000


def test_an_insertion_changes_few_cuts() -> None:
    edited = DATA[:1_000_000] + b"an insertion" + DATA[1_000_000:]
    before, after = cut(DATA), cut(edited)
    assert len(set(after) - set(before)) <= 3


def test_another_tenant_cuts_elsewhere() -> None:
    assert len(set(cut(DATA)) & set(cut(DATA, key=bytes(32)))) <= 2


def test_repetitive_data_is_cut_too() -> None:
    cuts = cut(bytes(5_000_000))
    assert b"".join(cuts) == bytes(5_000_000)
    assert max(map(len, cuts)) <= CUT_BYTES_MAX


def test_a_stream_without_bytes_has_no_cuts() -> None:
    assert cut(b"") == []
    cutter = Cutter(KEY)
    assert cutter.feed(b"") == []
    assert cutter.finish() == []


def test_a_cutter_holds_little() -> None:
    cutter = Cutter(KEY)
    fed = held = 0
    for at in range(0, len(DATA), 100_000):
        fed += len(DATA[at : at + 100_000])
        held += sum(map(len, cutter.feed(DATA[at : at + 100_000])))
        assert fed - held <= 4 * CUT_BYTES_MAX + 100_000
