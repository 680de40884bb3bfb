"""API tokens, bearer headers and data key files from anywhere: refused without a word of what they hold, or right."""

from __future__ import annotations

import asyncio
import base64
import datetime
import hashlib
import json
import ssl
from collections.abc import Sequence
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from holdfast_coordinator.access.certificates import Certificates
from holdfast_coordinator.access.identity import TOKEN, Identities, Shown, StaticToken, admin_token
from holdfast_coordinator.access.view import AccessView
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.key_file import DataKey, format_data_key, parse_data_key
from holdfast_core.runtime.clock import ManualClock
from holdfast_core.runtime.credentials import Credential, new_token, parse_token
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from tests.fuzz.mutations import mutated, mutated_text, outcome
from tests.model.strategies import stream

ADMIN = new_token(lambda count: stream("admin", count))
OTHER = new_token(lambda count: stream("other", count))
KEY = DataKey(stream("root", 32), {1: stream("one", 32), 2: stream("two", 32)})
KEY_FILE = format_data_key(KEY)
WORDS = st.text(max_size=80) | st.text(alphabet="hft_0123456789abcdefABCXYZ234567=", max_size=80)


async def knowing(static: StaticToken) -> Identities:
    """Who tells who calls, from one static token and the copy of a store in which there is no other."""
    store = await SqliteStore.open(":memory:", ManualClock())
    view = AccessView(store, CollectorRegistry())
    await store.close()
    return Identities(view, static=[static], clock=ManualClock())


@pytest.fixture(scope="module")
def identities() -> Identities:
    """Who knows the administrator's token."""
    return asyncio.run(knowing(admin_token(Credential(token=ADMIN))))


def spelled_as(text: str) -> tuple[str, bytes]:
    """Id and secret, taken from the token's text by hand."""
    return text[4:20], base64.b32decode(text[21:] + "====")


@settings(max_examples=300, deadline=None)
@given(text=WORDS | mutated_text(ADMIN, OTHER))
@example(text=ADMIN + "\n")
@example(text=ADMIN.lower())
@example(text="hft_" + "٠" * 16 + "_" + "A" * 52)
def test_a_token_is_refused_without_its_text_or_read_as_it_is_spelled(text: str) -> None:
    result = outcome(lambda: parse_token(text), ErrorCode.INVALID_ARGUMENT)
    if isinstance(result, HoldfastError):
        assert len(text) < 8 or text not in str(result)
    else:
        assert result == spelled_as(text)
        assert len(text) == len(ADMIN)


@settings(max_examples=300, deadline=None)
@given(
    authorizations=st.lists(
        mutated_text(f"Bearer {ADMIN}", f"bearer {OTHER}") | mutated(f"Bearer {ADMIN}".encode()) | WORDS,
        min_size=1,
        max_size=2,
    ),
    pem=st.just(b"") | st.binary(max_size=60) | mutated(b"-----BEGIN CERTIFICATE-----\nAAAA\n"),
)
def test_nobody_is_the_administrator_by_another_text_than_the_token(
    identities: Identities, authorizations: Sequence[str | bytes], pem: bytes
) -> None:
    who = outcome(lambda: identities.of(Shown(tuple(authorizations), pem)), ErrorCode.UNAUTHENTICATED)
    if isinstance(who, HoldfastError):
        assert who.facts["reason"] in ("absent", "malformed", "unknown", "certificate")
        assert ADMIN not in str(who)
    else:
        text = authorizations[0]
        assert isinstance(text, str)
        assert (who.principal, who.proof, len(authorizations)) == ("admin", TOKEN, 1)
        assert text.partition(" ")[0].lower() == "bearer"
        assert text.partition(" ")[2] == ADMIN


@settings(max_examples=200, deadline=None)
@given(pem=st.binary(max_size=80) | mutated(b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"))
def test_bytes_that_are_no_certificate_make_nobody(identities: Identities, pem: bytes) -> None:
    who = outcome(lambda: identities.of(Shown((), pem)), ErrorCode.UNAUTHENTICATED)
    assert isinstance(who, HoldfastError)


def certificate() -> bytes:
    """The DER of a certificate that names an agent."""
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "agent")])
    uri = x509.UniformResourceIdentifier("spiffe://holdfast/client/agent")
    begins = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, begins, begins + datetime.timedelta(36_500))
    names = x509.SubjectAlternativeName([uri, x509.DNSName("agent.example")])
    return builder.add_extension(names, critical=False).sign(key, None).public_bytes(Encoding.DER)


DER = certificate()


@settings(max_examples=400, deadline=None)
@given(der=mutated(DER))
def test_a_certificate_that_cannot_be_read_makes_nobody(der: bytes) -> None:
    """TLS lets in what the operator's authority signed; that may still be a certificate which is not understood."""
    pem = ssl.DER_cert_to_PEM_cert(der).encode("ascii")
    read = Certificates().read(pem)
    assert read.fingerprint == hashlib.sha256(der).digest()
    assert bool(read.principal) != bool(read.why_nobody)


def test_a_certificate_of_an_unknown_version_makes_nobody() -> None:
    """X.509 v3 is written as 2, in the first field of what is signed."""
    version = bytes.fromhex("a003020102")
    assert DER.count(version) == 1
    der = DER.replace(version, bytes.fromhex("a003020103"))
    read = Certificates().read(ssl.DER_cert_to_PEM_cert(der).encode("ascii"))
    assert (read.principal, read.fingerprint) == ("", hashlib.sha256(der).digest())
    assert "cannot be read" in read.why_nobody


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=6) | st.just("ab" * 32),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(text=WORDS | JSON.map(json.dumps) | mutated_text(KEY_FILE))
@example(text="[" * 100_000)
@example(text=KEY_FILE.replace('"1"', '"' + "1" * 5000 + '"'))
@example(text=KEY_FILE.replace('"1"', '"²"'))
def test_a_data_keys_file_is_refused_without_its_text_or_read(text: str) -> None:
    key = outcome(lambda: parse_data_key(text, "the file"), ErrorCode.INVALID_ARGUMENT)
    if isinstance(key, HoldfastError):
        assert KEY.root.hex() not in str(key)
    else:
        assert parse_data_key(format_data_key(key), "the file") == key


@settings(max_examples=200, deadline=None)
@given(field=st.sampled_from(["format", "root", "epochs", "more"]), value=JSON)
def test_a_data_keys_field_of_another_form(field: str, value: Any) -> None:
    document = json.loads(KEY_FILE) | {field: value}
    key = outcome(lambda: parse_data_key(json.dumps(document), "the file"), ErrorCode.INVALID_ARGUMENT)
    assert isinstance(key, HoldfastError) or document[field] == value != "more"
