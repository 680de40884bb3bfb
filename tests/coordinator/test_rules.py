"""The pure rules: who vouches for what, fair samples of ids, and which partitions can take writes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast_coordinator.commit_rules import comparable, positions
from holdfast_coordinator.keyspace import TenantKeyspace, object_place, point_place
from holdfast_coordinator.layouts import partitions_without_quorum
from holdfast_coordinator.lineage import choose_parent, choose_restored
from holdfast_coordinator.reach import IdSample
from holdfast_coordinator.records import ANSWER_BYTES_MAX, check_fits_answer
from holdfast_coordinator.stats import split_bytes
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.layout import LayoutNode, plan_layout
from holdfast_core.runtime.metadata.store import KeyValue
from holdfast_proto.v1.records_pb2 import PointRecord, VolumeRecord

KIB = 1024


def point(*volumes: tuple[str, int, bytes]) -> PointRecord:
    """Return a point with volumes of these names, block sizes and roots."""
    return PointRecord(
        volumes=[VolumeRecord(name=name, block_bytes=size, root=root, size_bytes=size) for name, size, root in volumes]
    )


def test_the_parent_vouches_before_the_base_and_only_for_the_same_cut() -> None:
    parent = point(("root", 64 * KIB, b"p"), ("data", 64 * KIB, b"p"))
    base = point(("root", 64 * KIB, b"b"), ("extra", 64 * KIB, b"b"))
    new = point(("root", 64 * KIB, b"n"), ("data", 128 * KIB, b"n"), ("extra", 64 * KIB, b"n"), ("own", 64 * KIB, b"n"))
    found = comparable(new.volumes, parent, base)
    assert {name: volume.root for name, volume in found.items()} == {"root": b"p", "extra": b"b"}
    assert comparable(new.volumes, None, None) == {}


@pytest.mark.parametrize(("size", "expected"), [(0, 0), (1, 1), (65_536, 1), (65_537, 2)])
def test_positions_count_the_short_last_block(size: int, expected: int) -> None:
    assert positions(VolumeRecord(size_bytes=size, block_bytes=65_536)) == expected


def test_lineage_by_itself_refuses_what_it_does_not_know() -> None:
    snapshot = PointRecord(point_id="snap-1", vm_id="vm", number=1)
    backup = PointRecord(point_id="bkp-1", vm_id="vm", number=2, parent_id="snap-1")
    assert choose_parent("snap-1", "", [snapshot, backup]) == backup
    assert choose_parent("snap-1", "snap-1", [snapshot, backup]) == snapshot
    assert choose_restored("snap-1", "bkp-1", [snapshot, backup]) == backup
    for call in (choose_parent, choose_restored):
        with pytest.raises(HoldfastError) as caught:
            call("snap-2", "", [snapshot])
        assert caught.value.code is ErrorCode.NOT_FOUND


def test_listings_sort_as_numbers_and_times_do() -> None:
    assert sorted(point_place("vm", number) for number in (10, 9, 100)) == [
        point_place("vm", number) for number in (9, 10, 100)
    ]
    assert object_place("task", 999, "app-z") < object_place("task", 1000, "app-a")


def test_one_tenants_keys_are_never_anothers() -> None:
    one, other = TenantKeyspace(1), TenantKeyspace(11)
    assert not other.vm("x").startswith(one.vms_prefix)
    assert not one.points_of("vm-10").startswith(one.points_of("vm-1"))


@given(st.integers(min_value=1, max_value=64), st.integers(min_value=0, max_value=2000))
def test_a_sample_is_bounded_and_keeps_exactly_its_fraction_of_the_hash_space(most: int, count: int) -> None:
    ids = [random.Random(number).randbytes(32) for number in range(count)]
    sample = IdSample(most)
    for at in range(0, count, 50):
        sample.add(ids[at : at + 50])
    sample.add(ids[:10])
    assert len(sample.ids) <= most
    assert sample.ids == {each for each in ids if int.from_bytes(each[:4], "big") < 1 << (32 - sample.bits)}
    assert sample.bits == 0 or len(ids) > most


def test_sampled_sums_come_close_to_the_exact_ones() -> None:
    source = random.Random(5)
    ids = [source.randbytes(32) for _ in range(40_000)]
    own, foreign = IdSample(4000), IdSample(2000)
    own.add(ids[:30_000])
    foreign.add(ids[20_000:])
    own.narrow(foreign.bits)
    foreign.narrow(own.bits)
    exclusive, shared = split_bytes(own, foreign, dict.fromkeys(ids, 100))
    assert exclusive == pytest.approx(2_000_000, rel=0.1)
    assert shared == pytest.approx(1_000_000, rel=0.1)


def test_partitions_without_quorum_are_counted() -> None:
    nodes = [LayoutNode(f"n{number}", f"z{number}", 1 << 40) for number in range(4)]
    layout = plan_layout(None, nodes, 3, seed=1, partitions=64).layout
    names = frozenset(node.node_id for node in nodes)
    assert partitions_without_quorum(layout, names) == 0
    assert partitions_without_quorum(layout, names - {"n0"}) == 0
    both_gone = sum({"n0", "n1"} <= set(layout.owners_of(partition)) for partition in range(64))
    assert partitions_without_quorum(layout, names - {"n0", "n1"}) == both_gone > 0
    assert partitions_without_quorum(layout, frozenset()) == 64


def test_a_list_that_no_answer_holds_is_refused_plainly() -> None:
    items = [KeyValue("k", bytes(ANSWER_BYTES_MAX // 2), 1, 1)] * 2
    assert check_fits_answer(items, "the VM x") == items
    with pytest.raises(HoldfastError) as caught:
        check_fits_answer([*items, KeyValue("k", b"12", 1, 1)], "the VM x")
    assert caught.value.code is ErrorCode.LIMIT_EXCEEDED
