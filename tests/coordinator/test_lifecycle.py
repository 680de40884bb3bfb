"""What a VM carries beside its volumes: labels, a definition, a template and keep rules, and what points take of it."""

from __future__ import annotations

from typing import Any

import pytest

import holdfast_coordinator.vms
from holdfast_coordinator.keyspace import TenantKeyspace
from holdfast_core.model.errors import ErrorCode
from holdfast_core.model.limits import DEFINITION_BYTES_MAX, KEEP_RULES_MAX, LABELS_MAX
from holdfast_core.runtime.clock import ManualClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import Put
from holdfast_proto.v1 import state_pb2
from holdfast_proto.v1.records_pb2 import (
    OBJECT_FORM_UNSPECIFIED,
    READING_CHANGED,
    READING_COMPARED,
    Label,
    ObjectOrigin,
    VmRecord,
)
from tests.coordinator.lifecycle import keys_about, origin_of, register, rule_of, store_files, vm_of
from tests.coordinator.rig import Client, point_commit, refused, zero_commit, zero_volume

LABELS = [Label(name="task", value="train"), Label(name="owner", value="Zoë of team 7")]
DEFINITION = b"<domain type='kvm'/>\n"


def whole_vm(**fields: Any) -> VmRecord:
    """Return a registration with a bit of everything."""
    return vm_of(labels=LABELS, definition=DEFINITION, definition_name="domain.xml", keep=[rule_of()], **fields)


async def got(client: Client, vm_id: str = "vm-1") -> VmRecord:
    """Ask for one VM."""
    vm: VmRecord = (await client.state("GetVm", state_pb2.GetVmRequest(vm_id=vm_id))).vm
    return vm


async def point_of(client: Client, point_id: str) -> Any:
    """Ask for one point."""
    return (await client.state("GetPoint", state_pb2.GetPointRequest(point_id=point_id))).point


async def test_a_registration_is_kept_whole_and_repeated_without_change(client: Client) -> None:
    made = await register(client, whole_vm())
    assert [label.name for label in made.labels] == ["owner", "task"]
    assert (made.definition, made.definition_name) == (DEFINITION, "domain.xml")
    assert list(made.keep) == [rule_of()]
    assert await register(client, whole_vm()) == made == await got(client)
    await refused(ErrorCode.ALREADY_EXISTS, register(client, vm_of()))
    for change in ({"definition": b"<other/>"}, {"labels": LABELS[:1]}, {"keep": [rule_of(partition=2)]}):
        changed = whole_vm()
        for name, value in change.items():
            changed.ClearField(name)  # type: ignore[arg-type]
            changed.MergeFrom(VmRecord(**{name: value}))  # type: ignore[arg-type]
        await refused(ErrorCode.ALREADY_EXISTS, register(client, changed))
    # Replacing is of the whole: what is not said again is gone.
    await register(client, vm_of(), replace=True)
    bare = await got(client)
    assert (list(bare.labels), bare.definition, bare.definition_name, list(bare.keep)) == ([], b"", "", [])
    assert bare.created_unix_ms == made.created_unix_ms


async def test_lists_leave_definitions_out(client: Client) -> None:
    await register(client, whole_vm())
    (listed,) = (await client.state("ListVms", state_pb2.ListVmsRequest())).vms
    assert (listed.definition, listed.definition_name) == (b"", "domain.xml")
    point = await client.save()
    assert [(p.definition, p.definition_name) for p in await client.points()] == [(b"", "domain.xml")]
    resolved = await client.state("ResolvePoint", state_pb2.ResolvePointRequest(snapshot_id=point.point_id))
    assert resolved.point.definition == DEFINITION


@pytest.mark.parametrize(
    ("code", "fields"),
    [
        (ErrorCode.INVALID_ARGUMENT, {"labels": [Label(name="a/b", value="x")]}),
        (ErrorCode.INVALID_ARGUMENT, {"labels": [Label(name="a", value="x"), Label(name="a", value="y")]}),
        (ErrorCode.INVALID_ARGUMENT, {"labels": [Label(name="a", value="two\nlines")]}),
        (ErrorCode.INVALID_ARGUMENT, {"labels": [Label(name="a", value="x" * 257)]}),
        (ErrorCode.LIMIT_EXCEEDED, {"labels": [Label(name=f"n{n}", value="") for n in range(LABELS_MAX + 1)]}),
        (ErrorCode.LIMIT_EXCEEDED, {"labels": [Label(name=f"n{n}", value="x" * 200) for n in range(30)]}),
        (ErrorCode.INVALID_ARGUMENT, {"definition": b"x"}),
        (ErrorCode.INVALID_ARGUMENT, {"definition_name": "domain.xml"}),
        *(
            (ErrorCode.INVALID_ARGUMENT, {"definition": b"x", "definition_name": name})
            for name in ("../x", "a/b", ".hidden", "root.raw", "Root.QCOW2", "x.partial", "vm.json", "VM.JSON")
        ),
        (ErrorCode.LIMIT_EXCEEDED, {"definition": bytes(DEFINITION_BYTES_MAX + 1), "definition_name": "d"}),
        (ErrorCode.INVALID_ARGUMENT, {"template_id": "../x"}),
        (ErrorCode.NOT_FOUND, {"template_id": "snap-unknown"}),
        (ErrorCode.INVALID_ARGUMENT, {"keep": [rule_of(""), rule_of("b")]}),
        (ErrorCode.INVALID_ARGUMENT, {"keep": [rule_of(), rule_of(task_id="task-2")]}),
        (ErrorCode.INVALID_ARGUMENT, {"keep": [rule_of(volume="data")]}),
        (ErrorCode.INVALID_ARGUMENT, {"keep": [rule_of(task_id="")]}),
        (ErrorCode.INVALID_ARGUMENT, {"keep": [rule_of(include=[])]}),
        (ErrorCode.INVALID_ARGUMENT, {"keep": [rule_of(include=[""])]}),
        (ErrorCode.INVALID_ARGUMENT, {"keep": [rule_of(exclude=["a\0b"])]}),
        (ErrorCode.INVALID_ARGUMENT, {"keep": [rule_of(include=["a[b"])]}),
        (ErrorCode.INVALID_ARGUMENT, {"keep": [rule_of(exclude=["ends in \\"])]}),
        (ErrorCode.INVALID_ARGUMENT, {"keep": [rule_of(partition=5000)]}),
        (ErrorCode.LIMIT_EXCEEDED, {"keep": [rule_of(f"r{n}") for n in range(KEEP_RULES_MAX + 1)]}),
        (ErrorCode.LIMIT_EXCEEDED, {"keep": [rule_of(include=["x" * 1000] * 9)]}),
    ],
)
async def test_what_a_vm_may_not_carry(client: Client, code: ErrorCode, fields: dict[str, Any]) -> None:
    await refused(code, register(client, vm_of(**fields)))
    await refused(ErrorCode.NOT_FOUND, got(client, "vm-1"))


@pytest.fixture
async def client(client: Client) -> Client:
    """Return a client of a cluster without VMs."""
    await client.state("DiscardVm", state_pb2.DiscardVmRequest(vm_id="vm-1"))
    return client


async def test_a_point_keeps_what_its_vm_carried_when_it_began(client: Client, store: SqliteStore) -> None:
    await register(client, whole_vm())
    begun = await client.begin()
    await register(client, vm_of(labels=[Label(name="task", value="later")]), replace=True)
    made = await client.commit(zero_commit(begun))
    later = await client.save()
    first = await point_of(client, made.point_id)
    assert {label.name: label.value for label in first.labels} == {label.name: label.value for label in LABELS}
    assert (first.definition, first.definition_name) == (DEFINITION, "domain.xml")
    second = await point_of(client, later.point_id)
    assert [label.value for label in second.labels] == ["later"]
    assert (second.definition, second.definition_name) == (b"", "")
    await client.state("ForgetPoint", state_pb2.ForgetPointRequest(point_id=made.point_id))
    assert not (await point_of(client, made.point_id)).labels
    space = TenantKeyspace(1)
    assert await store.get(space.point_definition(made.point_id)) is None


async def test_a_session_that_ends_leaves_no_definition(client: Client, store: SqliteStore, clock: ManualClock) -> None:
    await register(client, whole_vm())
    aborted, lapsed = await client.begin(), None
    await client.state("AbortSession", state_pb2.AbortSessionRequest(session_id=aborted.session_id))
    lapsed = await client.begin()
    clock.advance(60)
    await client.begin()
    assert await keys_about(store, "none", [aborted.session_id, lapsed.session_id]) == []


async def test_a_snapshot_takes_the_template_as_its_base_while_that_lives(client: Client) -> None:
    await client.register_vm("golden")
    template = await client.save("golden")
    await register(client, vm_of(template_id=template.point_id))
    begun = await client.begin()
    assert begun.base.point_id == template.point_id
    snapshot = await client.commit(zero_commit(begun))
    backup = await client.begin(incremental=True, snapshot_id=snapshot.point_id)
    assert not backup.HasField("base")
    await client.commit(zero_commit(backup))
    # Another base that is named goes before it.
    named = await client.begin(base_id=snapshot.point_id)
    assert named.base.point_id == snapshot.point_id
    await client.commit(zero_commit(named))
    await client.state("ForgetPoint", state_pb2.ForgetPointRequest(point_id=template.point_id))
    without = await client.begin()
    assert not without.HasField("base")
    assert without.vm.template_id == template.point_id
    await client.commit(zero_commit(without))
    # The registration stands, but no new one may take a template that is gone.
    await register(client, vm_of(template_id=template.point_id))
    await refused(ErrorCode.NOT_FOUND, register(client, vm_of("vm-2", template_id=template.point_id)))


async def test_a_template_is_taken_by_who_may_list_its_points(client: Client) -> None:
    await client.register_vm("golden")
    template = await client.save("golden")
    agent = Client(client.address, token=await client.new_token("agent"))
    try:
        await client.bind(("agent", "backup-writer", "vm/vm-1"))
        error = await refused(ErrorCode.DENIED, register(agent, vm_of(template_id=template.point_id)))
        assert "point.list on vm/golden" in error.message
        await register(client, vm_of(template_id=template.point_id))
        # Who may not see it works without it: that saves nothing but hashing and comparing.
        begun = await agent.begin()
        assert not begun.HasField("base")
        await agent.commit(zero_commit(begun))
        await client.bind(("agent", "backup-writer", "vm/vm-1"), ("agent", "auditor", "vm/golden"))
        assert (await agent.begin()).base.point_id == template.point_id
    finally:
        await agent.close()


async def test_a_page_of_vms_holds_what_an_answer_holds(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holdfast_coordinator.vms, "ANSWER_BYTES_MAX", 700)
    names = [f"large-{number}" for number in range(5)]
    for name in names:
        await register(client, vm_of(name, labels=[Label(name="a", value="x" * 250)]))
    seen: list[list[str]] = []
    more = True
    while more:
        after = seen[-1][-1] if seen else ""
        answer = await client.state("ListVms", state_pb2.ListVmsRequest(after=after))
        seen.append([vm.vm_id for vm in answer.vms])
        more = answer.more
    assert seen == [names[:2], names[2:4], names[4:]]


async def test_records_of_before_work_on(client: Client, store: SqliteStore) -> None:
    """As an earlier version wrote them: no labels, no definition, and no key beside the record."""
    await client.register_vm()
    old = await client.save()
    key = TenantKeyspace(1).vm("vm-1")
    item = await store.get(key)
    assert item is not None
    assert VmRecord.FromString(item.value) == await got(client)
    await store.txn([], [Put(key, item.value)])
    made = await client.save(incremental=True, snapshot_id=old.point_id)
    assert (made.parent_id, list(made.labels), made.definition_name) == (old.point_id, [], "")


async def test_an_object_says_what_it_is_and_where_it_comes_from(client: Client) -> None:
    await client.register_vm()
    origin = origin_of(rule_of(), "snap-x")
    storage_id = await store_files(client, origin)
    (stored,) = (await client.state("ListObjects", state_pb2.ListObjectsRequest(task_id="task-1"))).objects
    assert (stored.storage_id, stored.origin) == (storage_id, origin)
    plain = await store_files(client, None, form=OBJECT_FORM_UNSPECIFIED)
    answer = await client.state("ResolveObject", state_pb2.ResolveObjectRequest(storage_id=plain))
    assert not answer.object.HasField("origin")
    for form, wrong in (
        (OBJECT_FORM_UNSPECIFIED, origin),
        (9, origin),
        (1, origin_of(rule_of(), "")),
        (1, origin_of(rule_of(), "snap-x", keep_digest=b"")),
        (1, origin_of(rule_of(), "snap-x", keep_digest=bytes(31))),
        (1, origin_of(rule_of(), "snap-x", vm_id="")),
        (1, origin_of(rule_of(), "snap-x", volume="a/b")),
        (1, ObjectOrigin(keep_rule="weights", keep_digest=bytes(32))),
    ):
        await refused(ErrorCode.INVALID_ARGUMENT, store_files(client, wrong, form=form))


async def test_how_volumes_were_read_is_kept_and_counted(client: Client) -> None:
    await client.register_vm()
    begun = await client.begin()
    volume = zero_volume()
    volume.reading, volume.reading_note = READING_COMPARED, "the bitmap holdfast-x is gone"
    made = await client.commit(point_commit(begun, [volume]))
    assert (made.volumes[0].reading, made.volumes[0].reading_note) == (volume.reading, volume.reading_note)
    begun = await client.begin()
    for wrong in ({"reading": 99}, {"reading": READING_CHANGED, "reading_note": "x" * 257}):
        volume = zero_volume()
        for name, value in wrong.items():
            setattr(volume, name, value)
        await refused(ErrorCode.INVALID_ARGUMENT, client.commit(point_commit(begun, [volume])))
