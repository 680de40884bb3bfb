"""The key service as administrators, tenants and everybody else meet it, and what the audit log keeps of it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from holdfast_core.model.audit.record import OK, REPEATED
from holdfast_core.model.errors import ErrorCode
from holdfast_core.model.keys import TenantSecrets, master_fingerprint
from holdfast_core.model.limits import SIGNING_KEY_SPREAD_S
from holdfast_core.runtime.clock import ManualClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import MetadataStore
from holdfast_proto.v1 import keys_pb2 as pb
from holdfast_proto.v1.keys_pb2_grpc import KeyServiceStub
from tests.coordinator.faults import Fault, FaultyStore
from tests.coordinator.rig import MASTER_KEY, Client, coordinator, records, refused, zero_commit


async def ask(client: Client, name: str, request: Any) -> Any:
    """Call a method of the key service."""
    return await client._call(getattr(KeyServiceStub(client._channel), name), request)


async def key_records(store: MetadataStore) -> list[tuple[str, str, str, dict[str, str]]]:
    """Action, resource, outcome and details of what the log says about keys."""
    return [
        (record.action, record.resource, record.outcome, dict(record.details))
        for record in await records(store)
        if record.action.startswith("keys.")
    ]


async def test_each_change_is_recorded_with_what_it_made(client: Client, store: SqliteStore) -> None:
    tenant = await ask(client, "RotateTenantKeys", pb.RotateTenantKeysRequest(data=True, after_data_epoch=1))
    again = await ask(client, "RotateTenantKeys", pb.RotateTenantKeysRequest(data=True, after_data_epoch=1))
    assert tenant == again == pb.RotateTenantKeysResponse(data_epoch=2, structure_epoch=1)
    signing = await ask(client, "RotateSigningKey", pb.RotateSigningKeyRequest(purpose="capability"))
    audit = await ask(client, "RotateSigningKey", pb.RotateSigningKeyRequest(purpose="audit"))
    rewrapped = await ask(client, "RewrapKeys", pb.RewrapKeysRequest())
    assert (rewrapped.rewrapped, rewrapped.master_fingerprint) == (0, master_fingerprint(MASTER_KEY))
    assert await key_records(store) == [
        ("keys.rotate", "tenant/default", OK, {"data_epoch": "2"}),
        ("keys.rotate", "tenant/default", REPEATED, {}),
        ("keys.admin", "cluster", OK, {"key_id": signing.key_id}),
        ("keys.rotate-audit", "cluster", OK, {"key_id": audit.key_id, "public_key": audit.public_key.hex()}),
        ("keys.admin", "cluster", REPEATED, {"master_key": master_fingerprint(MASTER_KEY).hex()}),
    ]


async def test_what_is_listed_identifies_keys_and_holds_none(client: Client, clock: ManualClock) -> None:
    first = await ask(client, "ListKeys", pb.ListKeysRequest())
    made = await ask(client, "RotateSigningKey", pb.RotateSigningKeyRequest(purpose="capability"))
    listed = await ask(client, "ListKeys", pb.ListKeysRequest())
    assert (list(listed.data_epochs), list(listed.structure_epochs)) == ([1], [1])
    assert dict(listed.wrapped_by) == {master_fingerprint(MASTER_KEY).hex(): 5}
    signs = [(key.key_id == made.key_id, key.signing) for key in listed.signing_keys if key.purpose == "capability"]
    assert signs == [(False, True), (True, False)]
    clock.advance(SIGNING_KEY_SPREAD_S)
    later = await ask(client, "ListKeys", pb.ListKeysRequest())
    assert [key.signing for key in later.signing_keys if key.purpose == "capability"] == [False, True]
    assert [key.purpose for key in first.signing_keys] == ["capability", "audit"]
    begun = await client.begin()
    shown = listed.SerializeToString()
    secrets = TenantSecrets.from_message(begun.grant.keys)
    for secret in (secrets.data_root, secrets.structure_root, *secrets.data_epochs.values(), MASTER_KEY):
        assert secret
        assert secret not in shown


async def test_a_session_keeps_the_epoch_of_its_begin(client: Client) -> None:
    begun = await client.begin()
    assert begun.key_epoch == 1
    await ask(client, "RotateTenantKeys", pb.RotateTenantKeysRequest(data=True, structure=True))
    await client.commit(zero_commit(begun))
    after = await client.begin()
    assert after.key_epoch == 2
    assert list(TenantSecrets.from_message(after.grant.keys).data_epochs) == [1, 2]
    await client.commit(zero_commit(after))


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        ("RotateTenantKeys", pb.RotateTenantKeysRequest()),
        ("RotateSigningKey", pb.RotateSigningKeyRequest()),
        ("RotateSigningKey", pb.RotateSigningKeyRequest(purpose="tenant")),
        ("RotateSigningKey", pb.RotateSigningKeyRequest(purpose="audit", retire_now=True)),
    ],
)
async def test_what_makes_no_sense_changes_nothing(client: Client, name: str, request_: Any) -> None:
    before = await ask(client, "ListKeys", pb.ListKeysRequest())
    await refused(ErrorCode.INVALID_ARGUMENT, ask(client, name, request_))
    assert await ask(client, "ListKeys", pb.ListKeysRequest()) == before


async def test_who_may_change_what(client: Client, store: SqliteStore) -> None:
    await client.bind(
        ("keeper", "key-keeper", "tenant/default"),
        ("elsewhere", "key-keeper", "tenant/other"),
        ("writer", "backup-writer", "*"),
        roles={"key-keeper": ["keys.rotate", "keys.admin"]},
    )
    people = {
        name: Client(client.address, token=await client.new_token(name)) for name in ("keeper", "elsewhere", "writer")
    }
    listed = await ask(people["keeper"], "ListKeys", pb.ListKeysRequest())
    assert list(listed.data_epochs) == [1]
    assert not listed.signing_keys, "what is the cluster's is shown to its administrators"
    assert not listed.wrapped_by
    assert not listed.master_fingerprint
    rotated = await ask(people["keeper"], "RotateTenantKeys", pb.RotateTenantKeysRequest(data=True))
    assert rotated.data_epoch == 2
    denied: list[tuple[str, str, Any]] = [
        ("keeper", "RotateSigningKey", pb.RotateSigningKeyRequest(purpose="capability")),
        ("keeper", "RewrapKeys", pb.RewrapKeysRequest()),
        *((name, "ListKeys", pb.ListKeysRequest()) for name in ("elsewhere", "writer")),
        *((name, "RotateTenantKeys", pb.RotateTenantKeysRequest(data=True)) for name in ("elsewhere", "writer")),
    ]
    before = len(await records(store))
    for name, method, request in denied:
        await refused(ErrorCode.DENIED, ask(people[name], method, request))
    told = (await records(store))[before:]
    assert [(record.principal, record.outcome) for record in told] == [(name, "DENIED") for name, _, _ in denied]
    for person in people.values():
        await person.close()


@pytest.mark.parametrize("fault", [Fault.LOST_BEFORE, Fault.LOST_AFTER])
async def test_a_rotation_that_is_sent_until_it_is_answered_happens_and_is_recorded_once(
    store: SqliteStore, clock: ManualClock, fault: Fault
) -> None:
    faults = FaultyStore(store)
    async with coordinator(faults, clock=clock) as client:
        for at in range(6):
            request = pb.RotateTenantKeysRequest(data=True, after_data_epoch=at + 1)
            faults.arm(fault, at=at)
            outcomes: list[Any] = list(
                await asyncio.gather(ask(client, "RotateTenantKeys", request), return_exceptions=True)
            )
            assert isinstance(outcomes[0], pb.RotateTenantKeysResponse) or outcomes[0].code is ErrorCode.UNREACHABLE
            faults.arm(None)
            assert (await ask(client, "RotateTenantKeys", request)).data_epoch == at + 2
        made = [details["data_epoch"] for _, _, outcome, details in await key_records(store) if outcome == OK]
        assert made == ["2", "3", "4", "5", "6", "7"]
