"""What the SDK says of nodes and layouts: frozen values, how they come out of messages, and the calls for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from holdfast_core.model.layout import Layout
from holdfast_core.model.names import check_name
from holdfast_core.runtime.endpoints import Endpoints
from holdfast_proto.v1 import cluster_pb2, common_pb2
from holdfast_proto.v1.cluster_pb2_grpc import ClusterServiceStub


@dataclass(frozen=True, slots=True)
class NodeHealing:
    """What a node says of its copies.

    Attributes:
        synced_epoch: newest layout epoch of which it holds all that it has to; 0 for none.
        partitions: partitions that it owns in the newest layout that it knows.
        partitions_synced: those of them that it holds all of.
        partitions_at_risk: those that it does not, because too few former owners can be reached.
        foreign_blocks: blocks that it has to hand over before it lets go of them.
        unrepaired_blocks: blocks that it lacks or holds corrupt, and that no peer it reached could give.
        repaired_blocks: blocks that it got from peers since it started.
        repaired_bytes: their sealed bytes.
        scrub_permille: how much of its blocks the present round of scrubbing has read, in thousandths.
        scrubbed_unix_ms: when the last whole round ended; 0 for never.
        collection_epoch: newest collection epoch that it knows.
    """

    synced_epoch: int = 0
    partitions: int = 0
    partitions_synced: int = 0
    partitions_at_risk: int = 0
    foreign_blocks: int = 0
    unrepaired_blocks: int = 0
    repaired_blocks: int = 0
    repaired_bytes: int = 0
    scrub_permille: int = 0
    scrubbed_unix_ms: int = 0
    collection_epoch: int = 0


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """A storage node as the coordinator knows it.

    Attributes:
        layout_epoch: newest layout epoch under which, or a newer one, it takes every write.
        healing: what it says of its copies; told to who may see the whole cluster.
        draining: whether an operator drains it.
        out: whether layouts are made without it because it was down for too long; ends when it is back.
        weight_bytes: its weight in new layouts; 0 for its capacity.
    """

    node_id: str
    address: str
    zone: str
    up: bool
    full: bool
    capacity_bytes: int
    used_bytes: int
    free_bytes: int
    block_count: int
    quarantined_count: int
    last_seen_unix_ms: int
    layout_epoch: int
    healing: NodeHealing = NodeHealing()
    draining: bool = False
    out: bool = False
    weight_bytes: int = 0


@dataclass(frozen=True, slots=True)
class LayoutInfo:
    """A layout: how many owner slots each node has. `zones` and `slots` are by node id."""

    epoch: int
    partitions: int
    replicas: int
    zones: dict[str, str]
    slots: dict[str, int]


@dataclass(frozen=True, slots=True)
class LayoutState:
    """Living layouts, newest first, and how far the cluster is from its first one."""

    layouts: tuple[LayoutInfo, ...]
    nodes_expected: int
    nodes_registered: int


@dataclass(frozen=True, slots=True)
class LayoutPlan:
    """What applying the next layout would change; `previous_epoch` is what `apply_layout` takes."""

    layout: LayoutInfo
    previous_epoch: int
    slots_moved: int
    slots_total: int
    explanation: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NodeDecision:
    """What a change of a node came to: `plan` says what it moves (None before the first layout)."""

    plan: LayoutPlan | None
    applied: bool


@dataclass(frozen=True, slots=True)
class LayoutChange:
    """One change of the layout.

    Attributes:
        epoch: the epoch that it made.
        made_unix_ms: when.
        settled_unix_ms: when it was the only living one, or a newer one was; 0 while older ones live.
        reason: why, a phrase.
        slots_moved: owner slots that moved.
        slots_total: owner slots in all.
        joined: nodes that came in.
        left: nodes that went out.
    """

    epoch: int
    made_unix_ms: int
    settled_unix_ms: int
    reason: str
    slots_moved: int
    slots_total: int
    joined: tuple[str, ...]
    left: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """How the cluster is; `state` is "ready" or a sentence: what it waits for, what is at risk, how far it has healed.

    While it heals it takes writes and reads as ever; `writable` says whether it does.
    """

    cluster_id: str
    state: str
    writable: bool
    layout_epoch: int
    replicas: int
    nodes: tuple[NodeInfo, ...]
    vm_count: int
    point_count: int
    object_count: int
    session_count: int


def node_info(status: common_pb2.NodeStatus) -> NodeInfo:
    """Return a node."""
    decided = {"healing", "draining", "out", "weight_bytes"}
    plain = {name: getattr(status, name) for name in NodeInfo.__dataclass_fields__ if name not in decided}
    healing = NodeHealing(**{name: getattr(status.healing, name) for name in NodeHealing.__dataclass_fields__})
    state = status.state
    return NodeInfo(**plain, healing=healing, draining=state.draining, out=state.out, weight_bytes=state.weight_bytes)


def layout_info(message: common_pb2.Layout) -> LayoutInfo:
    """Return a layout in numbers."""
    layout = Layout.from_message(message)
    slots = {node.node_id: 0 for node in layout.nodes}
    for partition in range(layout.partitions):
        for node_id in layout.owners_of(partition):
            slots[node_id] += 1
    zones = {node.node_id: node.zone for node in layout.nodes}
    return LayoutInfo(
        epoch=layout.epoch, partitions=layout.partitions, replicas=layout.replicas, zones=zones, slots=slots
    )


def layout_state(answer: cluster_pb2.GetLayoutResponse) -> LayoutState:
    """Return the living layouts."""
    return LayoutState(
        layouts=tuple(layout_info(layout) for layout in answer.layouts),
        nodes_expected=answer.nodes_expected,
        nodes_registered=answer.nodes_registered,
    )


def layout_plan(answer: cluster_pb2.PlanLayoutResponse) -> LayoutPlan:
    """Return a plan."""
    return LayoutPlan(
        layout=layout_info(answer.layout),
        previous_epoch=answer.previous_epoch,
        slots_moved=answer.slots_moved,
        slots_total=answer.slots_total,
        explanation=tuple(answer.explanation),
    )


def node_decision(answer: cluster_pb2.SetNodeResponse) -> NodeDecision:
    """Return what a change of a node came to."""
    return NodeDecision(plan=layout_plan(answer.plan) if answer.HasField("plan") else None, applied=answer.applied)


def layout_change(change: cluster_pb2.LayoutChange) -> LayoutChange:
    """Return one change of the layout."""
    lists = ("joined", "left")
    plain = {name: getattr(change, name) for name in LayoutChange.__dataclass_fields__ if name not in lists}
    return LayoutChange(**plain, joined=tuple(change.joined), left=tuple(change.left))


def cluster_status(answer: cluster_pb2.GetClusterStatusResponse) -> ClusterStatus:
    """Return how the cluster is."""
    plain: Sequence[str] = [name for name in ClusterStatus.__dataclass_fields__ if name != "nodes"]
    return ClusterStatus(
        nodes=tuple(node_info(node) for node in answer.nodes), **{name: getattr(answer, name) for name in plain}
    )


class ClusterRemote:
    """The coordinator's plain calls about the cluster. All methods raise HoldfastError as the coordinator says."""

    def __init__(self, endpoints: Endpoints) -> None:
        """Bind to the coordinators."""
        self._endpoints = endpoints

    async def cluster_status(self) -> ClusterStatus:
        """Return how the cluster is."""
        answer = await self._endpoints.call(
            lambda channel: ClusterServiceStub(channel).GetClusterStatus, cluster_pb2.GetClusterStatusRequest()
        )
        return cluster_status(answer)

    async def nodes(self) -> list[NodeInfo]:
        """Return the registered nodes by name."""
        answer = await self._endpoints.call(
            lambda channel: ClusterServiceStub(channel).ListNodes, cluster_pb2.ListNodesRequest()
        )
        return [node_info(node) for node in answer.nodes]

    async def layout(self) -> LayoutState:
        """Return the living layouts."""
        answer = await self._endpoints.call(
            lambda channel: ClusterServiceStub(channel).GetLayout, cluster_pb2.GetLayoutRequest()
        )
        return layout_state(answer)

    async def plan_layout(self, remove: Sequence[str]) -> LayoutPlan:
        """Return what the next layout would change."""
        answer = await self._endpoints.call(
            lambda channel: ClusterServiceStub(channel).PlanLayout,
            cluster_pb2.PlanLayoutRequest(remove_node_ids=remove),
        )
        return layout_plan(answer)

    async def apply_layout(self, previous_epoch: int, remove: Sequence[str]) -> LayoutInfo:
        """Make the planned layout the newest."""
        answer = await self._endpoints.call(
            lambda channel: ClusterServiceStub(channel).ApplyLayout,
            cluster_pb2.ApplyLayoutRequest(previous_epoch=previous_epoch, remove_node_ids=remove),
        )
        return layout_info(answer.layout)

    async def set_node(
        self, node_id: str, *, draining: bool | None, weight_bytes: int | None, dry_run: bool
    ) -> NodeDecision:
        """Change what is decided of a node."""
        request = cluster_pb2.SetNodeRequest(
            node_id=check_name(node_id, "node name"), draining=draining, weight_bytes=weight_bytes, dry_run=dry_run
        )
        answer = await self._endpoints.call(lambda channel: ClusterServiceStub(channel).SetNode, request)
        return node_decision(answer)

    async def remove_node(self, node_id: str, *, lost: bool) -> None:
        """End a node's membership."""
        request = cluster_pb2.RemoveNodeRequest(node_id=check_name(node_id, "node name"), lost=lost)
        await self._endpoints.call(lambda channel: ClusterServiceStub(channel).RemoveNode, request)

    async def layout_history(self) -> list[LayoutChange]:
        """Return how layouts followed one another, newest first."""
        answer = await self._endpoints.call(
            lambda channel: ClusterServiceStub(channel).GetLayoutHistory, cluster_pb2.GetLayoutHistoryRequest()
        )
        return [layout_change(change) for change in answer.changes]
