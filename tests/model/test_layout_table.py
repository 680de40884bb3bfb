"""The layout as a table: from a block's id to its nodes, and over the wire."""

from __future__ import annotations

import dataclasses
import struct
from collections import Counter

import mmh3
import pytest

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.layout import Layout, LayoutNode
from tests.model.strategies import identity

PINNED = [2155, 535, 1164]
"""By an independent MurmurHash3 of 32 bits, x86 variant, seed 9, top 12 bits."""

NODES = tuple(LayoutNode(name, "z", 1) for name in "abcd")


def layout(partitions: int = 4, replicas: int = 2) -> Layout:
    """A layout in which partition p is owned by p, p + 1 and so on."""
    owners = [(partition + turn) % len(NODES) for partition in range(partitions) for turn in range(replicas)]
    return Layout(
        epoch=3,
        seed=9,
        partitions=partitions,
        replicas=replicas,
        nodes=NODES,
        owners=struct.pack(f"<{len(owners)}H", *owners),
    )


@pytest.mark.parametrize("partitions", [1, 2, 4096, 65_536])
def test_the_partition_is_the_top_bits_of_the_hash(partitions: int) -> None:
    table = layout(partitions)
    for number in range(50):
        block = identity(number)
        expected = mmh3.hash(block, 9, signed=False) * partitions // 2**32
        assert table.partition_of(block) == expected
        assert table.owners_of_block(block) == table.owners_of(expected)


def test_the_partition_of_a_block_never_changes() -> None:
    blocks = [bytes(32), bytes(range(32)), b"\xff" * 32]
    assert [layout(4096).partition_of(block) for block in blocks] == PINNED


def test_blocks_spread_evenly_over_partitions() -> None:
    counts = Counter(layout(16).partition_of(identity(number)) for number in range(16_000))
    assert 850 < min(counts.values()) <= max(counts.values()) < 1150


def test_owners_and_quorum() -> None:
    assert layout().owners_of(1) == ("b", "c")
    assert [layout(replicas=replicas).write_quorum for replicas in (1, 2, 3, 4)] == [1, 2, 2, 3]


def test_a_layout_survives_the_wire() -> None:
    message = layout().to_message()
    assert Layout.from_message(message) == layout()
    assert Layout.from_message(message) is Layout.from_message(message), "what was read before is not spelt out again"


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": 0},
        {"partitions": 3},
        {"partitions": 0},
        {"replicas": 0},
        {"replicas": 17},
        {"owners": layout().owners[:-1]},
        {"owners": struct.pack("<8H", 0, 1, 1, 2, 2, 3, 3, 4)},
        {"owners": struct.pack("<8H", 0, 0, 1, 2, 2, 3, 3, 0)},
        {"nodes": NODES[:3]},
        {"nodes": (NODES[0], *NODES[:3])},
    ],
    ids=str,
)
def test_a_broken_layout_is_refused(change: dict[str, object]) -> None:
    good = layout()
    with pytest.raises(ValueError):  # noqa: PT011
        dataclasses.replace(good, **change)  # type: ignore[arg-type]
    message = good.to_message()
    for name, value in change.items():
        if name == "nodes":
            del message.nodes[:]
            message.nodes.extend(good.to_message().nodes[:3])
        else:
            setattr(message, name, value)
    with pytest.raises(HoldfastError) as caught:
        Layout.from_message(message)
    assert caught.value.code is ErrorCode.CORRUPT
