"""What a caller needs to talk to the nodes: layouts, addresses, a capability for just that call's purpose, keys.

Keys leave only over TLS, on the loopback interface or on a Unix socket (DESIGN section 5). The service host already
refuses to listen in plain text elsewhere; this checks each call's peer once more, because a mistake here is final.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from holdfast_coordinator.keys.chain import KeyChain
from holdfast_coordinator.view import ClusterState
from holdfast_core.model.block import Kind
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.keys import TenantSecrets
from holdfast_core.model.limits import CAPABILITY_TTL_S
from holdfast_core.runtime.clock import Clock
from holdfast_proto.v1.common_pb2 import Grant

POINT_KINDS: Final = frozenset({int(Kind.VOLUME), int(Kind.INDEX)})
OBJECT_KINDS: Final = frozenset({int(Kind.APPLICATION), int(Kind.INDEX)})
ALL_KINDS: Final = POINT_KINDS | OBJECT_KINDS

# A session writes, asks what is there, and reads its parent's index and the bases of deltas.
SESSION_VERBS: Final = frozenset({"put", "has", "get"})
# A reader reads; `has` lets it verify a point on the nodes without fetching it.
READER_VERBS: Final = frozenset({"get", "has"})


@dataclass(frozen=True, slots=True)
class Token:
    """A capability and the Unix time in milliseconds at which it ends."""

    text: str
    expires_unix_ms: int


class Grants:
    """Mints capabilities for one tenant and makes grants of them."""

    def __init__(self, chain: KeyChain, secrets: TenantSecrets, clock: Clock) -> None:
        """Sign with the chain's key of the moment; grant the tenant's secrets."""
        self._chain = chain
        self._tenant = secrets.tenant
        self._keys = secrets.to_message()
        self._clock = clock
        self._own: dict[str, Token] = {}

    def session_token(self, session_id: str, kinds: frozenset[int]) -> Token:
        """Mint what a session needs to write and to read what it builds on."""
        return self._mint(SESSION_VERBS, kinds, session_id)

    def reader_token(self, kinds: frozenset[int]) -> Token:
        """Mint what a reader of points or of objects needs."""
        return self._mint(READER_VERBS, kinds)

    def index_reader(self) -> str:
        """Return the coordinator's own capability to read index nodes, and nothing else."""
        return self._own_token("get", frozenset({int(Kind.INDEX)}))

    def presence_asker(self) -> str:
        """Return the coordinator's own capability to ask for presence."""
        return self._own_token("has", ALL_KINDS)

    def size_scanner(self) -> str:
        """Return the coordinator's own capability to list ids and lengths."""
        return self._own_token("scan", ALL_KINDS)

    def is_past_half(self, issued_unix_ms: int) -> bool:
        """Return whether a capability minted then has lived more than half its life."""
        return self._clock.now_unix_ms() - issued_unix_ms > CAPABILITY_TTL_S * 500

    def grant(self, state: ClusterState, token: Token) -> Grant:
        """Put a grant together. The caller has checked `check_keys_may_leave`."""
        return Grant(
            layouts=state.layout_set.messages,
            nodes=state.nodes,
            capability=token.text,
            capability_expires_unix_ms=token.expires_unix_ms,
            keys=self._keys,
            layout_revision=state.layout_set.revision,
        )

    def _own_token(self, verb: str, kinds: frozenset[int]) -> str:
        token = self._own.get(verb)
        if token is None or token.expires_unix_ms - self._clock.now_unix_ms() < CAPABILITY_TTL_S * 500:
            token = self._own[verb] = self._mint(frozenset({verb}), kinds)
        return token.text

    def _mint(self, verbs: frozenset[str], kinds: frozenset[int], session_id: str = "") -> Token:
        now_unix_ms = self._clock.now_unix_ms()
        text = self._chain.capability_signer().mint(
            tenant=self._tenant,
            verbs=verbs,
            kinds=kinds,
            ttl_s=CAPABILITY_TTL_S,
            now_unix_ms=now_unix_ms,
            session=session_id,
        )
        return Token(text, now_unix_ms + int(CAPABILITY_TTL_S * 1000))


def check_keys_may_leave(*, peer: str, encrypted: bool) -> None:
    """Check that keys may be released to this peer, as gRPC names it (`ipv4:127.0.0.1:40000`, `unix:`…).

    Raises:
        HoldfastError: DENIED if they would travel in plain text between machines.
    """
    if encrypted or peer.startswith(("unix:", "ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D")):
        return
    raise HoldfastError(
        ErrorCode.DENIED,
        "keys are released over TLS, loopback or a Unix socket only; connect to the coordinator by TLS",
    )
