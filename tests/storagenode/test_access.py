"""A capability's signature is looked at once; what may change between two calls is looked at in each."""

from __future__ import annotations

import pytest

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import CLOCK_TOLERANCE_S
from holdfast_core.runtime.capability import CAPABILITY_METADATA_KEY, CapabilitySigner
from holdfast_core.runtime.clock import SystemClock
from holdfast_proto.v1.cluster_pb2 import HeartbeatResponse
from holdfast_storagenode import access
from holdfast_storagenode.access import AccessControl
from holdfast_storagenode.cluster import ClusterKnowledge
from tests.storagenode.cluster import mint

NOW_MS = 1_700_000_000_000
TOLERANCE_MS = int(CLOCK_TOLERANCE_S * 1000)
SIGNER = CapabilitySigner("key-1", bytes(32), "c" * 32)
SUCCESSOR = CapabilitySigner("key-2", bytes([1]) * 32, "c" * 32)


class SetClock(SystemClock):
    """A clock whose wall time is what the test says."""

    __slots__ = ("unix_ms",)

    def __init__(self) -> None:
        self.unix_ms = NOW_MS

    def now_unix_ms(self) -> int:
        """Return the time that was set."""
        return self.unix_ms


class Call:
    """What a handler sees of a call: its metadata."""

    def __init__(self, token: str) -> None:
        self._token = token

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata that came with the call."""
        return ((CAPABILITY_METADATA_KEY, self._token),)


class Node:
    """A node's access control, and what it hangs on."""

    def __init__(self) -> None:
        self.clock = SetClock()
        self.cluster = ClusterKnowledge()
        self.know(SIGNER)
        self.access = AccessControl(self.cluster, self.clock)

    def know(self, *signers: CapabilitySigner) -> None:
        """Take these signers' keys, and no others, from a coordinator."""
        known = HeartbeatResponse(cluster_id="c" * 32)
        for signer in signers:
            known.verifying_keys.add(key_id=signer.key_id, public_key=signer.public_key)
        self.cluster.take(known)

    def enter(self, token: str, verb: str = "get") -> int:
        """Return the tenant that a call with `token` works for."""
        return self.access.enter(Call(token), verb).tenant  # type: ignore[arg-type]  # it is asked for metadata alone

    def reason(self, token: str, verb: str = "get") -> str:
        """Return why a call with `token` is denied."""
        with pytest.raises(HoldfastError) as denied:
            self.enter(token, verb)
        assert denied.value.code is ErrorCode.DENIED
        return denied.value.message


@pytest.fixture
def node() -> Node:
    return Node()


def token_of(tenant: int = 1, *, signer: CapabilitySigner = SIGNER, verbs: tuple[str, ...] = ("get",)) -> str:
    return mint(signer, tenant=tenant, verbs=verbs, ttl_s=60, now_unix_ms=NOW_MS)


def test_a_token_that_was_seen_before_ends_all_the_same(node: Node) -> None:
    token = token_of()
    assert node.enter(token) == 1
    node.clock.unix_ms += 60_000 + TOLERANCE_MS - 1
    assert node.enter(token) == 1
    node.clock.unix_ms += 1
    assert "expired" in node.reason(token)


def test_a_clock_that_is_set_back_is_believed(node: Node) -> None:
    token = token_of()
    assert node.enter(token) == 1
    node.clock.unix_ms = NOW_MS - TOLERANCE_MS - 1000
    assert "not valid yet" in node.reason(token)


def test_what_a_key_had_signed_ends_with_the_key(node: Node) -> None:
    token, later = token_of(), token_of(signer=SUCCESSOR)
    assert node.enter(token) == 1
    assert "does not know" in node.reason(later)
    node.know(SUCCESSOR)
    assert node.enter(later) == 1
    assert "does not know" in node.reason(token)


def test_each_token_allows_what_it_says_and_no_more(node: Node) -> None:
    first, second = token_of(1), token_of(2, verbs=("put",))
    for _ in range(2):
        assert (node.enter(first), node.enter(second, "put")) == (1, 2)
        assert "'put'" in node.reason(first, "put")
        assert "'get'" in node.reason(second)
    header, claims, _ = first.split(".")
    assert "signature" in node.reason(".".join((header, claims, second.split(".")[2])))


@pytest.mark.slow
def test_no_more_tokens_are_kept_than_the_bound(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "_TOKENS_KEPT_MAX", 4)
    tokens = [token_of(tenant) for tenant in range(10)]
    assert [node.enter(token) for token in (*tokens, *tokens)] == [*range(10), *range(10)]
    assert len(node.access._verified) == 4
