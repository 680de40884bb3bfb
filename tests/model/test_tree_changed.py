"""The walk beside a change hint: what it keeps means the same in the newer tree, and it opens nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import TREE_FAN_OUT
from holdfast_core.model.tree import ChangedWalk, Place, VolumeTreeBuilder
from holdfast_core.model.tree.shape import leaf_count
from tests.model.test_tree_walks import totals, volumes
from tests.model.trees import NodeStore, build_volume, leaf_of, run


def touched_by(changed: set[int]) -> object:
    leaves = sorted({at // TREE_FAN_OUT for at in changed})

    def touched(first: int, end: int) -> bool:
        return any(first <= leaf < end for leaf in leaves)

    return touched


@settings(max_examples=150)
@given(data=st.data(), new_total=totals, old_total=totals, limit=st.sampled_from([1, 7, 64]))
def test_kept_subtrees_and_touched_leaves_make_the_newer_tree(
    data: st.DataObject, new_total: int, old_total: int, limit: int
) -> None:
    old = data.draw(volumes(old_total))
    written = data.draw(volumes(new_total))
    removed = data.draw(st.sets(st.sampled_from(sorted(old)), max_size=5)) if old else set()
    new = {at: entry for at, entry in {**old, **written}.items() if at < new_total and at not in removed - set(written)}
    spare = data.draw(st.sets(st.integers(0, max(0, new_total - 1)), max_size=3)) if new_total else set()
    changed = {*written, *removed, *spare}
    if new_total != old_total:
        changed.update(range(min(new_total, old_total), max(new_total, old_total)))
    store = NodeStore()
    root = build_volume(old, old_total, store)
    walk = ChangedWalk(root, old_total, new_total, touched_by(changed))  # type: ignore[arg-type]
    places: list[Place] = []
    run(walk, store, limit=limit, each=lambda: places.extend(walk.take()))
    places.extend(walk.take())
    assert [place.first_leaf for place in places] == sorted(place.first_leaf for place in places)
    builder = VolumeTreeBuilder(new_total, store.store)
    upcoming = 0
    for place in [*places, None]:
        until = place.first_leaf if place is not None else leaf_count(new_total)
        for leaf_index in sorted({at // TREE_FAN_OUT for at in new}):
            if upcoming <= leaf_index < until:
                builder.add_leaf(leaf_index, leaf_of(new, leaf_index))
        if place is None:
            break
        upcoming = place.end_leaf
        if not place.touched:
            builder.reuse_subtree(place.ref.level, place.ref.place, place.ref.node_id)
        elif place.first_leaf < leaf_count(new_total):
            builder.add_leaf(place.first_leaf, leaf_of(new, place.first_leaf))
    assert builder.finish() == build_volume(new, new_total, store)


def test_what_is_not_touched_is_not_opened() -> None:
    total = 128**3
    volume = {at: (at % 50 + 1, 0) for at in range(0, total, 128 * 64)}
    store = NodeStore()
    root = build_volume(volume, total, store)
    assert ChangedWalk(root, total, total, lambda first, end: False).take()[0].ref.node_id == root
    walk = ChangedWalk(root, total, total, lambda first, end: first <= 64 < end)
    assert run(walk, store) == 2
    places = walk.take()
    assert [place.touched for place in places].count(True) == 1
    assert sum(place.ref.level == 1 for place in places) == 127
    assert ChangedWalk(b"", total, total, lambda first, end: True).done


def test_a_malformed_node_is_told() -> None:
    store = NodeStore()
    root = build_volume({0: (1, 0), 300: (2, 0)}, 400, store)
    walk = ChangedWalk(root, 400, 400, lambda first, end: True)
    with pytest.raises(HoldfastError) as caught:
        walk.feed({root: b"nonsense"})
    assert caught.value.code is ErrorCode.CORRUPT
    assert caught.value.block_ids == (root,)
