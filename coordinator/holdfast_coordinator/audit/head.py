"""The head of the audit log as the metadata store keeps it: what the next append builds on."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast_coordinator import keyspace
from holdfast_coordinator.records import load
from holdfast_core.model.audit.merkle import Frontier
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.metadata.store import MetadataStore
from holdfast_proto.v1.audit_pb2 import AuditHead, SignedHead


@dataclass(frozen=True, slots=True)
class Head:
    """The head at one revision.

    Attributes:
        revision: revision of the metadata store that wrote it; 0 before the first record.
        message: as it is kept; empty before the first record.
        frontier: the tree below it.
    """

    revision: int
    message: AuditHead
    frontier: Frontier

    @property
    def signed(self) -> SignedHead:
        """The signed head; its size is 0 and it has no signature before the first record."""
        return self.message.signed

    @property
    def size(self) -> int:
        """Records below it."""
        return self.frontier.size


async def load_head(store: MetadataStore) -> Head:
    """Read the newest head.

    Raises:
        HoldfastError: CORRUPT if its parts do not fit together: somebody else wrote there. UNREACHABLE as the store.
    """
    stored = await load(store, keyspace.AUDIT_HEAD, AuditHead)
    if stored is None:
        return Head(0, AuditHead(), Frontier())
    message = stored.message
    frontier = Frontier(message.signed.size, tuple(message.frontier))
    if frontier.size and frontier.root != message.signed.root:
        raise HoldfastError(
            ErrorCode.CORRUPT,
            "the newest head of the audit log was not written by a coordinator: its parts do not fit together",
        )
    return Head(stored.mod_revision, message, frontier)
