"""What a node knows of its cluster: the id, the newest layout, and the keys that capabilities are signed with.

It comes from heartbeats' answers and is saved, so that a node which restarts while no coordinator answers still serves.
The cluster's id and the placement (seed and number of partitions) never change: an answer that says otherwise is from
somebody else and is refused, because the index and every key on disk depend on them.
"""

from __future__ import annotations

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.layout import Layout
from holdfast_core.runtime.capability import CapabilityVerifier
from holdfast_proto.v1.cluster_pb2 import HeartbeatResponse


class ClusterKnowledge:
    """Starts from what was saved. `judge` says what is new in an answer; once that is saved, `take` makes it count."""

    def __init__(self, saved: HeartbeatResponse | None = None) -> None:
        """Start from the saved answer.

        Raises:
            HoldfastError: as `Layout.from_message`.
        """
        self._known = HeartbeatResponse()
        self._layout: Layout | None = None
        self._verifier = CapabilityVerifier("", {})
        if saved is not None:
            self.take(saved)

    @property
    def cluster_id(self) -> str:
        """The cluster's id, "" before the first answer."""
        return self._known.cluster_id

    @property
    def layout(self) -> Layout | None:
        """The newest layout, None before the first."""
        return self._layout

    @property
    def layout_epoch(self) -> int:
        """Epoch of the newest layout, 0 before the first."""
        return 0 if self._layout is None else self._layout.epoch

    def partition_of(self, block_id: bytes) -> int:
        """Return the partition of a block; the same for the life of the cluster.

        Raises:
            HoldfastError: NOT_READY before the first layout.
        """
        if self._layout is None:
            raise HoldfastError(ErrorCode.NOT_READY, "the cluster has no layout yet")
        return self._layout.partition_of(block_id)

    @property
    def verifier(self) -> CapabilityVerifier:
        """Verifies capabilities of this cluster; of none before the first answer."""
        return self._verifier

    def judge(self, response: HeartbeatResponse) -> HeartbeatResponse | None:
        """Return what would be known after a coordinator's answer, None if that is nothing new. Changes nothing.

        Raises:
            HoldfastError: MISMATCH if the answer is from another cluster.
        """
        if self.cluster_id and response.cluster_id != self.cluster_id:
            raise HoldfastError(
                ErrorCode.MISMATCH,
                f"this node belongs to the cluster {self.cluster_id}, and the coordinator to {response.cluster_id}; "
                "check --coordinator and --data",
            )
        news = HeartbeatResponse(cluster_id=response.cluster_id, verifying_keys=response.verifying_keys)
        layout = self._newer_layout(response)
        if layout is not None:
            news.layout.CopyFrom(response.layout)
        elif self._known.HasField("layout"):
            news.layout.CopyFrom(self._known.layout)
        return None if news == self._known else news

    def take(self, known: HeartbeatResponse) -> None:
        """Make what `judge` returned count."""
        layout = Layout.from_message(known.layout) if known.HasField("layout") else None
        keys = {key.key_id: key.public_key for key in known.verifying_keys}
        self._verifier = CapabilityVerifier(known.cluster_id, keys)
        self._layout = layout
        self._known = known

    def _newer_layout(self, response: HeartbeatResponse) -> Layout | None:
        if not response.HasField("layout"):
            return None
        message, known = response.layout, self._layout
        if known is None:
            return Layout.from_message(message)
        if (message.seed, message.partitions) != (known.seed, known.partitions):
            raise HoldfastError(
                ErrorCode.MISMATCH,
                "the coordinator's layout has another seed or number of partitions than this node's blocks are filed "
                "under; these never change, so it is not this node's cluster",
            )
        # Every heartbeat brings the layout; only a newer one is worth parsing.
        return Layout.from_message(message) if message.epoch > known.epoch else None
