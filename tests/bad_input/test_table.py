"""Bad input, row by row: its own code, a sentence that names what is wrong, and nothing left half-done."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from holdfast import ErrorCode, Progress, StateManager, VolumeSpec
from holdfast_core.model.limits import NAME_CHARS_MAX, VOLUME_NAME_CHARS_MAX
from tests.bad_input.rig import UNKNOWN_BACKUP, UNKNOWN_OBJECT, UNKNOWN_SNAPSHOT, Rig, error_of

LONG = "x" * (NAME_CHARS_MAX + 1)


def check(rig: Rig, attempt: Callable[[], Any], code: ErrorCode, *names: str) -> None:
    """Check that an attempt fails with its code and names what it is about, and that nothing can be seen of it."""
    before = rig.seen()
    error = error_of(attempt)
    assert error.code is code, repr(error)
    assert all(name in error.message for name in names), error.message
    assert rig.seen() == before


def test_an_unknown_vm(rig: Rig) -> None:
    check(rig, lambda: rig.manager.create_snapshot("nobody"), ErrorCode.NOT_FOUND, "nobody")
    check(rig, lambda: rig.manager.incremental_backup("nobody", rig.one.snapshot_id), ErrorCode.NOT_FOUND)
    check(rig, lambda: rig.manager.points("nobody"), ErrorCode.NOT_FOUND, "nobody")


def test_an_unknown_snapshot(rig: Rig) -> None:
    manager, unknown = rig.manager, UNKNOWN_SNAPSHOT
    check(rig, lambda: manager.incremental_backup("one", unknown), ErrorCode.NOT_FOUND, unknown)
    check(rig, lambda: manager.restore_vm(unknown, "", target=rig.target), ErrorCode.NOT_FOUND, unknown)
    check(rig, lambda: manager.forget(unknown), ErrorCode.NOT_FOUND, unknown)
    check(rig, lambda: manager.verify(unknown), ErrorCode.NOT_FOUND, unknown)


def test_an_unknown_backup(rig: Rig) -> None:
    check(
        rig,
        lambda: rig.manager.restore_vm(rig.one.snapshot_id, UNKNOWN_BACKUP, target=rig.target),
        ErrorCode.NOT_FOUND,
        UNKNOWN_BACKUP,
    )
    check(
        rig,
        lambda: rig.manager.incremental_backup("one", rig.one.snapshot_id, parent=UNKNOWN_BACKUP),
        ErrorCode.NOT_FOUND,
        UNKNOWN_BACKUP,
    )


def test_an_unknown_storage_id(rig: Rig) -> None:
    check(rig, lambda: rig.manager.retrieve_application_data(UNKNOWN_OBJECT), ErrorCode.NOT_FOUND, UNKNOWN_OBJECT)
    check(rig, lambda: rig.manager.forget_application_data(UNKNOWN_OBJECT), ErrorCode.NOT_FOUND, UNKNOWN_OBJECT)


def test_a_backup_of_another_vm(rig: Rig) -> None:
    one, two = rig.one, rig.two
    check(rig, lambda: rig.manager.incremental_backup("one", two.snapshot_id), ErrorCode.MISMATCH)
    check(
        rig,
        lambda: rig.manager.incremental_backup("one", one.snapshot_id, parent=two.backup_id),
        ErrorCode.MISMATCH,
    )
    check(
        rig,
        lambda: rig.manager.restore_vm(one.snapshot_id, two.backup_id, target=rig.target),
        ErrorCode.MISMATCH,
        two.backup_id,
    )


def test_a_volume_file_that_is_missing(rig: Rig) -> None:
    disk = rig.folder / "gone.raw"
    rig.manager.register_vm("missing", {"root": str(disk)})
    check(rig, lambda: rig.manager.create_snapshot("missing"), ErrorCode.SOURCE_UNREADABLE, str(disk))


def test_a_volume_file_that_cannot_be_read(rig: Rig) -> None:
    # Tests may run as root, whom no mode keeps out: a folder and a symbolic link to itself cannot be read by anybody.
    loop = rig.folder / "loop.raw"
    loop.symlink_to(loop)
    for name, path in (("folder", rig.folder), ("loop", loop)):
        rig.manager.register_vm(name, {"root": str(path)})
        check(rig, lambda name=name: rig.manager.create_snapshot(name), ErrorCode.SOURCE_UNREADABLE, str(path))  # type: ignore[misc]


def test_a_volume_that_changes_while_it_is_read(rig: Rig) -> None:
    disk = rig.folder / "busy.raw"
    disk.write_bytes(os.urandom(8 << 20))
    rig.manager.register_vm("busy", {"root": str(disk)})

    def grow(_: Progress) -> None:
        with disk.open("ab") as file:
            file.write(b"more")

    check(rig, lambda: rig.manager.create_snapshot("busy", progress=grow), ErrorCode.VOLUME_CHANGED, str(disk))
    # Whoever says that it may change gets a point that says so.
    rig.manager.register_vm("busy", {"root": VolumeSpec(uri=str(disk), live=True)}, replace=True)
    assert rig.manager.create_snapshot("busy", progress=grow)


def test_a_restore_target_that_is_not_empty(rig: Rig) -> None:
    occupied = rig.folder / "occupied"
    occupied.mkdir()
    (occupied / "precious").write_text("keep me", encoding="utf-8")
    check(
        rig,
        lambda: rig.manager.restore_vm(rig.one.snapshot_id, "", target=occupied),
        ErrorCode.TARGET_EXISTS,
        str(occupied),
    )
    assert (occupied / "precious").read_text(encoding="utf-8") == "keep me"


@pytest.mark.slow
@pytest.mark.parametrize("bad", ["../../etc/passwd", "a/b", "..", "/", "a\0b", "snap-\n"])
def test_an_id_with_path_parts(rig: Rig, bad: str) -> None:
    manager, one = rig.manager, rig.one
    for attempt in (
        lambda: manager.restore_vm(bad, "", target=rig.target),
        lambda: manager.restore_vm(one.snapshot_id, bad, target=rig.target),
        lambda: manager.incremental_backup("one", bad),
        lambda: manager.incremental_backup("one", one.snapshot_id, parent=bad),
        lambda: manager.retrieve_application_data(bad),
        lambda: manager.forget(bad),
        lambda: manager.verify(bad),
        lambda: manager.create_snapshot(bad),
        lambda: manager.register_vm(bad, {"root": str(one.disk)}),
        lambda: manager.register_vm("good", {bad: str(one.disk)}),
        lambda: manager.persist_application_data(bad, b"data"),
    ):
        check(rig, attempt, ErrorCode.INVALID_ARGUMENT)


@pytest.mark.parametrize("bad", ["", LONG])
def test_an_empty_or_oversized_name(rig: Rig, bad: str) -> None:
    manager, disk = rig.manager, str(rig.one.disk)
    for attempt in (
        lambda: manager.register_vm(bad, {"root": disk}),
        lambda: manager.create_snapshot(bad),
        lambda: manager.restore_vm(bad, "", target=rig.target),
        lambda: manager.persist_application_data(bad, b"data"),
        lambda: manager.retrieve_application_data(bad),
    ):
        check(rig, attempt, ErrorCode.INVALID_ARGUMENT)
    for volume in ("", "x" * (VOLUME_NAME_CHARS_MAX + 1)):
        check(rig, lambda volume=volume: manager.register_vm("good", {volume: disk}), ErrorCode.INVALID_ARGUMENT)  # type: ignore[misc]
    check(rig, lambda: manager.register_vm("good", {}), ErrorCode.INVALID_ARGUMENT)


def test_a_registration_that_differs(rig: Rig) -> None:
    check(rig, lambda: rig.manager.register_vm("one", {"root": str(rig.two.disk)}), ErrorCode.ALREADY_EXISTS, "one")


@pytest.mark.parametrize("uri", ["nbds://host/export", "qmp:/run/qmp.sock", "memdiff:/m", "http://host/disk", ""])
def test_a_source_that_is_not_supported(rig: Rig, uri: str) -> None:
    check(rig, lambda: rig.manager.register_vm("other", {"root": uri}), ErrorCode.INVALID_ARGUMENT)


def test_two_sessions_on_one_vm(rig: Rig) -> None:
    disk = rig.folder / "slow.raw"
    disk.write_bytes(os.urandom(4 << 20))
    rig.manager.register_vm("slow", {"root": str(disk)})
    reading, may_go_on = threading.Event(), threading.Event()

    def hold(_: Progress) -> None:
        reading.set()
        may_go_on.wait(30)

    made: list[str] = []
    with rig.cluster.state_manager() as other:
        first = threading.Thread(target=lambda: made.append(other.create_snapshot("slow", progress=hold)))
        first.start()
        try:
            assert reading.wait(30)
            error = error_of(lambda: rig.manager.create_snapshot("slow"))
        finally:
            may_go_on.set()
            first.join()
    assert error.code is ErrorCode.BUSY
    assert error.retryable
    assert 0 < float(error.facts["seconds_left"]) <= 60
    assert [point.point_id for point in rig.manager.points("slow")] == made


def test_a_coordinator_that_is_down(rig: Rig) -> None:
    with StateManager("127.0.0.1:1") as manager:
        for attempt in (
            lambda: manager.create_snapshot("one"),
            lambda: manager.restore_vm(rig.one.snapshot_id, "", target=rig.target),
            lambda: manager.retrieve_application_data(rig.storage_id),
        ):
            check(rig, attempt, ErrorCode.UNREACHABLE, "127.0.0.1:1")


@pytest.mark.parametrize("address", ["nowhere", "host:port", "", "127.0.0.1:70000", "192.0.2.1:7400"])
def test_an_address_that_is_none_or_would_be_plain_text_to_another_machine(address: str) -> None:
    def attempt() -> None:
        with StateManager(address) as manager:
            manager.cluster_status()

    assert error_of(attempt).code is ErrorCode.INVALID_ARGUMENT
