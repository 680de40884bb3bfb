"""Rules of retention: set apart from registering, applied by a call or by the coordinator, never to the last point."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

import holdfast_coordinator.retention_duty
from holdfast_coordinator.bootstrap import ClusterOptions
from holdfast_coordinator.coordinator import Coordinator, CoordinatorSettings
from holdfast_coordinator.retention_duty import RetentionDuty
from holdfast_core.model.errors import ErrorCode
from holdfast_core.model.retention import NEWEST, NO_RULES
from holdfast_core.runtime.clock import ManualClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_proto.v1 import state_pb2
from holdfast_proto.v1.records_pb2 import RetentionRules
from tests.coordinator.faults import FaultyStore
from tests.coordinator.lifecycle import discard, register, vm_of
from tests.coordinator.rig import STATIC_TOKENS, Client, coordinator, master_keys, records, refused
from tests.coordinator.test_discard import lineage
from tests.coordinator.test_locks import forget, lock

DAY_S = 86_400
RULES = RetentionRules(keep_last=2)


async def set_rules(client: Client, rules: RetentionRules | None, vm_id: str = "vm-1") -> None:
    """Set or remove a VM's rules."""
    await client.state("SetRetention", state_pb2.SetRetentionRequest(vm_id=vm_id, rules=rules))


async def apply(client: Client, vm_id: str = "vm-1", **fields: Any) -> dict[str, tuple[list[str], bool]]:
    """Apply rules; return reasons, and whether it was forgotten, by point id."""
    answer = await client.state("ApplyRetention", state_pb2.ApplyRetentionRequest(vm_id=vm_id, **fields))
    return {point.point_id: (list(point.reasons), point.forgotten) for point in answer.points}


async def living(client: Client, vm_id: str = "vm-1") -> list[str]:
    """Ids of a VM's living points, oldest first."""
    return [point.point_id for point in await client.points(vm_id)]


async def test_a_vm_without_rules_keeps_everything(client: Client) -> None:
    points = await lineage(client)
    told = await apply(client)
    assert [reasons for reasons, _ in told.values()] == [[NO_RULES, NEWEST], *[[NO_RULES]] * 3]
    assert await living(client) == points


async def test_rules_are_applied_and_tell_why(client: Client, store: SqliteStore) -> None:
    points = await lineage(client, backups=5)
    await set_rules(client, RULES)
    tried = await apply(client, dry_run=True)
    assert await living(client) == points
    done = await apply(client)
    assert {point: reasons for point, (reasons, _) in tried.items()} == {
        point: reasons for point, (reasons, _) in done.items()
    }
    assert list(done) == points[::-1]
    assert done[points[5]] == (["last 1", NEWEST], False)
    assert done[points[4]] == (["last 2"], False)
    assert [done[point] for point in points[:4]] == [([], True)] * 4
    assert await living(client) == points[4:]
    assert await apply(client) == {points[5]: (["last 1", NEWEST], False), points[4]: (["last 2"], False)}
    made = [record for record in await records(store) if record.action == "point.forget" and "point" in record.details]
    assert [(r.details["point"], r.details["rules"], r.principal, r.outcome) for r in made] == [
        (point, "keep-last 2", "admin", "OK") for point in points[:4]
    ]


async def test_rules_of_a_call_do_not_become_the_vms(client: Client) -> None:
    points = await lineage(client, backups=3)
    await apply(client, rules=RetentionRules(keep_last=3))
    assert await living(client) == points[1:]
    await apply(client)
    assert await living(client) == points[1:]
    await refused(ErrorCode.INVALID_ARGUMENT, apply(client, rules=RetentionRules()))
    await refused(ErrorCode.INVALID_ARGUMENT, set_rules(client, RetentionRules()))
    await refused(ErrorCode.LIMIT_EXCEEDED, set_rules(client, RetentionRules(keep_daily=1 << 31)))
    await refused(ErrorCode.NOT_FOUND, apply(client, "vm-9"))
    await refused(ErrorCode.NOT_FOUND, set_rules(client, RULES, "vm-9"))
    assert await living(client) == points[1:]


async def test_what_is_locked_a_template_or_built_on_stays(client: Client, clock: ManualClock) -> None:
    points = await lineage(client, backups=4)
    await lock(client, points[0], clock.now_unix_ms() + 1000 * DAY_S)
    await register(client, vm_of("vm-2", template_id=points[1]))
    await client.begin(incremental=True, snapshot_id=points[0], parent_id=points[2])
    told = await apply(client, rules=RetentionRules(keep_last=1))
    assert {point: reasons for point, (reasons, _) in told.items()} == {
        points[4]: ["last 1", NEWEST],
        points[3]: [],
        points[2]: ["parent of an open session"],
        points[1]: ["template of vm-2"],
        points[0]: ["locked until 2023-11-15 22:13:20Z"],
    }
    assert await living(client) == [*points[:3], points[4]]
    clock.advance(DAY_S + 1)
    told = await apply(client, rules=RetentionRules(keep_last=1))
    assert [point for point, (_, forgotten) in told.items() if forgotten] == [points[2], points[0]]


async def test_registering_neither_loses_nor_sets_rules(client: Client) -> None:
    await register(client, vm_of("vm-5"))
    await set_rules(client, RULES, "vm-5")
    again = await register(client, vm_of("vm-5"))
    assert again.retention == RULES
    replaced = await register(client, vm_of("vm-5", definition=b"<x/>", definition_name="x.xml"), replace=True)
    assert replaced.retention == RULES
    shown = (await client.state("GetVm", state_pb2.GetVmRequest(vm_id="vm-5"))).vm
    assert (shown.retention, shown.definition) == (RULES, b"<x/>")
    assert (await register(client, shown)).retention == RULES
    await refused(
        ErrorCode.INVALID_ARGUMENT,
        register(client, vm_of("vm-5", retention=RetentionRules(keep_last=1)), replace=True),
    )
    await refused(ErrorCode.INVALID_ARGUMENT, register(client, vm_of("vm-6", retention=RULES)))
    await set_rules(client, None, "vm-5")
    assert not (await client.state("GetVm", state_pb2.GetVmRequest(vm_id="vm-5"))).vm.HasField("retention")
    await set_rules(client, RULES, "vm-5")
    await discard(client, "", vm_id="vm-5")
    assert not (await register(client, vm_of("vm-5"))).HasField("retention")


@pytest.mark.parametrize("what", ["newest goes", "locked", "rules"])
async def test_what_changes_at_the_last_moment_is_planned_anew(
    store: SqliteStore, clock: ManualClock, what: str
) -> None:
    faults = FaultyStore(store)
    async with coordinator(faults, clock=clock) as client, coordinator(store, clock=clock, seed=2) as other:
        await client.form_layout()
        await client.register_vm()
        points = await lineage(client, backups=2)
        await set_rules(client, RetentionRules(keep_last=1))
        changes = {
            "newest goes": lambda: forget(other, points[2]),
            "locked": lambda: lock(other, points[0], clock.now_unix_ms() + 1000 * DAY_S),
            "rules": lambda: set_rules(other, None),
        }
        faults.before_next_commit(changes[what])
        await apply(client)
        assert await living(client) == {"newest goes": [points[1]], "locked": [points[0], points[2]]}.get(what, points)


@pytest.fixture
async def duty(store: SqliteStore, clock: ManualClock) -> AsyncIterator[tuple[Client, RetentionDuty]]:
    """A coordinator, and what its steward would run."""
    service = Coordinator(
        store,
        master=master_keys(),
        settings=CoordinatorSettings(
            options=ClusterOptions(nodes_expected=3, replicas=3, partitions=16), static_tokens=STATIC_TOKENS
        ),
        random_bytes=random.Random(1).randbytes,
        clock=clock,
    )
    client = Client(await service.start())
    try:
        await client.form_layout()
        assert service._parts is not None
        yield client, RetentionDuty(service._parts.tenants, random.Random(2).randbytes)
    finally:
        await client.close()
        await service.stop(0.2)


async def test_the_coordinator_applies_all_rules_and_the_log_says_so(
    duty: tuple[Client, RetentionDuty], store: SqliteStore
) -> None:
    client, retention = duty
    made = {}
    for vm_id in ("vm-1", "vm-2", "vm-3"):
        await client.register_vm(vm_id)
        made[vm_id] = await lineage(client, vm_id, backups=3)
    await set_rules(client, RULES, "vm-1")
    await set_rules(client, RetentionRules(keep_last=3), "vm-3")
    await retention.run()
    assert await living(client, "vm-1") == made["vm-1"][2:]
    assert await living(client, "vm-2") == made["vm-2"]
    assert await living(client, "vm-3") == made["vm-3"][1:]
    lines = [record for record in await records(store) if record.principal == "coordinator" and record.resource]
    assert [(r.action, r.tenant, r.resource, r.details) for r in lines if r.action == "point.forget"] == [
        ("point.forget", "default", "vm/vm-1", {"point": made["vm-1"][0], "rules": "keep-last 2"}),
        ("point.forget", "default", "vm/vm-1", {"point": made["vm-1"][1], "rules": "keep-last 2"}),
        ("point.forget", "default", "vm/vm-3", {"point": made["vm-3"][0], "rules": "keep-last 3"}),
    ]


async def test_a_round_is_bounded_and_the_next_one_goes_on_behind(
    duty: tuple[Client, RetentionDuty], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holdfast_coordinator.retention_duty, "FORGOTTEN_PER_RUN_MAX", 3)
    client, retention = duty
    for vm_id in ("vm-1", "vm-2"):
        await client.register_vm(vm_id)
        await lineage(client, vm_id, backups=4)
        await set_rules(client, RetentionRules(keep_last=1), vm_id)
    left = []
    for _ in range(4):
        await retention.run()
        left.append((len(await living(client, "vm-1")), len(await living(client, "vm-2"))))
    assert left == [(2, 5), (2, 2), (1, 1), (1, 1)]
