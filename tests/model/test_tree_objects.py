"""Trees of stored objects: by byte offsets, and held to exactly what the record says."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.tree import (
    ObjectInner,
    ObjectLeaf,
    ObjectLeafRef,
    ObjectScan,
    ObjectTreeBuilder,
    ObjectWalk,
    VolumeInner,
    decode_node,
    decode_object_leaf,
    encode_node,
)
from tests.model.strategies import identity
from tests.model.trees import NodeStore, reachable, run


def build(lengths: list[int]) -> tuple[bytes, int, NodeStore]:
    """An object of cuts of the given lengths: its root, size and nodes."""
    store = NodeStore()
    builder = ObjectTreeBuilder(store.store)
    for number, length in enumerate(lengths):
        builder.add(identity(2**70 + number), identity(number), length)
    root = builder.finish()
    assert (builder.block_count, builder.size_bytes) == (len(lengths), sum(lengths))
    return root, sum(lengths), store


counts = st.one_of(st.integers(0, 300), st.sampled_from([128, 129, 16_384, 16_385, 17_000]))


@settings(max_examples=60)
@given(count=counts, data=st.data(), limit=st.sampled_from([1, 64]))
def test_a_walk_finds_the_cuts_of_any_range(count: int, data: st.DataObject, limit: int) -> None:
    lengths = [1 + (number * 7919) % 1000 for number in range(count)]
    root, size, store = build(lengths)
    start = data.draw(st.integers(0, size))
    end = data.draw(st.integers(start, size + 5))
    walk = ObjectWalk(root, block_count=count, size_bytes=size, start=start, end=end)
    run(walk, store, limit=limit)
    cuts = []
    for ref in walk.take_leaves():
        offset = ref.byte_offset
        leaf = decode_object_leaf(ref, store[ref.leaf_id])
        for length, block in zip(leaf.lengths, leaf.block_ids, strict=True):
            cuts.append((offset, length, block))
            offset += length
    expected = []
    offset = 0
    for number, length in enumerate(lengths):
        if offset < end and offset + length > start and start < end:
            expected.append((offset, length, identity(number)))
        offset += length
    assert [cut for cut in cuts if cut[0] < end and cut[0] + cut[1] > start] == expected
    assert len(cuts) <= len(expected) + 2 * 127


@settings(max_examples=40)
@given(count=counts)
def test_a_scan_finds_everything_in_pieces(count: int) -> None:
    root, size, store = build([3] * count)
    scan = ObjectScan(root, block_count=count, size_bytes=size)
    index_ids: list[bytes] = []
    block_ids: list[bytes] = []

    def drain() -> None:
        piece = scan.take()
        assert len(piece.block_ids) <= 2 * 128
        index_ids.extend(piece.index_ids)
        block_ids.extend(piece.block_ids)

    run(scan, store, limit=2, each=drain)
    assert (set(index_ids), set(block_ids)) == reachable(root, store)
    assert len(block_ids) == count


def test_an_object_without_bytes_has_no_tree() -> None:
    root, _, store = build([])
    assert root == b""
    assert not store
    assert ObjectWalk(b"", block_count=0, size_bytes=0).done
    assert ObjectScan(b"", block_count=0, size_bytes=0).done


def test_shapes_follow_from_the_count() -> None:
    for count, nodes, level in ((1, 1, 0), (128, 1, 0), (129, 3, 1), (16_384, 129, 1), (16_385, 132, 2)):
        root, _, store = build([count - number for number in range(count)])
        assert len(store) == nodes
        assert decode_node(store[root]).level == level


def test_nodes_that_contradict_the_record_are_refused() -> None:
    root, size, store = build([5] * 300)
    wrong = [(300, size - 1), (300, size + 1), (257, size), (256, size), (400, size), (100, size), (20_000, size)]
    for count, claimed in wrong:
        scan = ObjectScan(root, block_count=count, size_bytes=claimed)
        with pytest.raises(HoldfastError) as caught:
            run(scan, store)
        assert caught.value.code is ErrorCode.CORRUPT


def test_leaves_that_contradict_their_parent_are_refused() -> None:
    leaf = ObjectLeaf((2, 3), (identity(1),) * 2, (identity(2),) * 2)
    plain = encode_node(leaf)
    leaf_id = identity(7)
    assert decode_object_leaf(ObjectLeafRef(0, leaf_id, 5, 2), plain) == leaf
    for ref in (ObjectLeafRef(0, leaf_id, 6, 2), ObjectLeafRef(0, leaf_id, 5, 3)):
        with pytest.raises(HoldfastError) as caught:
            decode_object_leaf(ref, plain)
        assert caught.value.block_ids == (leaf_id,)
    with pytest.raises(HoldfastError, match="no leaf"):
        decode_object_leaf(ObjectLeafRef(0, leaf_id, 5, 2), encode_node(VolumeInner(1, (0,), (leaf_id,))))


def test_an_inner_node_of_the_wrong_kind_is_refused() -> None:
    for node in (VolumeInner(1, (0,), (identity(1),)), ObjectInner(2, (identity(1),) * 2, (1, 1))):
        with pytest.raises(HoldfastError, match="is no inner node of level 1"):
            run(ObjectWalk(identity(0), block_count=200, size_bytes=2), {identity(0): encode_node(node)})
