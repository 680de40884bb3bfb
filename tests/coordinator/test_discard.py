"""Discarding a VM: what goes, what must be kept first, and that it ends once however often it is interrupted."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

import holdfast_coordinator.discard
from holdfast_coordinator.keyspace import TenantKeyspace
from holdfast_core.model.audit.record import AuditRecord
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import KEEP_RULES_MAX
from holdfast_core.runtime.clock import ManualClock, SystemClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import MetadataStore, Put
from holdfast_proto.v1 import state_pb2
from holdfast_proto.v1.records_pb2 import OBJECT_FORM_FILES, OBJECT_FORM_UNSPECIFIED, PointRecord
from holdfast_proto.v1.tenants_pb2 import Usage
from tests.coordinator.content import Cluster, cluster, put, random_blocks, seal_object, seal_volume
from tests.coordinator.faults import Fault, FaultyStore
from tests.coordinator.lifecycle import discard, keys_about, origin_of, register, rule_of, store_files, vm_of
from tests.coordinator.rig import (
    BLOCK_BYTES,
    Client,
    coordinator,
    point_commit,
    records,
    refused,
    ring_of,
    zero_commit,
)

SPACE = TenantKeyspace(1)
# More calls than discarding makes; the test ends when the fault no longer strikes.
CALLS_MAX = 80


async def lineage(client: Client, vm_id: str = "vm-1", *, backups: int = 3) -> list[str]:
    """Make a snapshot and backups of it; return their ids."""
    made = [(await client.save(vm_id)).point_id]
    for _ in range(backups):
        made.append((await client.save(vm_id, incremental=True, snapshot_id=made[0])).point_id)
    return made


async def discardings(store: MetadataStore) -> list[AuditRecord]:
    """Return what the audit log has about discarding."""
    return [record for record in await records(store) if record.action == "vm.discard"]


async def usage_of(store: MetadataStore) -> Usage:
    """Return what the tenant has."""
    item = await store.get(SPACE.usage)
    assert item is not None
    return Usage.FromString(item.value)


async def test_a_discarded_vm_leaves_its_receipt_and_what_its_task_stored(client: Client, store: SqliteStore) -> None:
    rule = rule_of()
    await register(client, vm_of(keep=[rule], definition=b"<x/>", definition_name="x.xml"), replace=True)
    points = await lineage(client)
    await client.state("ForgetPoint", state_pb2.ForgetPointRequest(point_id=points[1]))
    plain = await store_files(client, None, form=OBJECT_FORM_UNSPECIFIED)
    kept = await store_files(client, origin_of(rule, points[-1]))
    receipt = await discard(client, points[-1], [plain, kept])
    assert (receipt.vm_id, receipt.point_count, receipt.newest_point_id) == ("vm-1", 3, points[-1])
    (told,) = receipt.kept
    assert (told.storage_id, told.task_id, told.keep_rule, told.point_id, told.file_count) == (
        *(kept, "task-1", "weights", points[-1]),
        3,
    )
    assert await keys_about(store, "vm-1", points) == []
    await refused(ErrorCode.NOT_FOUND, client.state("GetVm", state_pb2.GetVmRequest(vm_id="vm-1")))
    for point_id in points:
        await refused(ErrorCode.NOT_FOUND, client.state("GetPoint", state_pb2.GetPointRequest(point_id=point_id)))
    listed = (await client.state("ListObjects", state_pb2.ListObjectsRequest(task_id="task-1"))).objects
    assert {stored.storage_id for stored in listed} == {plain, kept}
    assert (await usage_of(store)).vms == 0
    (record,) = await discardings(store)
    assert (record.outcome, record.resource) == ("OK", "vm/vm-1")
    assert (record.details["points"], record.details["kept.1"]) == ("3", kept)


async def test_the_receipt_is_given_again_for_a_day_unless_the_name_is_taken(
    client: Client, store: SqliteStore, clock: ManualClock
) -> None:
    (point_id,) = await lineage(client, backups=0)
    receipt = await discard(client, point_id)
    assert receipt.discarded_unix_ms
    assert await discard(client, "") == receipt
    assert [record.outcome for record in await discardings(store)] == ["OK", "REPEATED"]
    clock.advance(86_400 + 60)
    await refused(ErrorCode.NOT_FOUND, discard(client, point_id))
    await client.register_vm("vm-2")
    assert (await discard(client, "", vm_id="vm-2")).point_count == 0
    await client.register_vm("vm-2")
    again = await client.save("vm-2")
    assert again.number == 1
    await refused(ErrorCode.CONFLICT, discard(client, "", vm_id="vm-2"))
    assert (await discard(client, again.point_id, vm_id="vm-2")).point_count == 1
    await refused(ErrorCode.NOT_FOUND, discard(client, "", vm_id="vm-3"))


async def test_a_vm_is_not_discarded_before_what_it_must_keep_is_stored(client: Client, store: SqliteStore) -> None:
    weights, logs = rule_of(), rule_of("logs", task_id="task-2", include=["/var/log/**"])
    await register(client, vm_of(keep=[weights, logs]), replace=True)
    first, newest = await lineage(client, backups=1)
    await client.register_vm("vm-2")
    good = await store_files(client, origin_of(weights, newest))
    wrong = [
        await store_files(client, origin_of(logs, first), "task-2"),
        await store_files(client, origin_of(logs, newest, vm_id="vm-2"), "task-2"),
        await store_files(client, origin_of(logs, newest), "task-1"),
        await store_files(client, origin_of(logs, newest, keep_rule="weights"), "task-2"),
        await store_files(client, origin_of(rule_of("logs", task_id="task-2"), newest), "task-2"),
        await store_files(client, None, "task-2", form=OBJECT_FORM_FILES),
        await store_files(client, origin_of(logs, newest, file_count=0), "task-2"),
        "app-unknown",
    ]
    before = await keys_about(store, "vm-1", [first, newest])
    for named in ([], wrong, [good, *wrong]):
        error = await refused(ErrorCode.CONFLICT, discard(client, newest, named))
        assert "logs: no object of the task task-2" in error.message
        assert ("weights: " in error.message) == (good not in named)
        assert error.facts["missing"] == ("logs" if good in named else "logs,weights")
    await refused(ErrorCode.CONFLICT, discard(client, first, [good]))
    await refused(ErrorCode.CONFLICT, discard(client, "", [good]))
    await refused(ErrorCode.LIMIT_EXCEEDED, discard(client, newest, [good] * (KEEP_RULES_MAX + 1)))
    assert await keys_about(store, "vm-1", [first, newest]) == before
    right = await store_files(client, origin_of(logs, newest), "task-2")
    # A point since then: its files may be others.
    later = await client.save(incremental=True, snapshot_id=first)
    await refused(ErrorCode.CONFLICT, discard(client, newest, [good, right]))
    await refused(ErrorCode.CONFLICT, discard(client, later.point_id, [good, right]))
    await client.state("ForgetPoint", state_pb2.ForgetPointRequest(point_id=later.point_id))
    receipt = await discard(client, newest, [*wrong, good, right])
    assert [kept.storage_id for kept in receipt.kept] == [right, good]


async def test_a_vm_without_any_point_has_nothing_to_keep_from(client: Client) -> None:
    rule = rule_of()
    await register(client, vm_of(keep=[rule]), replace=True)
    stored = await store_files(client, origin_of(rule, "snap-x"))
    await refused(ErrorCode.CONFLICT, discard(client, "", [stored]))
    await client.register_vm(replace=True)
    assert (await discard(client, "")).point_count == 0


async def test_a_vm_is_not_discarded_while_a_session_holds_it(client: Client, clock: ManualClock) -> None:
    point = await client.save()
    begun = await client.begin()
    error = await refused(ErrorCode.BUSY, discard(client, point.point_id))
    assert error.facts["session_id"] == begun.session_id
    clock.advance(60)
    assert (await discard(client, point.point_id)).point_count == 1
    await refused(ErrorCode.SESSION_LAPSED, client.commit(zero_commit(begun)))


async def test_the_base_of_an_open_session_may_be_discarded(client: Client) -> None:
    template = await client.save()
    await register(client, vm_of("vm-2", template_id=template.point_id))
    begun = await client.begin("vm-2", nonce=bytes(16))
    assert begun.base.point_id == template.point_id
    await discard(client, template.point_id)
    resumed = await client.begin("vm-2", nonce=bytes(16))
    assert resumed.session_id == begun.session_id
    assert not resumed.HasField("base")
    assert (await client.commit(zero_commit(begun))).vm_id == "vm-2"


async def test_who_discards_must_see_what_is_kept(client: Client) -> None:
    rule = rule_of()
    await register(client, vm_of(keep=[rule]), replace=True)
    point = await client.save()
    stored = await store_files(client, origin_of(rule, point.point_id))
    agent = Client(client.address, token=await client.new_token("agent"))
    try:
        await client.bind(("agent", "discarder", "vm/*"), roles={"discarder": ["vm.discard"]})
        error = await refused(ErrorCode.DENIED, discard(agent, point.point_id, [stored]))
        assert "app.list on task/task-1" in error.message
        held = (("agent", "discarder", "vm/*"), ("agent", "app-reader", "task/task-1"))
        await client.bind(*held, roles={"discarder": ["vm.discard"]})
        assert (await discard(agent, point.point_id, [stored])).point_count == 1
    finally:
        await agent.close()


@pytest.mark.slow
@pytest.mark.parametrize("fault", list(Fault))
async def test_discarding_that_is_interrupted_anywhere_goes_on_and_ends_once(
    store: SqliteStore, clock: ManualClock, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holdfast_coordinator.discard, "POINTS_PER_TXN", 2)
    faults = FaultyStore(store)
    async with coordinator(faults, clock=clock) as failing, coordinator(store, clock=clock, seed=2) as healthy:
        await healthy.form_layout()
        await failing.form_layout()
        marked = 0
        for at in range(CALLS_MAX):
            vm_id, rule = f"vm-{at}", rule_of()
            await register(healthy, vm_of(vm_id, keep=[rule], definition=b"<x/>", definition_name="x.xml"))
            points = await lineage(healthy, vm_id, backups=4)
            await healthy.state("ForgetPoint", state_pb2.ForgetPointRequest(point_id=points[1]))
            await charge(store, vm_id, 10)
            kept = await store_files(healthy, origin_of(rule, points[-1], vm_id))
            faults.arm(fault, at=at)
            try:
                receipt = await discard(failing, points[-1], [kept], vm_id)
            except HoldfastError as error:
                # A dead process answers nothing; here its last breath arrives as INTERNAL.
                if error.code not in (ErrorCode.INTERNAL, ErrorCode.UNREACHABLE):
                    raise
                marked += await half_done(healthy, store, vm_id, points)
                receipt = await discard(healthy, points[-1], [kept], vm_id)
            struck = faults.struck
            faults.arm(None)
            assert (receipt.point_count, receipt.released_bytes) == (4, 40)
            assert [each.storage_id for each in receipt.kept] == [kept]
            assert await discard(failing, "", vm_id=vm_id) == receipt
            assert await keys_about(store, vm_id, points) == []
            ended = [r for r in await discardings(store) if r.details.get("step") == "end" and r.outcome == "OK"]
            assert [r.resource for r in ended] == [f"vm/vm-{n}" for n in range(at + 1)]
            if not struck:
                break
        assert 15 < at < CALLS_MAX - 1
        assert marked > 3
        lines = [record.entry_id for record in await discardings(store) if record.outcome == "OK"]
        assert len(set(lines)) == len(lines)


async def half_done(client: Client, store: MetadataStore, vm_id: str, points: list[str]) -> bool:
    """Check what an interrupted discarding left, if it had begun; return whether it is half done."""
    item = await store.get(SPACE.vm(vm_id))
    if item is None:
        return False
    vm = (await client.state("GetVm", state_pb2.GetVmRequest(vm_id=vm_id))).vm
    if not vm.discarding_unix_ms:
        assert len(await client.points(vm_id)) == 4
        return False
    # What keep rules are fulfilled from is there to the last, and can be read.
    listed = await client.points(vm_id)
    assert listed[-1].point_id == points[-1]
    await client.state("ResolvePoint", state_pb2.ResolvePointRequest(snapshot_id=points[-1]))
    await refused(ErrorCode.CONFLICT, client.begin(vm_id))
    await refused(ErrorCode.CONFLICT, register(client, vm_of(vm_id), replace=True))
    return True


async def charge(store: MetadataStore, vm_id: str, amount: int) -> None:
    """Charge each living point of a VM with so many bytes."""
    for item in (await store.snapshot([SPACE.points_of(vm_id)])).items:
        point = PointRecord.FromString(item.value)
        if not point.forgotten:
            point.charged_bytes = amount
            await store.txn([], [Put(item.key, point.SerializeToString())])


async def test_many_points_go_in_portions_each_with_its_record(client: Client, store: SqliteStore) -> None:
    points = await lineage(client, backups=70)
    receipt = await discard(client, points[-1])
    assert receipt.point_count == 71
    made = await discardings(store)
    assert [(r.details["step"], r.details.get("left")) for r in made] == [
        *(("points", "48"), ("points", "25"), ("points", "2")),
        ("end", None),
    ]
    assert await keys_about(store, "vm-1", points) == []


async def test_two_that_discard_and_one_that_saves_agree(
    client: Client, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holdfast_coordinator.discard, "POINTS_PER_TXN", 2)
    for turn in range(8):
        vm_id = f"race-{turn}"
        await client.register_vm(vm_id)
        points = await lineage(client, vm_id, backups=6)
        outcomes = await asyncio.gather(
            discard(client, points[-1], vm_id=vm_id),
            discard(client, points[-1], vm_id=vm_id),
            client.save(vm_id, incremental=True, snapshot_id=points[0]),
            return_exceptions=True,
        )
        unexpected = [o for o in outcomes if isinstance(o, BaseException) and not isinstance(o, HoldfastError)]
        assert unexpected == []
        receipts = [o for o in outcomes[:2] if not isinstance(o, BaseException)]
        saved = outcomes[2]
        if isinstance(saved, HoldfastError):
            # Discarding went first, and at least one of them ended it.
            assert saved.code in (ErrorCode.CONFLICT, ErrorCode.NOT_FOUND)
            assert receipts
            assert all(receipt == receipts[0] for receipt in receipts)
            assert receipts[0].point_count == 7
            assert await keys_about(store, vm_id, points) == []
        else:
            assert receipts == []
            assert len(await client.points(vm_id)) == 8


@pytest.fixture
async def running() -> AsyncIterator[Cluster]:
    """A cluster of three nodes in memory."""
    store = await SqliteStore.open(":memory:", SystemClock())
    try:
        async with cluster(store) as made:
            yield made
    finally:
        await store.close()


async def save(client: Client, slots: dict[int, bytes], vm_id: str, **fields: Any) -> PointRecord:
    """Make a point of these blocks and return it."""
    begun = await client.begin(vm_id, **fields)
    volume, sealed = seal_volume(ring_of(begun.grant.keys), slots, total=300)
    await put(begun.grant, sealed.everything)
    made: PointRecord = await client.commit(point_commit(begun, [volume]))
    return made


async def test_what_is_kept_must_be_durable_and_charges_are_given_back(running: Cluster) -> None:
    client, rule = running.client, rule_of()
    await register(client, vm_of("vm-9", keep=[rule]))
    snapshot = await save(client, random_blocks(1, range(40)), "vm-9")
    slots = random_blocks(1, range(40)) | random_blocks(2, range(50, 57))
    newest = await save(client, slots, "vm-9", incremental=True, snapshot_id=snapshot.point_id)
    begin = state_pb2.BeginObjectRequest(task_id="task-1", nonce=random.randbytes(16))
    begun = await client.state("BeginObject", begin)
    commit, sealed = seal_object(begun, "task-1", [bytes([n]) * 50 for n in range(5)])
    commit.form = OBJECT_FORM_FILES
    commit.origin.CopyFrom(origin_of(rule, newest.point_id, "vm-9"))
    await put(begun.grant, sealed.everything)
    await client.state("CommitObject", commit)
    before = await usage_of(running.store)
    await running.destroy(begun.grant, sealed.blocks[2].id)
    error = await refused(ErrorCode.CONFLICT, discard(client, newest.point_id, [begun.session_id], "vm-9"))
    assert "weights: " in error.message
    assert "not durable" in error.message
    assert len(await client.points("vm-9")) == 2
    # Brought back, it is as good as before.
    await put(begun.grant, [sealed.blocks[2]])
    receipt = await discard(client, newest.point_id, [begun.session_id], "vm-9")
    assert receipt.released_bytes == 47 * BLOCK_BYTES
    assert receipt.kept[0].durable_blocks == len(sealed.everything)
    after = await usage_of(running.store)
    assert (before.bytes - after.bytes, before.vms - after.vms) == (receipt.released_bytes, 1)
    assert after.objects == before.objects
