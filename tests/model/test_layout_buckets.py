"""The order in which nodes are given slots: those that lack most first, by chance among equals."""

from __future__ import annotations

import pytest

from holdfast_core.model.layout.board import Random
from holdfast_core.model.layout.buckets import Buckets


def test_one_that_lacks_most_of_those_that_will_do_is_picked() -> None:
    buckets, random = Buckets([2, 5, 0, 5, 1]), Random(1)
    assert {buckets.pick(lambda _: True, random) for _ in range(50)} == {1, 3}
    assert buckets.pick(lambda number: number in (0, 4), random) == 0
    assert buckets.pick(lambda number: number == 2, random) is None, "it lacks nothing"


def test_what_was_given_counts() -> None:
    buckets, random = Buckets([2, 1]), Random(1)
    given = []
    while (number := buckets.pick(lambda _: True, random)) is not None:
        given.append(number)
        buckets.lower(number)
    assert given[0] == 0
    assert sorted(given) == [0, 0, 1]


@pytest.mark.slow
def test_one_of_many_is_found_where_hardly_any_will_do() -> None:
    assert Buckets([3] * 1000).pick(lambda number: number == 777, Random(1)) == 777
