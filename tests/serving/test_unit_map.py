"""The map of what a local file holds: sets of units, in pages that survive any mixture of old and new."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.serving.unit_map import PAGE_BYTES, PAGE_UNITS, UnitMap

UNITS = 3 * PAGE_UNITS + 77
near = st.sampled_from([0, 8, PAGE_UNITS, 2 * PAGE_UNITS, UNITS]).flatmap(
    lambda at: st.integers(max(0, at - 20), min(UNITS, at + 20))
)
ranges = st.tuples(near, st.one_of(near, st.integers(0, UNITS))).map(lambda ends: (min(ends), max(ends)))


def members(units: UnitMap, first: int = 0, end: int = UNITS) -> set[int]:
    """The units that are held, by the runs of a range."""
    found: set[int] = set()
    at = first
    for low, high, held in units.runs(first, end):
        assert at == low < high, "runs lie one after another"
        at = high
        if held:
            found.update(range(low, high))
    assert at == end
    return found


@pytest.mark.slow
@given(st.lists(ranges, max_size=8), ranges)
def test_the_map_is_a_set(added: list[tuple[int, int]], asked: tuple[int, int]) -> None:
    units = UnitMap(UNITS)
    model: set[int] = set()
    for first, end in added:
        units.add(first, end)
        model.update(range(first, end))
    assert units.held == len(model)
    assert members(units) == model
    assert members(units, *asked) == model & set(range(*asked))
    states = [held for _, _, held in units.runs(*asked)]
    assert all(one != other for one, other in itertools.pairwise(states)), "runs that are alike are one"


@pytest.mark.slow
@given(st.lists(ranges, max_size=6), st.lists(ranges, max_size=6), st.data())
def test_any_mixture_of_old_and_new_pages_is_a_state_in_between(
    flushed: list[tuple[int, int]], later: list[tuple[int, int]], data: st.DataObject
) -> None:
    units = UnitMap(UNITS)
    for first, end in flushed:
        units.add(first, end)
    kept = dict(units.take_changed())
    before = members(units)
    for first, end in later:
        units.add(first, end)
    arrived = {number: page for number, page in units.take_changed().items() if data.draw(st.booleans())}
    loaded = UnitMap(UNITS)
    for number, page in {**kept, **arrived}.items():
        loaded.load(number, page)
    assert before <= members(loaded) <= members(units)


def test_pages_that_could_not_be_written_count_as_changed_again() -> None:
    units = UnitMap(UNITS)
    units.add(0, 1)
    pages = units.take_changed()
    units.give_back(pages)
    units.add(1, 2)
    assert units.take_changed() == {0: b"\x03".ljust(PAGE_BYTES, b"\0")}


def test_all_pages_loaded_are_the_map() -> None:
    units = UnitMap(UNITS)
    units.add(5, 9)
    units.add(PAGE_UNITS - 1, 2 * PAGE_UNITS + 1)
    units.add(UNITS - 1, UNITS)
    loaded = UnitMap(UNITS)
    for number, page in units.take_changed().items():
        assert len(page) == PAGE_BYTES
        loaded.load(number, page)
    assert members(loaded) == members(units)
    assert loaded.held == units.held
    assert units.take_changed() == {}


def test_bits_beyond_the_end_mean_nothing() -> None:
    units = UnitMap(10)
    units.load(0, b"\xff" * PAGE_BYTES)
    units.load(1, b"\xff" * PAGE_BYTES)
    assert units.held == 10
    assert list(units.runs(0, 10)) == [(0, 10, True)]


def test_a_huge_volume_that_is_empty_costs_nothing() -> None:
    units = UnitMap((64 << 40) // 4096)
    units.add(1 << 33, (1 << 33) + 1)
    assert len(units.take_changed()) == 1
    with pytest.raises(ValueError, match="not within"):
        units.add(0, units.unit_count + 1)
