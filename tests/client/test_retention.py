"""Locks and rules through the SDK, blocking and not."""

from __future__ import annotations

import datetime

from holdfast import AsyncStateManager, ErrorCode, RetentionRules, StateManager
from holdfast.testing import MemoryCluster
from tests.client.rig import Vm, error_of

DAY = datetime.timedelta(days=1)


def test_locks_and_rules(manager: StateManager, vm: Vm) -> None:
    vm.volume(4096)
    vm.register()
    snapshot = vm.snapshot()
    backups = [manager.incremental_backup(vm.name, snapshot) for _ in range(2)]
    now = datetime.datetime.now(datetime.UTC)
    lock = manager.lock(snapshot, DAY)
    assert abs(lock.until_unix_ms / 1000 - (now + DAY).timestamp()) < 60
    assert manager.lock(snapshot, DAY / 2).until_unix_ms == lock.until_unix_ms
    assert manager.point(snapshot).lock == lock
    assert [point.lock for point in manager.points(vm.name)] == [lock, None, None]
    assert error_of(lambda: manager.forget(snapshot)).code is ErrorCode.CONFLICT
    manager.set_retention(vm.name, RetentionRules(keep_last=1))
    assert manager.vm(vm.name).retention == RetentionRules(keep_last=1)
    vm.register()
    assert manager.vm(vm.name).retention == RetentionRules(keep_last=1)
    told = manager.apply_retention(vm.name)
    assert [(point.point_id, point.forgotten) for point in told] == [
        *((backups[1], False), (backups[0], True), (snapshot, False))
    ]
    manager.unlock(snapshot)
    assert manager.point(snapshot).lock is None
    assert [point.forgotten for point in manager.apply_retention(vm.name)] == [False, True]
    manager.set_retention(vm.name, None)
    assert manager.vm(vm.name).retention is None


def test_ends_and_rules_that_make_no_sense(manager: StateManager, vm: Vm) -> None:
    vm.volume(4096)
    vm.register()
    snapshot = vm.snapshot()
    naive = datetime.datetime(2031, 1, 1)  # noqa: DTZ001  # what is refused
    assert error_of(lambda: manager.lock(snapshot, naive)).code is ErrorCode.INVALID_ARGUMENT
    for until in (-DAY, -DAY * 365 * 100):
        assert error_of(lambda until=until: manager.lock(snapshot, until)).code is ErrorCode.INVALID_ARGUMENT  # type: ignore[misc]
    assert error_of(lambda: manager.lock(snapshot, DAY * 366 * 101)).code is ErrorCode.LIMIT_EXCEEDED
    for rules, code in (
        (RetentionRules(), ErrorCode.INVALID_ARGUMENT),
        (RetentionRules(keep_last=-1), ErrorCode.LIMIT_EXCEEDED),
        (RetentionRules(keep_daily=1 << 40), ErrorCode.LIMIT_EXCEEDED),
    ):
        assert error_of(lambda rules=rules: manager.set_retention(vm.name, rules)).code is code  # type: ignore[misc]
        assert error_of(lambda rules=rules: manager.apply_retention(vm.name, rules=rules)).code is code  # type: ignore[misc]


async def test_without_blocking(shared_cluster: MemoryCluster, vm: Vm) -> None:
    vm.volume(4096)
    vm.register()
    snapshot = vm.snapshot()
    async with AsyncStateManager(shared_cluster.coordinator_address, token=shared_cluster.token) as manager:
        lock = await manager.lock(snapshot, datetime.datetime(2031, 1, 1, tzinfo=datetime.UTC))
        assert lock.until_unix_ms == 1_924_992_000_000
        await manager.set_retention(vm.name, RetentionRules(keep_weekly=2))
        assert len(await manager.apply_retention(vm.name, dry_run=True)) == 1
        await manager.unlock(snapshot)
