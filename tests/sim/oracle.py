"""What the simulated clients know to be true, in one place where the checker can see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from holdfast_core.model.block import SealedBlock
from holdfast_core.model.keys import KeyRing, TenantSecrets
from holdfast_proto.v1.common_pb2 import TenantKeys

Ref: TypeAlias = tuple[int, bytes]
"""Tenant and id of a block."""

Content: TypeAlias = dict[int, bytes]
"""Plaintext by position; what is not there is zero."""


@dataclass(slots=True)
class Oracle:
    """The truth, as far as clients made it.

    Attributes:
        rings: keys of each tenant.
        bodies: every block that was ever sealed.
        points: content of every point whose commit was ever sent.
        objects: bytes of every object whose commit was ever sent.
        acknowledged: ids of points and objects whose commit was answered.
        forgetting: ids of points and objects that somebody asked to forget.
        tenants: the tenant's name of every point and object.
        leaning: what each session was told is durable.
        on_lean: hears of every such thing at the moment of it.
    """

    rings: dict[int, KeyRing] = field(default_factory=dict)
    bodies: dict[Ref, SealedBlock] = field(default_factory=dict)
    points: dict[str, Content] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    acknowledged: dict[str, None] = field(default_factory=dict)
    forgetting: dict[str, None] = field(default_factory=dict)
    leaning: dict[str, dict[Ref, None]] = field(default_factory=dict)
    tenants: dict[str, str] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)
    on_lean: Callable[[str, Ref], None] = lambda session_id, ref: None

    def ring(self, keys: TenantKeys) -> KeyRing:
        """Return the ring of a tenant; its keys never change within a history."""
        ring = self.rings.get(keys.tenant)
        if ring is None:
            ring = self.rings[keys.tenant] = KeyRing(TenantSecrets.from_message(keys))
        return ring

    def lean(self, session_id: str, ref: Ref) -> None:
        """Note that a session was told that a block is durable."""
        self.leaning.setdefault(session_id, {})[ref] = None
        self.on_lean(session_id, ref)

    def complain(self, what: str) -> None:
        """Note that a client saw what it never may."""
        self.complaints.append(what)
