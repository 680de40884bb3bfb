"""The head of the audit log as the metadata store keeps it: what the next append builds on."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast_coordinator import keyspace
from holdfast_coordinator.records import parse
from holdfast_core.model.audit.merkle import Frontier
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.metadata.store import KeyValue, MetadataStore
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


@dataclass(frozen=True, slots=True)
class Turn:
    """Whose turn it is to append, where somebody claims it.

    Attributes:
        revision: revision of the metadata store that wrote the claim; 0 where nobody claims it.
        name: name of the ledger that does; empty where nobody does.
    """

    revision: int = 0
    name: bytes = b""


async def load_head(store: MetadataStore) -> Head:
    """Read the newest head.

    Raises:
        HoldfastError: CORRUPT if its parts do not fit together: somebody else wrote there. UNREACHABLE as the store.
    """
    return _head_from(await store.get(keyspace.AUDIT_HEAD))


async def load_head_and_turn(store: MetadataStore) -> tuple[Head, Turn]:
    """Read the newest head, and whose turn it is, at one revision. Raises as `load_head`."""
    # One prefix covers both keys, which saves etcd a second look.
    items = {item.key: item for item in (await store.snapshot([keyspace.AUDIT_HEAD])).items}
    claim = items.get(keyspace.AUDIT_TURN)
    turn = Turn() if claim is None else Turn(claim.mod_revision, claim.value)
    return _head_from(items.get(keyspace.AUDIT_HEAD)), turn


def _head_from(item: KeyValue | None) -> Head:
    if item is None:
        return Head(0, AuditHead(), Frontier())
    stored = parse(item, AuditHead)
    message = stored.message
    frontier = Frontier(message.signed.size, tuple(message.frontier))
    if frontier.size and frontier.root != message.signed.root:
        raise HoldfastError(
            ErrorCode.CORRUPT,
            "the newest head of the audit log was not written by a coordinator: its parts do not fit together",
        )
    return Head(stored.mod_revision, message, frontier)
