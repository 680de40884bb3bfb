"""Capabilities from anywhere: what the cluster's key did not sign is DENIED, and what it signed says what it says."""

from __future__ import annotations

import base64
import json
from typing import Any

import jwt
from hypothesis import example, given, settings
from hypothesis import strategies as st

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.capability import KINDS, VERBS, Capability, CapabilitySigner, CapabilityVerifier
from tests.fuzz.mutations import mutated_text, outcome

NOW_MS = 1_700_000_000_500
CLUSTER = "cluster-a"
SIGNER = CapabilitySigner("key-1", bytes(32), CLUSTER)
OTHERS = CapabilitySigner("key-1", bytes([1]) * 32, CLUSTER)
VERIFIER = CapabilityVerifier(CLUSTER, {"key-1": SIGNER.public_key})


def minted(signer: CapabilitySigner, tenant: int, *verbs: str, kinds: frozenset[int] = KINDS, session: str = "") -> str:
    """A token of a minute."""
    return signer.mint(
        tenant=tenant, verbs=frozenset(verbs), kinds=kinds, ttl_s=60, now_unix_ms=NOW_MS, session=session
    )


GOOD = minted(SIGNER, 7, "get", kinds=frozenset({2}))
STRONGER = minted(SIGNER, 8, *VERBS, session="snap-1")
FORGED = minted(OTHERS, 7, *VERBS)
MEANT = {token: VERIFIER.verify(token, now_unix_ms=NOW_MS) for token in (GOOD, STRONGER)}

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def verified(token: str) -> Capability | HoldfastError:
    """What a node makes of a token."""
    return outcome(lambda: VERIFIER.verify(token, now_unix_ms=NOW_MS), ErrorCode.DENIED)


def part(value: Any) -> str:
    """JSON as a part of a token."""
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


@settings(max_examples=200, deadline=None)
@given(token=st.text(max_size=200) | st.text(alphabet="eyJhbGciOi._-=AZ09", max_size=200))
@example(token="..")
@example(token="\ud800.\udfff.x")
@example(token="[" * 4000)
@example(token="A" * 5000)
def test_arbitrary_text_is_denied(token: str) -> None:
    assert isinstance(verified(token), HoldfastError)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), good=st.sampled_from([GOOD, STRONGER]), other=st.sampled_from([GOOD, STRONGER, FORGED]))
def test_a_changed_token_is_denied_or_says_the_same(data: st.DataObject, good: str, other: str) -> None:
    token = data.draw(mutated_text(good, other))
    # Base 64 has several spellings of a signature; of what is signed there is one.
    result = verified(token)
    if not isinstance(result, HoldfastError):
        signed = token.rpartition(".")[0]
        assert result == {each.rpartition(".")[0]: meant for each, meant in MEANT.items()}[signed]


@settings(max_examples=200, deadline=None)
@given(header=JSON | st.fixed_dictionaries({"alg": JSON, "kid": JSON, "typ": JSON}), claims=JSON, data=st.data())
@example(header={"alg": "none", "typ": "holdfast-cap", "kid": "key-1"}, claims={"tnt": 7}, data=None)
@example(header={"alg": "EdDSA", "typ": "holdfast-cap", "kid": ["key-1"]}, claims={"tnt": 7}, data=None)
@example(
    header={"alg": "EdDSA", "typ": "holdfast-cap", "kid": "key-1", "b64": False, "crit": ["b64"]}, claims=1, data=None
)
def test_no_header_makes_up_for_a_signature(header: Any, claims: Any, data: st.DataObject | None) -> None:
    signature = GOOD.rpartition(".")[2] if data is None else data.draw(st.sampled_from(["", GOOD.rpartition(".")[2]]))
    for signed_claims in (part(claims), GOOD.split(".")[1]):
        assert isinstance(verified(f"{part(header)}.{signed_claims}.{signature}"), HoldfastError)


CLAIMS: dict[str, Any] = {
    "iss": CLUSTER,
    "aud": f"holdfast-storagenode/{CLUSTER}",
    "tnt": 7,
    "vrb": ["get"],
    "knd": [2],
    "rkn": [2],
    "nbf": 0,
    "iat": 0,
    "exp": 1 << 40,
    "sid": "",
}


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(sorted(CLAIMS)), value=JSON)
@example(name="exp", value=float("inf"))
@example(name="tnt", value=True)
@example(name="vrb", value=[["put"], {"put": 1}, "put"])
@example(name="knd", value=[[0], {}, None])
@example(name="iss", value=[CLUSTER])
@example(name="exp", value=10**400)
def test_signed_claims_of_any_form_are_denied_or_allow_no_more_than_they_name(name: str, value: Any) -> None:
    """Our own signer never makes such; a node does not fall over them either."""
    claims = json.dumps(CLAIMS | {name: value}).encode()
    token = jwt.PyJWS().encode(claims, SIGNER._key, algorithm="EdDSA", headers={"kid": "key-1", "typ": "holdfast-cap"})
    result = verified(token)
    if not isinstance(result, HoldfastError):
        assert result.verbs <= VERBS
        assert result.read_kinds <= result.kinds <= KINDS
        assert name in ("iss", "aud", "vrb") or result.verbs == {"get"}
        assert name == "knd" or result.kinds == {2}
