"""Who makes a call: tokens of every fate, certificates of every shape, and plain text from afar."""

from __future__ import annotations

import datetime
import logging
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from holdfast_coordinator import keyspace
from holdfast_coordinator.access.identity import Identities, Shown, StaticToken, admin_token, node_token
from holdfast_coordinator.grants import check_keys_may_leave
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.clock import ManualClock, SystemClock
from holdfast_core.runtime.credentials import AUTHORIZATION_KEY, Credential, new_token, parse_token, write_token
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import Delete, Put
from holdfast_core.runtime.options import TlsFiles
from holdfast_proto.v1.access_pb2 import RevokedCertificate
from tests.coordinator.access_rig import ADMIN, Authority, Rig, fingerprint, running
from tests.coordinator.rig import refused

ADA = "spiffe://holdfast/admin/ada"


@pytest.fixture
async def rig(store: SqliteStore, clock: ManualClock) -> AsyncIterator[Rig]:
    async with running(store, clock) as rig:
        yield rig


async def refused_for(rig: Rig, reason: str, token: str = "", *, tls: TlsFiles | None = None) -> HoldfastError:
    """Make a call that must be refused as a stranger's, counted, and left out of the log."""
    before = rig.counted(reason)
    async with rig.client(token, tls=tls) as client:
        error = await refused(ErrorCode.UNAUTHENTICATED, client.call("WhoAmI"))
    assert error.facts["reason"] == reason
    assert rig.counted(reason) == before + 1
    assert not rig.ledger.records
    assert not rig.tiny.calls
    return error


async def who(rig: Rig, token: str = "", *, tls: TlsFiles | None = None) -> tuple[str, str]:
    """Principal and proof of a call."""
    async with rig.client(token, tls=tls) as client:
        answer = await client.call("WhoAmI")
    return answer.principal, answer.proof


async def test_a_token_of_the_store_proves_its_principal_until_it_ends(rig: Rig, clock: ManualClock) -> None:
    token = await rig.token_of("agent-7")
    assert await who(rig, token) == ("agent-7", "token")
    clock.advance(59.9)
    assert await who(rig, token) == ("agent-7", "token")
    clock.advance(0.1)
    await refused_for(rig, "expired", token)


async def test_a_token_ends_with_its_record(rig: Rig) -> None:
    token = await rig.token_of("agent-7")
    await rig.store.txn([], [Delete(keyspace.token(parse_token(token)[0]))])
    await rig.view.fresh()
    await refused_for(rig, "unknown", token)


async def test_a_wrong_secret_and_an_unknown_id_are_one_answer(rig: Rig) -> None:
    token = await rig.token_of("agent-7")
    wrong = new_token(random.randbytes, parse_token(token)[0])
    errors = [await refused_for(rig, "unknown", each) for each in (wrong, new_token(random.randbytes))]
    assert len({(error.message, str(error.facts)) for error in errors}) == 1
    assert wrong not in errors[0].message


async def test_no_credential_and_what_to_do(rig: Rig) -> None:
    assert "--token-file" in (await refused_for(rig, "absent")).message


@pytest.mark.parametrize(
    "authorization",
    [
        *[("",), ("Bearer",), ("Bearer ",), ("Bearer hft_x",), (ADMIN,), (f"Basic {ADMIN}",), (f"Bearer {ADMIN} ",)],
        *[(f"Bearer {ADMIN}", f"Bearer {ADMIN}"), (f"Bearer {ADMIN.lower()}",)],
    ],
)
async def test_malformed_authorizations(rig: Rig, authorization: Sequence[str]) -> None:
    async with rig.client() as client:
        metadata = [(AUTHORIZATION_KEY, each) for each in authorization]
        error = await refused(ErrorCode.UNAUTHENTICATED, client.call("WhoAmI", metadata=metadata))
    assert error.facts["reason"] == "malformed"
    assert ADMIN[21:] not in error.message


async def test_static_tokens_hold_their_role_whatever_the_policy_says(
    store: SqliteStore, clock: ManualClock, tmp_path: Path
) -> None:
    path = tmp_path / "admin.token"
    first, second, node = (new_token(random.randbytes) for _ in range(3))
    write_token(path, first)
    static = [admin_token(Credential(token_file=path)), node_token(Credential(token=node))]
    async with running(store, clock, static=static) as rig:
        await rig.bind()
        assert await who(rig, first) == ("admin", "token")
        async with rig.client(first) as client:
            await client.call("ListTokens")
        async with rig.client(node) as client:
            assert (await client.call("WhoAmI")).principal == "node"
            await refused(ErrorCode.DENIED, client.call("ListTokens"))
        rig.ledger.records.clear()
        write_token(path, second)
        assert await who(rig, second) == ("admin", "token")
        await refused_for(rig, "unknown", first)
        path.write_text("not a token\n", encoding="ascii")
        await refused_for(rig, "unknown", second)
        path.unlink()
        await refused_for(rig, "unknown", second)
        write_token(path, second)
        assert await who(rig, second) == ("admin", "token")


async def test_a_static_token_without_text_is_nobodys(rig: Rig, clock: ManualClock) -> None:
    empty = Identities(rig.view, static=[StaticToken("admin", "admin", Credential())], clock=clock)
    with pytest.raises(HoldfastError) as caught:
        empty.of(Shown((f"Bearer {ADMIN}",)))
    assert caught.value.facts["reason"] == "unknown"


async def test_a_certificate_with_one_uri_is_its_principal(store: SqliteStore, tmp_path: Path) -> None:
    authority = Authority()
    server = authority.issue(tmp_path / "server", hosts=["localhost"])
    shapes = {"one": [ADA], "none": [], "two": [ADA, "spiffe://holdfast/admin/bob"], "stars": ["spiffe://holdfast/*"]}
    files = {name: authority.issue(tmp_path / name, uris=uris, hosts=["admin"]) for name, uris in shapes.items()}
    async with running(store, SystemClock(), tls=server) as rig:
        assert await who(rig, tls=files["one"]) == (ADA, "certificate")
        for name in ("none", "two", "stars"):
            await refused_for(rig, "certificate", tls=files[name])
            assert await who(rig, ADMIN, tls=files[name]) == ("admin", "token"), "a token beside the certificate"
        token = await rig.token_of("agent-7")
        assert await who(rig, token, tls=files["one"]) == ("agent-7", "token")
        await refused_for(rig, "unknown", new_token(random.randbytes), tls=files["one"])
        key = keyspace.revoked(fingerprint(files["one"]))
        await rig.store.txn([], [Put(key, RevokedCertificate().SerializeToString())])
        await rig.view.fresh()
        await refused_for(rig, "revoked", tls=files["one"])
        await refused_for(rig, "revoked", token, tls=files["one"])
        assert await who(rig, token, tls=files["none"]) == ("agent-7", "token")


async def test_a_connection_outlives_its_certificate_but_its_rights_do_not(store: SqliteStore, tmp_path: Path) -> None:
    authority = Authority()
    server = authority.issue(tmp_path / "server", hosts=["localhost"])
    short = authority.issue(tmp_path / "short", uris=[ADA], life=datetime.timedelta(minutes=10))
    clock = ManualClock(unix_ms=SystemClock().now_unix_ms())
    async with running(store, clock, tls=server) as rig:
        async with rig.client(tls=short) as client:
            assert (await client.call("WhoAmI")).principal == ADA
            clock.advance(11 * 60)
            error = await refused(ErrorCode.UNAUTHENTICATED, client.call("WhoAmI"))
            assert error.facts["reason"] == "expired"
        early = Identities(rig.view, static=[], clock=ManualClock(unix_ms=1_000))
        with pytest.raises(HoldfastError, match="not valid at this time"):
            early.of(Shown(pem=short.cert.read_bytes()))


def test_bytes_that_are_no_certificate_name_nobody(rig: Rig) -> None:
    pem = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    with pytest.raises(HoldfastError, match="cannot be read") as caught:
        rig.identities.of(Shown(pem=pem))
    assert caught.value.facts["reason"] == "certificate"


def test_credentials_cross_no_wire_in_plain_text() -> None:
    for peer in ("ipv4:10.0.0.7:40000", "ipv6:[2001:db8::1]:40000", "ipv4:128.127.0.1:1", ""):
        with pytest.raises(HoldfastError) as caught:
            check_keys_may_leave(peer=peer, encrypted=False)
        assert caught.value.code is ErrorCode.DENIED
        check_keys_may_leave(peer=peer, encrypted=True)


async def test_no_log_line_holds_a_token(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    token = await rig.token_of("agent-7")
    with caplog.at_level(logging.DEBUG):
        for each in (token, ADMIN, new_token(random.randbytes)):
            async with rig.client(each) as client:
                with pytest.raises(HoldfastError) as caught:
                    await client.call("RevokeToken")
            assert each[21:] not in f"{caught.value.message} {caught.value.facts} {caplog.text}"
    assert "RevokeToken" in caplog.text
    assert repr(Credential(token=token)).count("hft_") == 0
