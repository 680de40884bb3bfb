"""What a call may do: its capability, verified, confined to a tenant and to kinds of block."""

from __future__ import annotations

from typing import Any

import grpc.aio

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.capability import CAPABILITY_METADATA_KEY, KINDS, Capability
from holdfast_core.runtime.clock import Clock
from holdfast_storagenode.cluster import ClusterKnowledge


class AccessControl:
    """Verifies capabilities against what the node knows of its cluster."""

    def __init__(self, cluster: ClusterKnowledge, clock: Clock) -> None:
        self._cluster = cluster
        self._clock = clock

    def enter(self, context: grpc.aio.ServicerContext[Any, Any], verb: str) -> Capability:
        """Return the call's capability, which allows `verb` now.

        Raises:
            HoldfastError: DENIED; NOT_READY if the node has not heard from a coordinator yet.
        """
        if not self._cluster.cluster_id:
            raise HoldfastError(ErrorCode.NOT_READY, "this node has not heard from a coordinator yet; try again")
        token = ""
        for key, value in context.invocation_metadata() or ():
            if key == CAPABILITY_METADATA_KEY and isinstance(value, str):
                token = value
        capability = self._cluster.verifier.verify(token, now_unix_ms=self._clock.now_unix_ms())
        capability.require(verb)
        return capability

    def recheck(self, capability: Capability) -> None:
        """Return if a capability that was verified before has not ended since.

        Raises:
            HoldfastError: DENIED.
        """
        capability.check_time(self._clock.now_unix_ms())


def sees_all_kinds(capability: Capability) -> bool:
    """Return whether the capability reaches every kind of block, so that nothing has to be looked at twice."""
    return capability.kinds == KINDS
