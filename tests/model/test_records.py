"""Records: any change breaks the MAC, and lineage goes on through forgotten points."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.keys import KeyRing
from holdfast_core.model.records import (
    check_object,
    check_point,
    descends,
    newest_descendant,
    object_mac,
    point_mac,
)
from holdfast_proto.v1.records_pb2 import (
    CONSISTENCY_CRASH,
    CONSISTENCY_OFFLINE,
    ObjectRecord,
    PointRecord,
    VolumeRecord,
)
from tests.model.strategies import identity, ring_of, secrets_of

RING = ring_of("records")


def volume(name: str, size: int = 1000, root: bytes = b"") -> VolumeRecord:
    """A volume's record."""
    return VolumeRecord(name=name, size_bytes=size, block_bytes=65_536, root=root, consistency=CONSISTENCY_OFFLINE)


def point(
    point_id: str = "bkp-2", parent_id: str = "snap-1", *, number: int = 2, forgotten: bool = False
) -> PointRecord:
    """A point with its MAC."""
    volumes = [volume("root", root=identity(1)), volume("data")]
    mac = point_mac(RING, tenant=7, point_id=point_id, vm_id="vm", parent_id=parent_id, volumes=volumes)
    return PointRecord(
        point_id=point_id,
        vm_id="vm",
        parent_id=parent_id,
        volumes=volumes,
        mac=mac,
        number=number,
        forgotten=forgotten,
        tenant=7,
    )


def stored_object() -> ObjectRecord:
    """An object with its MAC."""
    mac = object_mac(RING, tenant=7, storage_id="app-1", task_id="task", size_bytes=9, root=identity(2))
    return ObjectRecord(storage_id="app-1", task_id="task", size_bytes=9, root=identity(2), mac=mac, tenant=7)


def test_an_honest_record_passes() -> None:
    check_point(RING, point())
    check_object(RING, stored_object())


def test_volumes_count_in_order_of_name() -> None:
    record = point()
    record.volumes.reverse()
    check_point(RING, record)


def set_field(name: str, value: object) -> Callable[[PointRecord], None]:
    """A change of one field of the record or, with `volume.`, of its first volume."""

    def change(record: PointRecord) -> None:
        if name.startswith("volume."):
            setattr(record.volumes[0], name.removeprefix("volume."), value)
        else:
            setattr(record, name, value)

    return change


@pytest.mark.parametrize(
    "change",
    [
        set_field("point_id", "bkp-3"),
        set_field("vm_id", "v"),
        set_field("vm_id", "vmsnap-1"),
        set_field("parent_id", ""),
        set_field("tenant", 8),
        set_field("mac", b""),
        set_field("volume.name", "root2"),
        set_field("volume.size_bytes", 1001),
        set_field("volume.block_bytes", 32_768),
        set_field("volume.root", b""),
        set_field("volume.root", identity(3)),
        set_field("volume.consistency", CONSISTENCY_CRASH),
        lambda record: record.volumes.pop(),
        lambda record: record.volumes.append(volume("more")),
    ],
)
def test_any_change_of_a_point_is_seen(change: Callable[[PointRecord], object]) -> None:
    record = point()
    change(record)
    with pytest.raises(HoldfastError, match="not what was committed") as caught:
        check_point(RING, record)
    assert caught.value.code is ErrorCode.CORRUPT


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("storage_id", "app-2"),
        ("task_id", "other"),
        ("size_bytes", 10),
        ("root", b""),
        ("tenant", 1),
        ("mac", bytes(32)),
    ],
)
def test_any_change_of_an_object_is_seen(name: str, value: object) -> None:
    record = stored_object()
    setattr(record, name, value)
    with pytest.raises(HoldfastError, match="not what was committed") as caught:
        check_object(RING, record)
    assert caught.value.code is ErrorCode.CORRUPT


def test_only_the_tenants_data_secret_makes_a_mac() -> None:
    with pytest.raises(HoldfastError) as caught:
        check_point(ring_of("another"), point())
    assert caught.value.code is ErrorCode.CORRUPT
    with pytest.raises(HoldfastError) as caught:
        check_point(KeyRing(secrets_of("records").without_data()), point())
    assert caught.value.code is ErrorCode.KEY_MISMATCH


def test_two_volumes_of_one_name_have_no_mac() -> None:
    with pytest.raises(HoldfastError) as caught:
        point_mac(RING, tenant=7, point_id="p", vm_id="vm", parent_id="", volumes=[volume("a"), volume("a")])
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT


LINE = [
    point("snap-1", "", number=1, forgotten=True),
    point("bkp-2", "snap-1", number=2, forgotten=True),
    point("bkp-3", "bkp-2", number=3),
    point("bkp-4", "snap-1", number=4),
    point("snap-5", "", number=5),
    point("bkp-6", "snap-5", number=6, forgotten=True),
]


@pytest.mark.parametrize(
    ("snapshot", "newest"),
    [("snap-1", "bkp-4"), ("bkp-2", "bkp-3"), ("bkp-4", "bkp-4"), ("snap-5", "snap-5"), ("bkp-6", None), ("no", None)],
)
def test_the_newest_living_descendant(snapshot: str, newest: str | None) -> None:
    found = newest_descendant(snapshot, LINE)
    assert (found.point_id if found else None) == newest
    assert newest_descendant(snapshot, list(reversed(LINE))) == found


def test_descent() -> None:
    assert descends("bkp-3", "snap-1", LINE)
    assert descends("snap-1", "snap-1", LINE)
    assert not descends("snap-1", "bkp-3", LINE)
    assert not descends("bkp-4", "bkp-2", LINE)
    assert not descends("bkp-6", "snap-1", LINE)
    assert not descends("no", "no", LINE)


def test_a_circle_of_parents_ends() -> None:
    circle = [point("a", "b"), point("b", "a", number=3)]
    assert descends("a", "b", circle)
    assert not descends("a", "c", circle)
    newest = newest_descendant("a", circle)
    assert newest is not None
    assert newest.point_id == "b"
