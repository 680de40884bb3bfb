"""Chains of replacements: all of their steps, or none."""

from __future__ import annotations

import pytest

from holdfast_core.model.layout.board import Board
from holdfast_core.model.layout.exchange import Exchange
from holdfast_core.model.layout.shares import Bounds, Problem
from holdfast_core.model.layout.table import LayoutNode


def make_board(before: list[list[int]], zones: str) -> Board:
    """A board over one node a letter, the letter being its zone."""
    nodes = [LayoutNode(f"n{number}", zone, 1) for number, zone in enumerate(zones)]
    return Board(Problem.of(nodes, partitions=len(before), replicas=2), before)


def table(board: Board) -> list[list[int]]:
    """The slots of all partitions."""
    return [list(board.slots(partition)) for partition in range(board.problem.partitions)]


def test_a_slot_is_shifted_over_a_node_in_between() -> None:
    # Node 3 shares its zone with node 1, beside which node 0 stands everywhere, so it cannot replace node 0 directly.
    board = make_board([[0, 1], [0, 1], [2, 4]], "abcbd")
    assert Exchange(board).shift([0], 1 << 3)
    assert board.load[0] == board.load[3] == 1
    assert sum(board.load) == 6
    assert [board.zone_spread(partition) for partition in range(3)] == [2, 2, 2]


def test_what_cannot_be_shifted_stays() -> None:
    board = make_board([[0, 1], [0, 1]], "ab")
    before = table(board)
    assert not Exchange(board).shift([0], 1 << 1)
    assert table(board) == before


def test_a_chain_that_breaks_is_undone() -> None:
    board = make_board([[0, 1], [0, 2]], "abc")
    before = table(board)
    exchange = Exchange(board)
    assert not exchange._apply([(1, 2), (1, 0)])
    assert not exchange._apply([(1, 2)], cost_below=1)
    assert table(board) == before
    assert board.load == [2, 1, 1, 0]
    assert exchange._apply([(1, 2)], cost_below=2)
    assert table(board) == [[0, 2], [0, 2]]


@pytest.mark.slow
def test_a_detour_is_taken_back() -> None:
    board = make_board([[0, 1], [0, 2], [1, 2]], "abcd")
    board.replace(0, 0, 3)
    board.replace(1, 0, 3)
    board.replace(2, 1, 0)
    board.replace(2, 2, 3)
    Exchange(board).reduce_movement([Bounds(0, 3)] * 4)
    assert [sorted(slots) for slots in table(board)] == [[0, 1], [0, 2], [1, 2]]
