"""Capabilities by which storage nodes call one another: one a node, kept and handed out again for half its life."""

from __future__ import annotations

from holdfast_coordinator.grants import ALL_KINDS, Token
from holdfast_coordinator.keys.chain import KeyChain
from holdfast_core.model.limits import PEER_CAPABILITY_TTL_S
from holdfast_core.runtime.clock import Clock

PEER_VERBS = frozenset({"peer"})
# Such a token reaches all tenants; the number that it has to name is the cluster's own.
_ALL_TENANTS = 0


class PeerTokens:
    """Mints them. Whoever asks has found out that the caller speaks for the node."""

    def __init__(self, chain: KeyChain, clock: Clock) -> None:
        """Sign with the chain's key of the moment."""
        self._chain = chain
        self._clock = clock
        self._tokens: dict[str, tuple[str, Token]] = {}

    def token(self, node_id: str) -> str:
        """Return a capability for this node alone that lives for at least half of `PEER_CAPABILITY_TTL_S` more."""
        now_unix_ms = self._clock.now_unix_ms()
        signer = self._chain.capability_signer()
        # By the key that signs, too: one that was stolen and removed leaves nothing behind that nodes would refuse.
        key_id, kept = self._tokens.get(node_id, ("", Token("", 0)))
        left_ms = kept.expires_unix_ms - now_unix_ms
        # A clock that went back makes a token look younger than one can be; nodes would find it not valid yet.
        if key_id == signer.key_id and PEER_CAPABILITY_TTL_S * 500 <= left_ms <= PEER_CAPABILITY_TTL_S * 1000:
            return kept.text
        text = signer.mint(
            tenant=_ALL_TENANTS,
            verbs=PEER_VERBS,
            kinds=ALL_KINDS,
            ttl_s=PEER_CAPABILITY_TTL_S,
            now_unix_ms=now_unix_ms,
            node=node_id,
        )
        self._tokens[node_id] = (signer.key_id, Token(text, now_unix_ms + int(PEER_CAPABILITY_TTL_S * 1000)))
        return text

    def forget(self, node_ids: frozenset[str]) -> None:
        """Drop what is kept for nodes other than these."""
        for node_id in self._tokens.keys() - node_ids:
            del self._tokens[node_id]
