"""What a call may do: its capability, verified, confined to a tenant and to kinds of block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import grpc.aio

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.capability import CAPABILITY_METADATA_KEY, Capability, CapabilityVerifier
from holdfast_core.runtime.clock import Clock
from holdfast_storagenode.cluster import ClusterKnowledge

# A session sends one token with each of its calls; a token has at most 4 KiB.
_TOKENS_KEPT_MAX: Final = 256

PEER_VERB: Final = "peer"


@dataclass(frozen=True, slots=True)
class _Verified:
    """What a token allows, and the time in Unix milliseconds at which that was found out."""

    capability: Capability
    at_unix_ms: int


class AccessControl:
    """Verifies capabilities against what the node knows of its cluster. Lives in the event loop's thread.

    A token's signature and claims are looked at once, its time at every call: the first costs as much as the rest of a
    call that asks for a few blocks.
    """

    def __init__(self, cluster: ClusterKnowledge, clock: Clock) -> None:
        self._cluster = cluster
        self._clock = clock
        self._verifier: CapabilityVerifier | None = None
        self._verified: dict[str, _Verified] = {}

    def enter(self, context: grpc.aio.ServicerContext[Any, Any], verb: str) -> Capability:
        """Return the call's capability, which allows `verb` now.

        What a node may do among its peers and what clients and coordinators may do are kept apart: a token with the
        verb `peer` opens nothing else, whatever other verbs it names, and no other token opens that.

        Raises:
            HoldfastError: DENIED; NOT_READY if the node has not heard from a coordinator yet.
        """
        if not self._cluster.cluster_id:
            raise HoldfastError(ErrorCode.NOT_READY, "this node has not heard from a coordinator yet; try again")
        token = ""
        for key, value in context.invocation_metadata() or ():
            if key == CAPABILITY_METADATA_KEY and isinstance(value, str):
                token = value
        capability = self._verify(token)
        capability.require(verb)
        of_peer = bool(capability.node) or PEER_VERB in capability.verbs
        if of_peer != (verb == PEER_VERB) or (of_peer and not capability.node):
            raise HoldfastError(ErrorCode.DENIED, f"the capability is not one for {verb!r}")
        return capability

    def recheck(self, capability: Capability) -> None:
        """Return if a capability that was verified before has not ended since.

        Raises:
            HoldfastError: DENIED.
        """
        capability.check_time(self._clock.now_unix_ms())

    def _verify(self, token: str) -> Capability:
        """Return what `token` allows now.

        Raises:
            HoldfastError: as `CapabilityVerifier.verify`.
        """
        now_unix_ms = self._clock.now_unix_ms()
        verifier = self._cluster.verifier
        if verifier is not self._verifier:
            # New keys: what the old ones had signed counts no longer.
            self._verifier = verifier
            self._verified.clear()
        known = self._verified.get(token)
        # A clock that was set back may stand before the token's beginning again, so that is asked anew.
        if known is not None and now_unix_ms >= known.at_unix_ms:
            known.capability.check_time(now_unix_ms)
            return known.capability
        capability = verifier.verify(token, now_unix_ms=now_unix_ms)
        if len(self._verified) >= _TOKENS_KEPT_MAX:
            del self._verified[next(iter(self._verified))]
        self._verified[token] = _Verified(capability, now_unix_ms)
        return capability
