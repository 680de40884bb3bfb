"""What a node knows of its cluster: the id, the living layouts, the grant, the keys that capabilities are signed with.

It comes from heartbeats' answers and is saved, so that a node which restarts while no coordinator answers still serves.
Who else is there, and the token to call them with, are not saved: they are old as soon as they are written.

The cluster's id and the placement (seed and number of partitions) never change: an answer that says otherwise is from
somebody else and is refused, because the index and every key on disk depend on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.layout import Layout
from holdfast_core.runtime.capability import CapabilityVerifier
from holdfast_proto.v1.cluster_pb2 import HeartbeatResponse
from holdfast_proto.v1.common_pb2 import NodeStatus
from holdfast_storagenode.living import Living


class ClusterKnowledge:
    """Starts from what was saved. `judge` says what is new in an answer; once that is saved, `take` makes it count."""

    def __init__(self, saved: HeartbeatResponse | None = None) -> None:
        """Start from the saved answer.

        Raises:
            HoldfastError: as `Layout.from_message`.
        """
        self._known = HeartbeatResponse()
        self._living: Living | None = None
        self._verifier = CapabilityVerifier("", {})
        self._peer_capability = ""
        self._peers: Mapping[str, NodeStatus] = MappingProxyType({})
        self._registered: frozenset[str] | None = None
        if saved is not None:
            self.take(saved)

    @property
    def cluster_id(self) -> str:
        """The cluster's id, "" before the first answer."""
        return self._known.cluster_id

    @property
    def living(self) -> Living | None:
        """The living layouts, None before the first; another object whenever they change."""
        return self._living

    @property
    def layout(self) -> Layout | None:
        """The newest layout, None before the first."""
        return None if self._living is None else self._living.newest

    @property
    def layout_epoch(self) -> int:
        """Epoch of the newest layout, 0 before the first."""
        return 0 if self._living is None else self._living.newest.epoch

    @property
    def layout_revision(self) -> int:
        """Revision of the layout set that is known, 0 for none."""
        return self._known.layout_revision

    @property
    def peers(self) -> Mapping[str, NodeStatus]:
        """The other nodes by name, as a coordinator said last in this process's life."""
        return self._peers

    @property
    def registered(self) -> frozenset[str] | None:
        """The names of all nodes that the cluster has, None before the first answer in this process's life."""
        return self._registered

    @property
    def peer_capability(self) -> str:
        """Token for calls to other nodes, "" before the first answer in this process's life."""
        return self._peer_capability

    def partition_of(self, block_id: bytes) -> int:
        """Return the partition of a block; the same for the life of the cluster.

        Raises:
            HoldfastError: NOT_READY before the first layout.
        """
        if self._living is None:
            raise HoldfastError(ErrorCode.NOT_READY, "the cluster has no layout yet")
        return self._living.newest.partition_of(block_id)

    @property
    def verifier(self) -> CapabilityVerifier:
        """Verifies capabilities of this cluster; of none before the first answer."""
        return self._verifier

    def judge(self, response: HeartbeatResponse) -> HeartbeatResponse | None:
        """Return what would be known after a coordinator's answer, None if that is nothing new. Changes nothing.

        Raises:
            HoldfastError: MISMATCH if the answer is from another cluster; CORRUPT for a layout that contradicts itself.
        """
        if self.cluster_id and response.cluster_id != self.cluster_id:
            raise HoldfastError(
                ErrorCode.MISMATCH,
                f"this node belongs to the cluster {self.cluster_id}, and the coordinator to {response.cluster_id}; "
                "check --coordinator and --data",
            )
        self._check_placement(response)
        layouts = response if self._brings_layouts(response) else self._known
        # A grant may come or go while the layouts stay: a node that is out has none.
        present = response.layout_revision == layouts.layout_revision
        news = HeartbeatResponse(
            cluster_id=response.cluster_id,
            verifying_keys=response.verifying_keys,
            layout=layouts.layout if layouts.HasField("layout") else None,
            layout_revision=layouts.layout_revision,
            older_layouts=layouts.older_layouts,
            granted_epoch=response.granted_epoch if present else layouts.granted_epoch,
        )
        if news == self._known:
            return None
        # Read before it is saved: what cannot be read must not be.
        _living(news)
        return news

    def take(self, known: HeartbeatResponse) -> None:
        """Make what `judge` returned count.

        Raises:
            HoldfastError: CORRUPT for a layout that contradicts itself.
        """
        living = _living(known)
        keys = {key.key_id: key.public_key for key in known.verifying_keys}
        self._verifier = CapabilityVerifier(known.cluster_id, keys)
        if living != self._living:
            self._living = living
        self._known = known

    def hear(self, response: HeartbeatResponse) -> None:
        """Take over what an answer says of the moment: the other nodes, and the token to call them with."""
        self._peer_capability = response.peer_capability
        self._peers = MappingProxyType({node.node_id: node for node in response.nodes})
        # No coordinator that knows of peers names none: it has just heard from this node.
        self._registered = frozenset(self._peers) if self._peers else None

    def _check_placement(self, response: HeartbeatResponse) -> None:
        known = self.layout
        if known is None:
            return
        brought = [response.layout] if response.HasField("layout") else []
        for message in (*brought, *response.older_layouts):
            if (message.seed, message.partitions) != (known.seed, known.partitions):
                raise HoldfastError(
                    ErrorCode.MISMATCH,
                    "the coordinator's layout has another seed or number of partitions than this node's blocks are "
                    "filed under; these never change, so it is not this node's cluster",
                )

    def _brings_layouts(self, response: HeartbeatResponse) -> bool:
        """Whether an answer has layouts that are not older than what is known; they never go back."""
        return response.HasField("layout") and (response.layout.epoch, response.layout_revision) >= (
            self.layout_epoch,
            self.layout_revision,
        )


def _living(known: HeartbeatResponse) -> Living | None:
    """Read the layouts of what is known.

    Raises:
        HoldfastError: CORRUPT for one that contradicts itself.
    """
    if not known.HasField("layout"):
        return None
    messages = (known.layout, *known.older_layouts)
    return Living(tuple(Layout.from_message(message) for message in messages), known.granted_epoch)
