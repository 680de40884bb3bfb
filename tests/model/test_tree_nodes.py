"""Index nodes: every node survives its bytes, every node has one encoding, and nothing else decodes."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
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
from tests.model.strategies import identity

slot_sets = st.sets(st.integers(0, 127), min_size=1).map(lambda slots: tuple(sorted(slots)))


def names(seed: int, count: int) -> tuple[bytes, ...]:
    """Distinct ids."""
    return tuple(identity(seed * 1000 + number) for number in range(count))


def decoded(plain: bytes) -> Node | None:
    """The node, or None where the bytes are refused as corrupt; any other error is a fault."""
    try:
        return decode_node(plain)
    except HoldfastError as error:
        if error.code is not ErrorCode.CORRUPT:
            raise
        return None


@st.composite
def nodes(draw: st.DrawFn) -> Node:
    """Any node."""
    seed = draw(st.integers(0, 2**30))
    slots = draw(st.one_of(slot_sets, st.just(tuple(range(128)))))
    count = len(slots)
    level = draw(st.integers(1, 8))
    kind = draw(st.integers(0, 3))
    if kind == 0:
        deltas = draw(st.sets(st.sampled_from(slots)))
        bases = tuple(identity(-seed % 2**60 + slot) if slot in deltas else b"" for slot in slots)
        return VolumeLeaf(slots, names(seed, count), names(seed + 1, count), bases)
    if kind == 1:
        return VolumeInner(level, slots, names(seed, count))
    if kind == 2:
        lengths = draw(st.lists(st.integers(1, PLAIN_BYTES_MAX), min_size=count, max_size=count))
        return ObjectLeaf(tuple(lengths), names(seed, count), names(seed + 1, count))
    sizes = draw(st.lists(st.integers(1, 2**63 - 1), min_size=count, max_size=count))
    return ObjectInner(level, names(seed, count), tuple(sizes))


@settings(max_examples=200)
@given(node=nodes())
def test_a_node_survives_its_bytes(node: Node) -> None:
    assert decode_node(encode_node(node)) == node


@settings(max_examples=400)
@given(plain=st.binary(max_size=300))
@example(b"")
@example(b"\x01\x01\x00\x00")
@example(b"\x01\x02\x01\x01" + bytes(48))
@example(b"\x01\x04\x01\x01" + bytes(40))
@example(b"\x01\x04\x01\x01" + b"\xff" * 40)
def test_arbitrary_bytes_are_refused_or_canonical(plain: bytes) -> None:
    for data in (plain, b"\x01" + plain):
        node = decoded(data)
        assert node is None or encode_node(node) == data


@settings(max_examples=200)
@given(node=nodes(), data=st.data())
def test_a_damaged_node_is_refused_or_another_node(node: Node, data: st.DataObject) -> None:
    good = encode_node(node)
    at = data.draw(st.integers(0, min(len(good) - 1, 40)))
    bad = bytearray(good)
    bad[at] ^= 1 << data.draw(st.integers(0, 7))
    for changed in (bytes(bad), good[:-1], good + b"\0", good[: at + 1]):
        other = decoded(changed)
        assert other != node
        assert other is None or encode_node(other) == changed


ONE = (identity(1),)
LEAF = VolumeLeaf((3,), ONE, ONE, (b"",))


@pytest.mark.parametrize(
    "node",
    [
        VolumeLeaf((), (), (), ()),
        VolumeLeaf((128,), ONE, ONE, (b"",)),
        VolumeLeaf((-1,), ONE, ONE, (b"",)),
        VolumeLeaf((3,), (), ONE, (b"",)),
        VolumeLeaf((3,), ONE, (b"short",), (b"",)),
        VolumeLeaf((3,), ONE, ONE, ()),
        VolumeLeaf((3,), ONE, ONE, (b"short",)),
        VolumeLeaf((3, 3), ONE * 2, ONE * 2, (b"",) * 2),
        VolumeLeaf((4, 3), ONE * 2, ONE * 2, (b"",) * 2),
        VolumeInner(0, (0,), ONE),
        VolumeInner(9, (0,), ONE),
        VolumeInner(1, (0, 1), ONE),
        ObjectLeaf((0,), ONE, ONE),
        ObjectLeaf((PLAIN_BYTES_MAX + 1,), ONE, ONE),
        ObjectLeaf((1,) * 129, ONE * 129, ONE * 129),
        ObjectLeaf((1,), ONE, ()),
        ObjectInner(0, ONE, (1,)),
        ObjectInner(1, ONE, (0,)),
        ObjectInner(1, ONE, (2**63,)),
        ObjectInner(1, ONE, ()),
    ],
    ids=str,
)
def test_impossible_nodes_are_not_encoded(node: Node) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        encode_node(node)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("version", (0, 2)),
        ("type", (1, 5)),
        ("leaf of a level", (2, 1)),
        ("count above the bitmap's", (3, 2)),
        ("count of none", (3, 0)),
        ("base of an empty slot", (4 + 16, 1)),
    ],
)
def test_contradictions_are_refused(what: str, change: tuple[int, int]) -> None:
    bad = bytearray(encode_node(LEAF))
    bad[change[0]] = change[1]
    padded = bytes(bad) + (identity(5) if "base" in what else b"")
    with pytest.raises(HoldfastError) as caught:
        decode_node(padded)
    assert caught.value.code is ErrorCode.CORRUPT
