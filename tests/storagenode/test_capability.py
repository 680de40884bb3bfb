"""Capabilities: what a token says is what it allows, and every other token is denied with its own reason."""

from __future__ import annotations

import base64
import json

import jwt
import pytest

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import CLOCK_TOLERANCE_S
from holdfast_core.runtime.capability import Capability, CapabilitySigner, CapabilityVerifier

NOW_MS = 1_700_000_000_500
TOLERANCE_MS = int(CLOCK_TOLERANCE_S * 1000)
SIGNER = CapabilitySigner("key-1", bytes(32), "cluster-a")
VERIFIER = CapabilityVerifier("cluster-a", {"key-1": SIGNER.public_key})


def minted(signer: CapabilitySigner = SIGNER, *, ttl_s: float = 60.0, session: str = "") -> str:
    return signer.mint(
        tenant=7,
        verbs=frozenset({"get", "put"}),
        kinds=frozenset({0, 2}),
        ttl_s=ttl_s,
        now_unix_ms=NOW_MS,
        session=session,
    )


def reason(token: str, *, now_unix_ms: int = NOW_MS, verifier: CapabilityVerifier = VERIFIER) -> str:
    with pytest.raises(HoldfastError) as denied:
        verifier.verify(token, now_unix_ms=now_unix_ms)
    assert denied.value.code is ErrorCode.DENIED
    return denied.value.message


def test_a_token_says_what_was_minted() -> None:
    assert VERIFIER.verify(minted(session="snap-1"), now_unix_ms=NOW_MS) == Capability(
        tenant=7,
        verbs=frozenset({"get", "put"}),
        kinds=frozenset({0, 2}),
        expires_unix_ms=1_700_000_061_000,
        session="snap-1",
    )


def test_every_reason_has_its_own_message() -> None:
    token = minted()
    header, claims, signature = token.split(".")
    foreign = CapabilitySigner("key-1", bytes(32), "cluster-b")
    other_key = CapabilitySigner("key-1", bytes([1]) * 32, "cluster-a")
    unknown = CapabilitySigner("key-2", bytes(32), "cluster-a")
    altered = json.loads(base64.urlsafe_b64decode(claims + "=="))
    altered["tnt"] = 8
    forged = base64.urlsafe_b64encode(json.dumps(altered).encode()).decode().rstrip("=")
    reasons = [
        reason(""),
        reason("not a token"),
        reason(minted(unknown)),
        reason(minted(other_key)),
        reason(minted(foreign)),
        reason(token, now_unix_ms=NOW_MS - TOLERANCE_MS - 2000),
        reason(token, now_unix_ms=1_700_000_061_000 + TOLERANCE_MS),
    ]
    assert len(set(reasons)) == len(reasons), reasons
    assert reason(f"{header}.{forged}.{signature}") == reason(minted(other_key)), (
        "an altered claim breaks the signature"
    )


def test_the_edges_of_time() -> None:
    token = minted()
    VERIFIER.verify(token, now_unix_ms=1_700_000_061_000 + TOLERANCE_MS - 1)
    VERIFIER.verify(token, now_unix_ms=1_700_000_000_000 - TOLERANCE_MS)


@pytest.mark.parametrize("algorithm", ["none", "HS256"])
def test_no_other_algorithm_is_believed(algorithm: str) -> None:
    claims = {"iss": "cluster-a", "tnt": 7, "vrb": ["put"], "knd": [0], "nbf": 0, "exp": 1 << 40}
    key = "" if algorithm == "none" else SIGNER.public_key.hex()
    token = jwt.encode(claims, key, algorithm=algorithm, headers={"kid": "key-1", "typ": "holdfast-cap"})
    assert "malformed" in reason(token)


@pytest.mark.parametrize(
    "change",
    [{"tnt": "7"}, {"tnt": -1}, {"tnt": 1 << 32}, {"vrb": "put"}, {"knd": None}, {"exp": "soon"}, {"nbf": None}],
)
def test_signed_nonsense_is_malformed(change: dict[str, object]) -> None:
    claims = {"iss": "cluster-a", "tnt": 7, "vrb": ["put"], "knd": [0], "nbf": 0, "exp": 1 << 40} | change
    token = jwt.encode(claims, SIGNER._key, algorithm="EdDSA", headers={"kid": "key-1", "typ": "holdfast-cap"})
    assert "malformed" in reason(token)


def test_a_token_of_another_kind_is_malformed() -> None:
    claims = {"iss": "cluster-a", "tnt": 7, "vrb": ["put"], "knd": [0], "nbf": 0, "exp": 1 << 40}
    assert "malformed" in reason(jwt.encode(claims, SIGNER._key, algorithm="EdDSA", headers={"kid": "key-1"}))
    assert "malformed" in reason("x" * 5000)


def test_unknown_verbs_and_kinds_are_never_minted() -> None:
    for verbs, kinds in ((frozenset({"own"}), frozenset({0})), (frozenset({"put"}), frozenset({3}))):
        with pytest.raises(ValueError, match="must be some of"):
            SIGNER.mint(tenant=1, verbs=verbs, kinds=kinds, ttl_s=1, now_unix_ms=0)
    with pytest.raises(ValueError, match="must be some of"):
        SIGNER.mint(tenant=1, verbs=frozenset(), kinds=frozenset({0}), ttl_s=1, now_unix_ms=0)


def test_a_verb_that_was_not_given_is_denied() -> None:
    capability = VERIFIER.verify(minted(), now_unix_ms=NOW_MS)
    capability.require("put")
    with pytest.raises(HoldfastError, match="'delete'"):
        capability.require("delete")
