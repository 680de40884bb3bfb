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


def minted(
    signer: CapabilitySigner = SIGNER,
    *,
    ttl_s: float = 60.0,
    session: str = "",
    read_kinds: frozenset[int] | None = None,
) -> str:
    return signer.mint(
        tenant=7,
        verbs=frozenset({"get", "put"}),
        kinds=frozenset({0, 2}),
        ttl_s=ttl_s,
        now_unix_ms=NOW_MS,
        session=session,
        read_kinds=read_kinds,
    )


def signed(change: dict[str, object], *, typ: str | None = "holdfast-cap") -> str:
    """Return a token that the cluster's own key signed, with some claims other than it would mint."""
    claims = {
        "iss": "cluster-a",
        "aud": "holdfast-storagenode/cluster-a",
        "tnt": 7,
        "vrb": ["put"],
        "knd": [0],
        "nbf": 0,
        "exp": 1 << 40,
    }
    headers = {"kid": "key-1"} if typ is None else {"kid": "key-1", "typ": typ}
    whole = {name: value for name, value in (claims | change).items() if value is not ...}
    return jwt.encode(whole, SIGNER._key, algorithm="EdDSA", headers=headers)


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
        read_kinds=frozenset({0, 2}),
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


@pytest.mark.parametrize(
    ("now_unix_ms", "valid"),
    [
        (1_700_000_000_000 - 119_000, True),
        (1_700_000_000_000 - 121_000, False),
        (1_700_000_061_000 + 119_000, True),
        (1_700_000_061_000 + 121_000, False),
        (1_700_000_000_000 - TOLERANCE_MS, True),
        (1_700_000_000_000 - TOLERANCE_MS - 1, False),
        (1_700_000_061_000 + TOLERANCE_MS - 1, True),
        (1_700_000_061_000 + TOLERANCE_MS, False),
    ],
)
def test_clocks_may_be_two_minutes_apart(now_unix_ms: int, valid: bool) -> None:
    token = minted()
    if valid:
        assert VERIFIER.verify(token, now_unix_ms=now_unix_ms).tenant == 7
    else:
        assert "clocks" in reason(token, now_unix_ms=now_unix_ms) or "expired" in reason(token, now_unix_ms=now_unix_ms)


def test_a_capability_that_was_replayed_after_its_end_is_refused_whatever_it_allowed() -> None:
    capability = VERIFIER.verify(minted(), now_unix_ms=NOW_MS)
    with pytest.raises(HoldfastError, match="expired"):
        capability.check_time(capability.expires_unix_ms + TOLERANCE_MS)
    assert "expired" in reason(minted(), now_unix_ms=NOW_MS + 86_400_000)


@pytest.mark.parametrize(
    "audience",
    [
        ...,
        "",
        None,
        "holdfast-storagenode/cluster-b",
        "holdfast-coordinator/cluster-a",
        "cluster-a",
        ["holdfast-storagenode/cluster-a"],
        ["holdfast-storagenode/cluster-a", "somebody"],
    ],
)
def test_a_token_for_another_audience_is_refused(audience: object) -> None:
    assert VERIFIER.verify(signed({}), now_unix_ms=NOW_MS).verbs == {"put"}
    assert "another audience" in reason(signed({"aud": audience}))


def test_kinds_to_read_are_confined_apart_from_the_others() -> None:
    writer = VERIFIER.verify(minted(read_kinds=frozenset({2})), now_unix_ms=NOW_MS)
    assert writer.kinds_for("get") == {2}
    assert writer.kinds_for("put") == writer.kinds_for("has") == writer.kinds == {0, 2}
    whole = VERIFIER.verify(minted(), now_unix_ms=NOW_MS)
    assert whole.kinds_for("get") == whole.kinds_for("put") == {0, 2}
    # A claim that names more than the capability reaches gains nothing.
    wide = VERIFIER.verify(signed({"rkn": [0, 1, 2]}), now_unix_ms=NOW_MS)
    assert wide.kinds_for("get") == {0}
    assert VERIFIER.verify(signed({"rkn": []}), now_unix_ms=NOW_MS).kinds_for("get") == frozenset()


@pytest.mark.parametrize("algorithm", ["none", "HS256"])
def test_no_other_algorithm_is_believed(algorithm: str) -> None:
    claims = jwt.decode(signed({}), options={"verify_signature": False, "verify_aud": False})
    key = "" if algorithm == "none" else SIGNER.public_key.hex()
    token = jwt.encode(claims, key, algorithm=algorithm, headers={"kid": "key-1", "typ": "holdfast-cap"})
    assert "malformed" in reason(token)


@pytest.mark.parametrize(
    "change",
    [
        {"tnt": "7"},
        {"tnt": -1},
        {"tnt": 1 << 32},
        {"vrb": "put"},
        {"knd": None},
        {"rkn": None},
        {"rkn": "2"},
        {"exp": "soon"},
        {"nbf": None},
    ],
)
def test_signed_nonsense_is_malformed(change: dict[str, object]) -> None:
    assert "malformed" in reason(signed(change))


def test_a_token_of_another_kind_is_malformed() -> None:
    assert "malformed" in reason(signed({}, typ=None))
    assert "malformed" in reason(signed({}, typ="JWT"))
    assert "malformed" in reason("x" * 5000)


def test_a_header_of_a_thousand_brackets_is_malformed() -> None:
    header = base64.urlsafe_b64encode(b"[" * 2900).decode().rstrip("=")
    assert "malformed" in reason(f"{header}.e30.e30")


def test_unknown_verbs_and_kinds_are_never_minted() -> None:
    for verbs, kinds in ((frozenset({"own"}), frozenset({0})), (frozenset({"put"}), frozenset({3}))):
        with pytest.raises(ValueError, match="must be some of"):
            SIGNER.mint(tenant=1, verbs=verbs, kinds=kinds, ttl_s=1, now_unix_ms=0)
    with pytest.raises(ValueError, match="must be some of"):
        SIGNER.mint(tenant=1, verbs=frozenset(), kinds=frozenset({0}), ttl_s=1, now_unix_ms=0)
    for read_kinds in (frozenset[int](), frozenset({2})):
        with pytest.raises(ValueError, match="must be some of"):
            SIGNER.mint(
                tenant=1,
                verbs=frozenset({"get"}),
                kinds=frozenset({0}),
                ttl_s=1,
                now_unix_ms=0,
                read_kinds=read_kinds,
            )


def test_a_verb_that_was_not_given_is_denied() -> None:
    capability = VERIFIER.verify(minted(), now_unix_ms=NOW_MS)
    capability.require("put")
    with pytest.raises(HoldfastError, match="'delete'"):
        capability.require("delete")
