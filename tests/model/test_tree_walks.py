"""Trees of volumes: built bottom up, walked top down, and compared place by place."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import TREE_FAN_OUT
from holdfast_core.model.tree import (
    DiffWalk,
    ObjectInner,
    VolumeInner,
    VolumeTreeBuilder,
    VolumeWalk,
    decode_node,
    decode_volume_leaf,
    encode_node,
    volume_height,
)
from tests.model.strategies import identity
from tests.model.trees import NodeStore, Volume, build_volume, leaf_of, node_at_places, reachable, run

totals = st.one_of(
    st.integers(0, 300), st.integers(16_000, 17_000), st.sampled_from([128, 129, 16_384, 16_385, 40_000])
)


@st.composite
def volumes(draw: st.DrawFn, total: int) -> Volume:
    """A sparse volume of clusters of blocks."""
    volume: Volume = {}
    for _ in range(draw(st.integers(0, 4)) if total else 0):
        start = draw(st.integers(0, total - 1))
        for at in range(start, min(total, start + draw(st.sampled_from([1, 5, 200])))):
            volume[at] = (draw(st.integers(1, 50)) if at == start else 1 + at % 90, 0)
        if draw(st.booleans()):
            volume[start] = (volume[start][0], draw(st.integers(51, 60)))
    return volume


def test_height_follows_from_the_number_of_blocks() -> None:
    cases = {0: 0, 1: 0, 128: 0, 129: 1, 128**2: 1, 128**2 + 1: 2, 128**3: 2, 2**32: 4}
    assert {total: volume_height(total) for total in cases} == cases
    with pytest.raises(ValueError, match="fewer"):
        volume_height(-1)


@settings(max_examples=80)
@given(data=st.data(), total=totals, limit=st.sampled_from([1, 3, 64]))
def test_a_walk_finds_exactly_the_leaves_that_were_built(data: st.DataObject, total: int, limit: int) -> None:
    volume = data.draw(volumes(total))
    store = NodeStore()
    root = build_volume(volume, total, store)
    assert bool(root) == bool(volume)
    walk = VolumeWalk(root, total)
    run(walk, store, limit=limit)
    expected = sorted({at // TREE_FAN_OUT for at in volume})
    assert [index for index, _ in walk.leaves] == expected
    for index, leaf_id in walk.leaves:
        leaf = decode_volume_leaf(leaf_id, store[leaf_id], leaf_index=index, block_count_total=total)
        assert leaf == leaf_of(volume, index)


def test_a_walk_over_a_range_opens_only_what_it_needs() -> None:
    total = 128 * 128 * 3
    store = NodeStore()
    root = build_volume({at: (at + 1, 0) for at in range(0, total, 100)}, total, store)
    walk = VolumeWalk(root, total, first_leaf=130, end_leaf=140)
    assert run(walk, store) == 2
    assert [index for index, _ in walk.take_leaves()] == list(range(130, 140))
    assert walk.leaves == []
    assert VolumeWalk(root, total, first_leaf=384).done


def test_a_walk_holds_little_however_large_the_volume() -> None:
    total = 128 * 128 * 20
    store = NodeStore()
    root = build_volume({at: (at + 1, 0) for at in range(0, total, 128)}, total, store)
    walk = VolumeWalk(root, total)
    most = 0
    found = []
    while not walk.done:
        walk.feed({node_id: store[node_id] for node_id in walk.wanted(2)})
        most = max(most, len(walk.leaves))
        found += [index for index, _ in walk.take_leaves()]
    assert found == list(range(total // 128))
    assert most <= 2 * 128


def test_partial_and_foreign_nodes_do_no_harm() -> None:
    total = 128 * 300
    store = NodeStore()
    root = build_volume({at: (at + 1, 0) for at in range(0, total, 64)}, total, store)
    walk = VolumeWalk(root, total)
    walk.feed({})
    walk.feed({identity(1): b"junk", root: store[root]})
    children = walk.wanted()
    walk.feed({children[1]: store[children[1]]})
    assert walk.leaves == []
    run(walk, store)
    assert [index for index, _ in walk.leaves] == list(range(300))


@settings(max_examples=150)
@given(data=st.data(), new_total=totals, old_total=totals, limit=st.sampled_from([2, 7, 64]))
def test_a_diff_is_what_brute_force_finds(data: st.DataObject, new_total: int, old_total: int, limit: int) -> None:
    old = data.draw(volumes(old_total))
    kept = {at: entry for at, entry in old.items() if at < new_total}
    new = {**kept, **data.draw(volumes(new_total))} if data.draw(st.booleans()) else data.draw(volumes(new_total))
    store = NodeStore()
    old_root, new_root = build_volume(old, old_total, store), build_volume(new, new_total, store)
    walk = DiffWalk(new_root, new_total, old_root, old_total)
    run(walk, store, limit=limit)
    new_places = node_at_places(new_root, volume_height(new_total), store)
    old_places = node_at_places(old_root, volume_height(old_total), store)
    assert sorted(walk.new_index_ids) == sorted(
        node_id for place, node_id in new_places.items() if old_places.get(place) != node_id
    )
    expected = []
    for at, entry in new.items():
        expected += [identity(number) for number in entry if number and number not in old.get(at, ())]
    assert sorted(walk.new_block_ids) == sorted(expected)


@settings(max_examples=60)
@given(data=st.data(), total=totals)
def test_without_an_old_tree_a_diff_finds_everything(data: st.DataObject, total: int) -> None:
    store = NodeStore()
    root = build_volume(data.draw(volumes(total)), total, store)
    walk = DiffWalk(root, total, b"", 0)
    index_ids: set[bytes] = set()
    block_ids: set[bytes] = set()

    def drain() -> None:
        piece = walk.take()
        index_ids.update(piece.index_ids)
        block_ids.update(piece.block_ids)

    run(walk, store, limit=2, each=drain)
    assert (index_ids, block_ids) == reachable(root, store)


def test_a_diff_opens_only_where_the_trees_differ() -> None:
    total = 128 * 128 * 4
    old = {at: (at + 1, 0) for at in range(0, total, 50)}
    store = NodeStore()
    old_root = build_volume(old, total, store)
    new_root = build_volume({**old, 70_000 % total: (999_999, 0)}, total, store)
    walk = DiffWalk(new_root, total, old_root, total)
    assert run(walk, store) == 2 * 3
    assert walk.new_block_ids == [identity(999_999)]
    same = DiffWalk(new_root, total, new_root, total)
    assert same.done
    assert DiffWalk(b"", total, old_root, total).done


def test_a_base_that_was_the_old_block_is_not_new() -> None:
    store = NodeStore()
    old = build_volume({5: (1, 0)}, 10, store)
    new = build_volume({5: (2, 1)}, 10, store)
    walk = DiffWalk(new, 10, old, 10)
    run(walk, store)
    assert walk.new_block_ids == [identity(2)]


def test_reused_nodes_make_the_same_tree() -> None:
    total = 128 * 128 * 2 + 500
    volume = {at: (at + 1, 0) for at in range(0, total, 77)}
    store = NodeStore()
    root = build_volume(volume, total, store)
    places = node_at_places(root, volume_height(total), store)
    builder = VolumeTreeBuilder(total, store.store)
    builder.reuse_subtree(1, 0, places[1, 0])
    for leaf_index in range(128, 260):
        if leaf_index % 3:
            builder.add_leaf(leaf_index, leaf_of(volume, leaf_index))
        else:
            builder.reuse_leaf(leaf_index, places[0, leaf_index])
    assert builder.finish() == root


def test_a_node_is_stored_as_soon_as_it_is_complete() -> None:
    stored: list[int] = []

    def store(plain: bytes) -> bytes:
        stored.append(decode_node(plain).level)
        return identity(len(stored))

    builder = VolumeTreeBuilder(128 * 200, store)
    for leaf_index in range(127):
        builder.add_leaf(leaf_index, leaf_of({leaf_index * 128: (1, 0)}, leaf_index))
    assert stored == [0] * 127
    builder.add_leaf(127, None)
    assert stored == [0] * 127 + [1]
    builder.add_leaf(150, leaf_of({150 * 128: (1, 0)}, 150))
    builder.finish()
    assert stored == [0] * 127 + [1, 0, 1, 2]


def test_leaves_out_of_turn_are_refused() -> None:
    builder = VolumeTreeBuilder(1000, NodeStore().store)
    builder.add_leaf(3, None)
    for wrong in (3, 1, 8, -1):
        with pytest.raises(ValueError, match="out of turn"):
            builder.add_leaf(wrong, None)
    with pytest.raises(ValueError, match="no level"):
        builder.reuse_subtree(2, 0, identity(1))


def corrupted(walk: VolumeWalk | DiffWalk, nodes: dict[bytes, bytes]) -> HoldfastError:
    """The error that feeding wrong nodes raises."""
    with pytest.raises(HoldfastError) as caught:
        run(walk, nodes)
    assert caught.value.code is ErrorCode.CORRUPT
    return caught.value


def test_misplaced_nodes_are_refused() -> None:
    total, root = 128 * 200, identity(0)
    leaf = leaf_of({0: (1, 0)}, 0)
    assert leaf is not None
    wrong = [
        encode_node(leaf),
        encode_node(ObjectInner(1, (identity(1),), (5,))),
        encode_node(VolumeInner(1, (0,), (identity(1),))),
        encode_node(VolumeInner(2, (2,), (identity(1),))),
        b"junk",
    ]
    for plain in wrong:
        assert corrupted(VolumeWalk(root, total), {root: plain}).block_ids == (root,)
        assert corrupted(DiffWalk(root, total, b"", 0), {root: plain}).block_ids == (root,)
        good = VolumeInner(2, (0, 1), (identity(2), identity(3)))
        nodes = {root: plain, identity(9): encode_node(good)}
        assert corrupted(DiffWalk(identity(9), total, root, total), nodes).block_ids == (root,)


def test_leaves_beyond_the_end_are_refused() -> None:
    leaf = leaf_of({127: (1, 0)}, 0)
    assert leaf is not None
    plain = encode_node(leaf)
    assert decode_volume_leaf(identity(1), plain, leaf_index=0, block_count_total=128) == leaf
    for index, total in ((0, 127), (1, 255)):
        with pytest.raises(HoldfastError) as caught:
            decode_volume_leaf(identity(1), plain, leaf_index=index, block_count_total=total)
        assert caught.value.block_ids == (identity(1),)
    with pytest.raises(HoldfastError, match="no leaf"):
        decode_volume_leaf(
            identity(1), encode_node(VolumeInner(1, (0,), (identity(2),))), leaf_index=0, block_count_total=9
        )
    corrupted(DiffWalk(identity(1), 100, b"", 0), {identity(1): plain})
