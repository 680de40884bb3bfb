"""Tokens, the policy and revoked certificates by RPC: at once here, soon there, once however often they are sent."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from holdfast_coordinator import keyspace
from holdfast_core.model.access.policy import DEFAULT_DOCUMENT
from holdfast_core.model.access.tokens import token_hash
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import POLICY_BYTES_MAX, TOKEN_TTL_S_MAX
from holdfast_core.runtime.clock import ManualClock, SystemClock
from holdfast_core.runtime.credentials import new_token, parse_token
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import Put
from holdfast_proto.v1 import access_pb2 as pb
from tests.coordinator.access_rig import ADMIN, Authority, Client, Rig, fingerprint, running
from tests.coordinator.faults import Fault, FaultyStore
from tests.coordinator.rig import eventually, refused
from tests.model.test_policy import MALFORMED

ADA = "spiffe://holdfast/admin/ada"
RESTORER = {"principal": "agent-7", "role": "restorer", "tenant": "default", "resource": "*"}


@pytest.fixture
async def rig(store: SqliteStore, clock: ManualClock) -> AsyncIterator[Rig]:
    async with running(store, clock) as rig:
        yield rig


@pytest.fixture
async def admin(rig: Rig) -> AsyncIterator[Client]:
    async with rig.client(ADMIN) as client:
        yield client


def document(*bindings: dict[str, str]) -> str:
    """A policy of bindings alone."""
    return json.dumps({"format": 1, "bindings": list(bindings)})


def asking(token: str, principal: str = "agent-7", ttl_s: int = 3600, **changes: Any) -> pb.CreateTokenRequest:
    """The request to keep a token that was drawn."""
    token_id, secret = parse_token(token)
    fields: dict[str, Any] = {
        "principal": principal,
        "ttl_s": ttl_s,
        "token_id": token_id,
        "secret_hash": token_hash(secret),
    }
    return pb.CreateTokenRequest(**(fields | changes))


async def principal_of(rig: Rig, token: str) -> str:
    """Whom the rig takes a token for."""
    async with rig.client(token) as client:
        return str((await client.call("WhoAmI")).principal)


async def test_a_token_is_good_at_once_and_kept_as_a_hash(rig: Rig, admin: Client, clock: ManualClock) -> None:
    token = new_token(random.randbytes)
    token_id, secret = parse_token(token)
    record = (await admin.call("CreateToken", asking(token))).record
    assert (record.principal, record.created_by, record.secret_hash) == ("agent-7", "admin", b"")
    assert (record.created_unix_ms, record.expires_unix_ms) == (clock.now_unix_ms(), clock.now_unix_ms() + 3_600_000)
    assert await principal_of(rig, token) == "agent-7"
    kept = b"".join(item.key.encode() + item.value for item in (await rig.store.snapshot([""])).items)
    assert token_id.encode() in kept
    for form in (secret, secret.hex().encode(), token.encode(), token.rpartition("_")[2].encode()):
        assert form not in kept
    listed = list((await admin.call("ListTokens")).tokens)
    assert listed == [record]
    await admin.call("RevokeToken", pb.RevokeTokenRequest(token_id=token_id))
    await refused(ErrorCode.UNAUTHENTICATED, principal_of(rig, token))
    await refused(ErrorCode.NOT_FOUND, admin.call("RevokeToken", pb.RevokeTokenRequest(token_id=token_id)))
    assert [(each.action, each.resource, each.outcome) for each in rig.ledger.records] == [
        *[("access.admin", "access", "OK")] * 3,
        ("access.admin", "access", "NOT_FOUND"),
    ]
    assert [each.details for each in rig.ledger.records] == [
        {"call": "CreateToken", "token": token_id, "for": "agent-7"},
        {"call": "ListTokens"},
        {"call": "RevokeToken", "token": token_id, "for": "agent-7"},
        {"call": "RevokeToken", "token": token_id},
    ]


async def test_a_token_that_is_asked_for_twice_is_made_once(rig: Rig, admin: Client) -> None:
    token = new_token(random.randbytes)
    first = await admin.call("CreateToken", asking(token))
    assert await admin.call("CreateToken", asking(token)) == first
    for changed in (asking(token, secret_hash=bytes(32)), asking(token, "agent-8"), asking(token, ttl_s=60)):
        await refused(ErrorCode.ALREADY_EXISTS, admin.call("CreateToken", changed))
    assert [each.outcome for each in rig.ledger.records] == ["OK", "REPEATED", *["ALREADY_EXISTS"] * 3]


@pytest.mark.parametrize(
    "change",
    [
        *[{"principal": each} for each in ("", "*", "a*", "a b", "a/b", "admin", "node", "coordinator", "x" * 257)],
        *[{"ttl_s": each} for each in (0, TOKEN_TTL_S_MAX + 1, 2**63)],
        *[{"token_id": each} for each in ("", "0" * 15, "0" * 17, "A" * 16, "../" + "0" * 13, "0" * 15 + "\n")],
        *[{"secret_hash": bytes(size)} for size in (0, 31, 33)],
    ],
)
async def test_malformed_tokens_are_refused(rig: Rig, admin: Client, change: dict[str, Any]) -> None:
    await refused(ErrorCode.INVALID_ARGUMENT, admin.call("CreateToken", asking(new_token(random.randbytes), **change)))
    assert not rig.view.tokens


async def test_tokens_that_ended_long_ago_are_swept(rig: Rig, admin: Client, clock: ManualClock) -> None:
    old, newer, newest = (new_token(random.randbytes) for _ in range(3))
    await admin.call("CreateToken", asking(old, ttl_s=60))
    clock.advance(6 * 86_400)
    await admin.call("CreateToken", asking(newer))
    assert len((await admin.call("ListTokens")).tokens) == 2
    clock.advance(2 * 86_400)
    await admin.call("CreateToken", asking(newest))
    left = {each.token_id for each in (await admin.call("ListTokens")).tokens}
    assert left == {parse_token(newer)[0], parse_token(newest)[0]}


async def test_there_is_a_bound_to_tokens(rig: Rig, admin: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast_coordinator.access.tokens.TOKENS_MAX", 1)
    monkeypatch.setattr("holdfast_coordinator.access.service.REVOKED_CERTIFICATES_MAX", 1)
    await admin.call("CreateToken", asking(new_token(random.randbytes)))
    await refused(ErrorCode.LIMIT_EXCEEDED, admin.call("CreateToken", asking(new_token(random.randbytes))))
    await admin.call("RevokeCertificate", pb.RevokeCertificateRequest(fingerprint=bytes(32)))
    again = pb.RevokeCertificateRequest(fingerprint=b"\1" * 32)
    await refused(ErrorCode.LIMIT_EXCEEDED, admin.call("RevokeCertificate", again))


async def test_the_policy_changes_as_a_whole_and_by_revision(rig: Rig, admin: Client) -> None:
    first = await admin.call("GetPolicy")
    assert (first.document, first.revision) == (DEFAULT_DOCUMENT, -1)
    wanted = document(RESTORER)
    set_at = (await admin.call("SetPolicy", pb.SetPolicyRequest(document=wanted, revision=-1))).revision
    assert await admin.call("GetPolicy") == pb.GetPolicyResponse(document=wanted, revision=set_at)
    again = await admin.call("SetPolicy", pb.SetPolicyRequest(document=wanted, revision=-1))
    assert again.revision == set_at, "the same request sent again"
    late = pb.SetPolicyRequest(document=document(), revision=-1)
    await refused(ErrorCode.CONFLICT, admin.call("SetPolicy", late))
    next_at = (await admin.call("SetPolicy", pb.SetPolicyRequest(document=document(), revision=set_at))).revision
    assert next_at > set_at
    await admin.call("SetPolicy", pb.SetPolicyRequest(document=wanted))
    set_records = [each for each in rig.ledger.records if each.details["call"] == "SetPolicy"]
    sets = [(each.outcome, each.details["bindings"]) for each in set_records]
    assert sets == [("OK", "1"), ("REPEATED", "1"), ("CONFLICT", "0"), ("OK", "0"), ("OK", "1")]
    assert set_records[0].details["sha256"] == hashlib.sha256(wanted.encode()).hexdigest()


async def test_a_binding_works_from_the_answer_on(rig: Rig, admin: Client) -> None:
    token = await rig.token_of("agent-7")
    async with rig.client(token) as agent:
        await refused(ErrorCode.DENIED, agent.call("GetVm"))
        await admin.call("SetPolicy", pb.SetPolicyRequest(document=document(RESTORER)))
        await agent.call("GetVm")
        answer = await agent.call("WhoAmI")
        assert (answer.proof, answer.tenant) == ("token", "default")
        assert [(each.role, each.tenant, each.resource) for each in answer.bindings] == [("restorer", "default", "*")]
        await admin.call("SetPolicy", pb.SetPolicyRequest(document=document()))
        await refused(ErrorCode.DENIED, agent.call("GetVm"))


async def test_malformed_policies_are_refused_whole_and_the_old_one_stays(rig: Rig, admin: Client) -> None:
    await admin.call("SetPolicy", pb.SetPolicyRequest(document=document(RESTORER)))
    before = await rig.store.get(keyspace.ACCESS_POLICY)
    for case, (text, path) in MALFORMED.items():
        if "\ud800" in text:
            continue  # cannot be sent as UTF-8
        error = await refused(ErrorCode.INVALID_ARGUMENT, admin.call("SetPolicy", pb.SetPolicyRequest(document=text)))
        assert error.facts["path"] == path, case
    assert await rig.store.get(keyspace.ACCESS_POLICY) == before
    assert rig.view.policy.somewhere("agent-7", "point.restore", "default")


async def test_the_largest_policy_fits_the_store(admin: Client) -> None:
    text = document(RESTORER)
    padded = text + " " * (POLICY_BYTES_MAX - len(text))
    await admin.call("SetPolicy", pb.SetPolicyRequest(document=padded))
    assert (await admin.call("GetPolicy")).document == padded


async def test_a_policy_of_another_hand_is_shown_as_it_is(rig: Rig, admin: Client) -> None:
    await rig.store.txn([], [Put(keyspace.ACCESS_POLICY, b"rubbish \xff")])
    await rig.view.fresh()
    shown = await admin.call("GetPolicy")
    assert shown.document == "rubbish \N{REPLACEMENT CHARACTER}"
    await admin.call("SetPolicy", pb.SetPolicyRequest(document=document(), revision=shown.revision))


async def test_a_revoked_certificate_is_refused_from_the_answer_on(store: SqliteStore, tmp_path: Path) -> None:
    authority = Authority()
    server = authority.issue(tmp_path / "server", hosts=["localhost"])
    lost, good = (authority.issue(tmp_path / name, uris=[ADA]) for name in ("lost", "good"))
    request = pb.RevokeCertificateRequest(fingerprint=fingerprint(lost), principal=ADA)
    async with running(store, SystemClock(), tls=server) as rig, rig.client(tls=good) as admin:
        async with rig.client(tls=lost) as client:
            await client.call("ListTokens")
            await admin.call("RevokeCertificate", request)
            await refused(ErrorCode.UNAUTHENTICATED, client.call("ListTokens"))
        await admin.call("RevokeCertificate", request)
        listed = (await admin.call("ListRevokedCertificates")).certificates
        assert [(each.fingerprint, each.principal) for each in listed] == [(fingerprint(lost), ADA)]
        wrong = pb.RevokeCertificateRequest(fingerprint=b"short")
        await refused(ErrorCode.INVALID_ARGUMENT, admin.call("RevokeCertificate", wrong))
    assert [each.outcome for each in rig.ledger.records] == ["OK", "OK", "REPEATED", "OK", "INVALID_ARGUMENT"]


async def test_changes_take_effect_on_another_coordinator_within_seconds(
    rig: Rig, admin: Client, store: SqliteStore, clock: ManualClock
) -> None:
    async with running(store, clock) as other:
        following = asyncio.ensure_future(other.view.run())
        token = new_token(random.randbytes)
        began_s = time.monotonic()
        await admin.call("CreateToken", asking(token))
        await admin.call("SetPolicy", pb.SetPolicyRequest(document=document(RESTORER)))

        async def works() -> bool:
            return other.view.token(parse_token(token)[0]) is not None and len(other.view.policy.bindings) == 1

        await eventually(works, "token and policy", within_s=5)
        async with other.client(token) as agent:
            await agent.call("GetVm")
            await admin.call("RevokeToken", pb.RevokeTokenRequest(token_id=parse_token(token)[0]))

            async def ended() -> bool:
                return not other.view.tokens

            await eventually(ended, "the revocation", within_s=5)
            await refused(ErrorCode.UNAUTHENTICATED, agent.call("GetVm"))
        assert time.monotonic() - began_s < 5
        following.cancel()


@pytest.mark.parametrize("fault", [Fault.LOST_BEFORE, Fault.LOST_AFTER])
async def test_lost_answers_of_the_store_leave_one_token_and_one_policy(
    store: SqliteStore, clock: ManualClock, fault: Fault
) -> None:
    faulty = FaultyStore(store)
    async with running(faulty, clock) as rig, rig.client(ADMIN) as admin:
        for at in range(4):
            for name, request in (
                ("CreateToken", asking(new_token(random.randbytes))),
                ("SetPolicy", pb.SetPolicyRequest(document=document(RESTORER) + " " * at)),
            ):
                faulty.arm(fault, at=at)
                await eventually(partial(answers, admin, name, request), name)
        faulty.arm(None)
        assert len((await admin.call("ListTokens")).tokens) == 4
        assert (await admin.call("GetPolicy")).document == document(RESTORER) + " " * 3


async def answers(admin: Client, name: str, request: Any) -> bool:
    """Whether a call was answered, and not just lost."""
    try:
        await admin.call(name, request)
    except HoldfastError as error:
        if error.code is not ErrorCode.UNREACHABLE:
            raise
        return False
    return True
