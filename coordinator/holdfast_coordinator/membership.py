"""Membership: nodes that say they live, and the leases that notice when they stop.

A node registers once, for good; its incarnation (drawn when its directory was made) tells it from another node that was
given the same name by mistake. Its lease is kept by whichever coordinator gets the heartbeat: the lease's id travels.
A lapsed lease marks the node down and does nothing else; what becomes of it then is the steward's to decide.
"""

from __future__ import annotations

from typing import Final

from holdfast_coordinator import keyspace
from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.records import Stored, load
from holdfast_coordinator.transactions import ATTEMPTS_MAX, Outcome, attempt, contention
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.names import check_name
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.metadata.store import Absent, Condition, MetadataStore, Operation, Put
from holdfast_core.runtime.options import UNIX_SCHEME, parse_address
from holdfast_proto.v1.common_pb2 import NodeStatus
from holdfast_proto.v1.records_pb2 import NodeRecord

INCARNATION_BYTES_MIN: Final = 8
INCARNATION_BYTES_MAX: Final = 64
_DEFAULT_ZONE: Final = "default"
# What comes before a node's name in the URI of its certificate.
_NODE_PRINCIPAL: Final = "/node/"


class Membership:
    """Registers nodes and keeps their leases."""

    def __init__(self, store: MetadataStore, clock: Clock, *, ledger: Ledger, lease_ttl_s: float) -> None:
        """Bind to the store; a node is marked down `lease_ttl_s` seconds after its last heartbeat."""
        self._store = store
        self._ledger = ledger
        self._clock = clock
        self._lease_ttl_s = lease_ttl_s

    async def heartbeat(self, status: NodeStatus, *, lease_id: int, incarnation: bytes, entry: Entry) -> int:
        """Take a node's heartbeat; register it if it is new. Returns the lease that now keeps it up.

        Only what is written of a node for good, its registration, goes into the audit log.

        Raises:
            HoldfastError: ALREADY_EXISTS if the name belongs to another node; INVALID_ARGUMENT for a malformed
                heartbeat; CONFLICT under contention.
        """
        _check(status, lease_id, incarnation)
        lease_id = await self._kept(lease_id)
        for _ in range(ATTEMPTS_MAX):
            found = await load(self._store, keyspace.node_record(status.node_id), NodeRecord)
            conditions, operations = self._registration(found, status, incarnation)
            registers = bool(operations)
            seen = NodeStatus()
            seen.CopyFrom(status)
            seen.ClearField("up")
            seen.ClearField("state")
            seen.last_seen_unix_ms = self._clock.now_unix_ms()
            operations.append(Put(keyspace.node_status(status.node_id), seen.SerializeToString()))
            operations.append(Put(keyspace.node_lease(status.node_id), b"", lease_id))
            if registers:
                entry.details["step"] = "register" if found is None else "change"
                outcome = await self._ledger.apply(entry, conditions, operations)
            else:
                outcome = await attempt(self._store, conditions, operations)
            if outcome is Outcome.APPLIED:
                return lease_id
            lease_id = await self._kept(lease_id)
        raise contention(f"the heartbeat of {status.node_id}")

    def _registration(
        self, found: Stored[NodeRecord] | None, status: NodeStatus, incarnation: bytes
    ) -> tuple[list[Condition], list[Operation]]:
        """Return what registers the node, or brings its registration up to date, or merely holds it."""
        key = keyspace.node_record(status.node_id)
        if found is None:
            record = NodeRecord(
                node_id=status.node_id,
                zone=status.zone or _DEFAULT_ZONE,
                capacity_bytes=status.capacity_bytes,
                incarnation=incarnation,
                registered_unix_ms=self._clock.now_unix_ms(),
            )
            return [Absent(key)], [Put(key, record.SerializeToString())]
        if found.message.incarnation != incarnation:
            raise HoldfastError(
                ErrorCode.ALREADY_EXISTS,
                f"another node is registered as {status.node_id}, with a directory of its own; give this one another "
                "name, or start it on the directory that it had",
            )
        zone = status.zone or _DEFAULT_ZONE
        if (found.message.zone, found.message.capacity_bytes) == (zone, status.capacity_bytes):
            return [found.unchanged], []
        # The next plan takes it into account; the present layout stays as it is.
        found.message.zone, found.message.capacity_bytes = zone, status.capacity_bytes
        return [found.unchanged], [Put(key, found.message.SerializeToString())]

    async def _kept(self, lease_id: int) -> int:
        """Keep the lease, or get a new one where there is none any more."""
        if lease_id:
            try:
                await self._store.keep_lease(lease_id)
            except HoldfastError as error:
                if error.code is not ErrorCode.NOT_FOUND:
                    raise
            else:
                return lease_id
        return await self._store.grant_lease(self._lease_ttl_s)


def check_speaks_for(principal: str, node_id: str) -> None:
    """Check that a principal may send heartbeats of a node: one that is named as a node speaks for that one alone.

    Raises:
        HoldfastError: DENIED.
    """
    _, named, own_id = principal.rpartition(_NODE_PRINCIPAL)
    if named and own_id != node_id:
        raise HoldfastError(
            ErrorCode.DENIED,
            f"{principal} speaks for the node {own_id} and not for {node_id}; start each node with its own certificate",
            facts={"resource": of_node(node_id)},
        )


def of_node(node_id: str) -> str:
    """Return the resource of a node."""
    return f"node/{node_id}"


def _check(status: NodeStatus, lease_id: int, incarnation: bytes) -> None:
    check_name(status.node_id, "node name")
    if status.zone:
        check_name(status.zone, "zone")
    if not status.address.startswith(UNIX_SCHEME):
        _, port = parse_address(status.address)
        if port == 0:
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"the node {status.node_id} says that it listens on port 0")
    if not status.capacity_bytes:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"the node {status.node_id} has no capacity")
    if not INCARNATION_BYTES_MIN <= len(incarnation) <= INCARNATION_BYTES_MAX:
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT,
            f"the incarnation has {len(incarnation)} bytes; {INCARNATION_BYTES_MIN} to {INCARNATION_BYTES_MAX} are "
            "allowed",
        )
    if lease_id < 0:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"{lease_id} is not a lease")
