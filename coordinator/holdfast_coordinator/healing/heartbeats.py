"""Heartbeats: what a node says is kept, and what it needs to know comes back.

The answer is never older than the store was when the heartbeat came: the collection epoch and the revision of the
layout set are read for it, at one revision, after the heartbeat's own write. A node that raises its stamps' floor needs
that (docs/healing.md), and one that was told of a layout by another coordinator never hears of an older one here.
"""

from __future__ import annotations

from collections.abc import Sequence

from holdfast_coordinator import keyspace
from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.collection.epochs import epoch_of
from holdfast_coordinator.healing.peer_tokens import PeerTokens
from holdfast_coordinator.keys.chain import KeyChain
from holdfast_coordinator.layouts import Layouts
from holdfast_coordinator.membership import Membership
from holdfast_coordinator.view import ClusterState, ClusterView
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.metadata.store import MetadataStore
from holdfast_proto.v1.cluster_pb2 import HeartbeatRequest, HeartbeatResponse
from holdfast_proto.v1.common_pb2 import NodeStatus

_READ = (keyspace.COLLECTION_EPOCH, keyspace.LAYOUT_HEAD)


class Heartbeats:
    """Takes heartbeats and answers them. The caller has found out that they come from who speaks for the node."""

    def __init__(
        self,
        store: MetadataStore,
        chain: KeyChain,
        view: ClusterView,
        membership: Membership,
        layouts: Layouts,
        *,
        clock: Clock,
        interval_s: float,
    ) -> None:
        """Bind to the store; nodes are asked for a heartbeat every `interval_s` seconds."""
        self._store = store
        self._chain = chain
        self._view = view
        self._membership = membership
        self._layouts = layouts
        self._tokens = PeerTokens(chain, clock)
        self._peers = Peers()
        self._interval_ms = int(interval_s * 1000)

    async def take(self, request: HeartbeatRequest, entry: Entry) -> HeartbeatResponse:
        """Take a heartbeat; the one that completes the first layout's number of nodes makes it form.

        Raises:
            HoldfastError: as `Membership.heartbeat` and `Layouts.form_first`; UNREACHABLE as the store.
        """
        node_id = request.status.node_id
        lease_id = await self._membership.heartbeat(
            request.status, lease_id=request.lease_id, incarnation=request.incarnation, entry=entry
        )
        await self._layouts.form_first(entry)
        read = {item.key: item for item in (await self._store.snapshot(_READ)).items}
        head = read.get(keyspace.LAYOUT_HEAD)
        state = self._view.state
        if (0 if head is None else head.mod_revision) != state.layout_set.revision:
            state = await self._view.fresh()
        self._tokens.forget(frozenset(state.records) | {node_id})
        answer = HeartbeatResponse(
            lease_id=lease_id,
            interval_ms=self._interval_ms,
            verifying_keys=self._chain.verifying_keys(),
            cluster_id=self._chain.cluster_id,
            layout_revision=state.layout_set.revision,
            granted_epoch=granted_to(state, node_id),
            collection_epoch=epoch_of(read.get(keyspace.COLLECTION_EPOCH)),
            peer_capability=self._tokens.token(node_id),
            nodes=self._peers.other_than(node_id, state.nodes),
        )
        messages = state.layout_set.messages
        if messages and request.layout_revision != state.layout_set.revision:
            answer.layout.CopyFrom(messages[0])
            answer.older_layouts.extend(messages[1:])
        return answer


def granted_to(state: ClusterState, node_id: str) -> int:
    """Return the epoch under which this node may let go of what it does not own any more; 0 for none. Pure.

    One that is out and up again will be taken back within seconds: what it let go of until then it would have to fetch.
    """
    decided = next((node.state for node in state.nodes if node.node_id == node_id), None)
    if decided is not None and decided.out and not decided.draining:
        return 0
    return state.layout_set.granted_epoch


class Peers:
    """Where nodes can be reached, and whether they are up: messages that are made anew only where something changed."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[NodeStatus, NodeStatus]] = {}

    def other_than(self, node_id: str, nodes: Sequence[NodeStatus]) -> list[NodeStatus]:
        """Return a message for each of `nodes` but one."""
        made, peers = self._made, []
        kept: dict[str, tuple[NodeStatus, NodeStatus]] = {}
        for node in nodes:
            name = node.node_id
            pair = made.get(name)
            # A status is never changed, only replaced.
            if pair is None or pair[0] is not node:
                pair = (node, NodeStatus(node_id=name, address=node.address, zone=node.zone, up=node.up))
            kept[name] = pair
            if name != node_id:
                peers.append(pair[1])
        self._made = kept
        return peers
