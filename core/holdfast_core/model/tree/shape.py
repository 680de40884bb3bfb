"""The shape of a tree, which follows from the number of its blocks alone.

Leaf i holds blocks 128 i to 128 i + 127, and a node of level n refers to 128 places of level n - 1. So every node has
one place, (level, number), the same in every tree that has that level, and two trees are compared place by place.
"""

from __future__ import annotations

from holdfast_core.model.limits import TREE_FAN_OUT


def tree_height(block_count: int) -> int:
    """Return the level of the root over `block_count` blocks: 0 where one leaf suffices."""
    if block_count < 0:
        raise ValueError("a tree cannot have fewer than no blocks")
    height, covered = 0, TREE_FAN_OUT
    while covered < block_count:
        height, covered = height + 1, covered * TREE_FAN_OUT
    return height


def volume_height(block_count_total: int) -> int:
    """Return the level of a volume's root; `block_count_total` counts all positions, zero blocks too."""
    return tree_height(block_count_total)


def leaf_count(block_count: int) -> int:
    """Return how many leaves cover `block_count` blocks."""
    return -(-block_count // TREE_FAN_OUT)


def leaf_span(level: int) -> int:
    """Return how many leaves a full node of `level` covers."""
    return int(TREE_FAN_OUT**level)
