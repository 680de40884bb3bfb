"""Index nodes from anywhere: what decodes is exactly the encoding of what came out; everything else is CORRUPT."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import PLAIN_BYTES_MAX
from holdfast_core.model.tree import (
    Node,
    ObjectInner,
    ObjectLeaf,
    VolumeInner,
    VolumeLeaf,
    decode_node,
    encode_node,
)
from tests.fuzz.mutations import mutated, outcome
from tests.model.strategies import identity


def ids(count: int, first: int) -> tuple[bytes, ...]:
    """Distinct ids."""
    return tuple(identity(first + number) for number in range(count))


SLOTS = (0, 3, 64, 127)
ALL_SLOTS = tuple(range(128))
NODES: list[Node] = [
    VolumeLeaf(SLOTS, ids(4, 0), ids(4, 10), (b"", identity(20), b"", identity(21))),
    VolumeLeaf(ALL_SLOTS, ids(128, 1000), ids(128, 2000), (b"",) * 128),
    VolumeInner(1, SLOTS, ids(4, 30)),
    VolumeInner(8, ALL_SLOTS, ids(128, 3000)),
    ObjectLeaf((1, 4096, PLAIN_BYTES_MAX), ids(3, 40), ids(3, 50)),
    ObjectInner(2, ids(3, 60), (1, 2**40, 2**63 - 1)),
]
ENCODED = [encode_node(node) for node in NODES]
SIZES = (0, 1, 3, 4, 20, 52, 100, 300, 4132)


def check(plain: bytes) -> None:
    """One encoding a node: two files can never hold the same node in two ways, nor a node that is none."""
    node = outcome(lambda: decode_node(plain), ErrorCode.CORRUPT)
    if not isinstance(node, HoldfastError):
        assert encode_node(node) == plain


@settings(max_examples=200, deadline=None)
@given(
    kind=st.integers(0, 5),
    level=st.integers(0, 9),
    count=st.sampled_from([0, 1, 2, 127, 128, 129, 255]),
    data=st.data(),
)
def test_arbitrary_bytes_behind_a_likely_header(kind: int, level: int, count: int, data: st.DataObject) -> None:
    size = data.draw(st.sampled_from(SIZES))
    body = data.draw(st.binary(min_size=min(size, 40), max_size=min(size, 40))) * (size // 40 + 1)
    check(bytes([1, kind, level, count]) + body[:size])


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(data=st.data(), number=st.integers(0, len(NODES) - 1), donor=st.integers(0, len(NODES) - 1))
def test_a_changed_node_is_refused_or_another_one(data: st.DataObject, number: int, donor: int) -> None:
    bad = data.draw(mutated(ENCODED[number], ENCODED[donor]))
    check(bad)
    node = outcome(lambda: decode_node(bad), ErrorCode.CORRUPT)
    assert bad == ENCODED[number] or node != NODES[number]


@settings(max_examples=100, deadline=None)
@given(plain=st.binary(max_size=200))
def test_arbitrary_bytes(plain: bytes) -> None:
    check(plain)
    check(b"\x01" + plain)
