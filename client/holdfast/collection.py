"""What collection answers: reports, why a block is kept, what forgetting would free; and the calls for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from holdfast_core.model.names import check_id, check_name
from holdfast_core.runtime.endpoints import Endpoints
from holdfast_proto.v1 import collection_pb2
from holdfast_proto.v1.collection_pb2_grpc import CollectionServiceStub

# Both calls that take it walk every tree of the tenant.
_WALK_TIMEOUT_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class CollectionReport:
    """What one collection found and did. Blocks count once, copies on every node that has one; sizes are sealed.

    Attributes:
        epoch: its number.
        dry_run: whether it only looked.
        phase: "marking", "sweeping", "done" or "failed".
        failure: why it failed; empty otherwise.
        started_unix_ms, ended_unix_ms: Unix times in milliseconds; the second is 0 while it runs.
        cutoff: blocks stamped in this epoch or later were let be: the lowest over all tenants.
        points, objects, sessions: what was marked from.
        marked_blocks: blocks that are reached.
        listed_copies: copies that nodes listed, those that are set aside as corrupt among them.
        garbage_copies, garbage_bytes: those that nothing reaches and that are to go.
        young_copies, young_bytes: those that nothing reaches yet, and that something may lean on.
        deleted_copies, deleted_bytes: those that were deleted.
        nodes_left_out: nodes that did not answer; what they hold is looked at next time.
        tenants_left_out: tenants of which nothing was deleted, with the reason.
        thin_blocks: reached blocks that fewer owners hold than the newest layout has.
        lost_blocks: reached blocks that no node has; recorded as damage.
    """

    epoch: int
    dry_run: bool
    phase: str
    failure: str
    started_unix_ms: int
    ended_unix_ms: int
    cutoff: int
    points: int
    objects: int
    sessions: int
    marked_blocks: int
    listed_copies: int
    garbage_copies: int
    garbage_bytes: int
    young_copies: int
    young_bytes: int
    deleted_copies: int
    deleted_bytes: int
    nodes_left_out: tuple[str, ...]
    tenants_left_out: dict[str, str]
    thin_blocks: int
    lost_blocks: int


CollectionProgress: TypeAlias = Callable[[CollectionReport], None]
"""Is called with the report of a collection while it runs."""


@dataclass(frozen=True, slots=True)
class CollectionState:
    """The collection under way, the last one that deleted, and the last dry run; None for none."""

    running: CollectionReport | None
    last: CollectionReport | None
    planned: CollectionReport | None


@dataclass(frozen=True, slots=True)
class StartedCollection:
    """A collection that runs now, and whether it ran already when it was asked for."""

    epoch: int
    joined: bool


@dataclass(frozen=True, slots=True)
class BlockHolder:
    """Something that reaches a block.

    Attributes:
        resource_id: id of a point, object or session.
        vm_id: VM of a point or session, empty otherwise.
        task_id: task of an object or session, empty otherwise.
        volume: volume, empty for an object or session.
        role: "data", "base" (a delta needs it) or "index".
        offset_bytes: first byte of the volume or object that the block is for; None where that cannot be said.
    """

    resource_id: str
    vm_id: str
    task_id: str
    volume: str
    role: str
    offset_bytes: int | None


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """A copy of a block: "ok", "missing", "corrupt" or "unreachable", and whether the node owns the block."""

    node_id: str
    state: str
    owner: bool


@dataclass(frozen=True, slots=True)
class BlockExplanation:
    """Why a block is kept.

    Attributes:
        holders: what reaches it, of what the caller may list; at most 1,000.
        more: whether there are more.
        copies: its copies by node.
        damaged: whether it is recorded as damaged.
    """

    holders: tuple[BlockHolder, ...]
    more: bool
    copies: tuple[BlockCopy, ...]
    damaged: bool


@dataclass(frozen=True, slots=True)
class ReclaimablePoint:
    """What forgetting one point alone would free: sealed bytes, one copy counted, and blocks."""

    point_id: str
    bytes: int
    blocks: int


@dataclass(frozen=True, slots=True)
class Reclaimable:
    """What forgetting all of some points would free.

    Attributes:
        points: each of them alone.
        bytes: sealed bytes that nothing would reach, one copy counted.
        blocks: how many blocks that are.
        copies_bytes: the bytes with all copies counted.
        estimated: whether the figures come from a sample.
    """

    points: tuple[ReclaimablePoint, ...]
    bytes: int
    blocks: int
    copies_bytes: int
    estimated: bool


_ODD_FIELDS = ("nodes_left_out", "tenants_left_out")


def collection_report(message: collection_pb2.CollectionReport) -> CollectionReport:
    """Return a report."""
    names = [name for name in CollectionReport.__dataclass_fields__ if name not in _ODD_FIELDS]
    return CollectionReport(
        nodes_left_out=tuple(message.nodes_left_out),
        tenants_left_out={skipped.tenant: skipped.reason for skipped in message.tenants_left_out},
        **{name: getattr(message, name) for name in names},
    )


def collection_state(answer: collection_pb2.GetCollectionResponse) -> CollectionState:
    """Return how collection stands."""
    return CollectionState(
        running=collection_report(answer.running) if answer.HasField("running") else None,
        last=collection_report(answer.last) if answer.HasField("last") else None,
        planned=collection_report(answer.planned) if answer.HasField("planned") else None,
    )


def block_explanation(answer: collection_pb2.ExplainBlockResponse) -> BlockExplanation:
    """Return why a block is kept."""
    return BlockExplanation(
        holders=tuple(
            BlockHolder(
                resource_id=holder.resource_id,
                vm_id=holder.vm_id,
                task_id=holder.task_id,
                volume=holder.volume,
                role=holder.role,
                offset_bytes=holder.offset_bytes if holder.HasField("offset_bytes") else None,
            )
            for holder in answer.holders
        ),
        more=answer.more,
        copies=tuple(BlockCopy(copy.node_id, copy.state, copy.owner) for copy in answer.copies),
        damaged=answer.damaged,
    )


def reclaimable(answer: collection_pb2.GetReclaimableResponse) -> Reclaimable:
    """Return what forgetting would free."""
    return Reclaimable(
        points=tuple(ReclaimablePoint(point.point_id, point.bytes, point.blocks) for point in answer.points),
        bytes=answer.bytes,
        blocks=answer.blocks,
        copies_bytes=answer.copies_bytes,
        estimated=answer.estimated,
    )


class CollectionRemote:
    """The coordinator's plain calls about collection. All methods raise HoldfastError as the coordinator says."""

    def __init__(self, endpoints: Endpoints) -> None:
        """Bind to the coordinators."""
        self._endpoints = endpoints

    async def start(self, *, dry_run: bool) -> StartedCollection:
        """Begin a collection, or find the one that is under way."""
        answer = await self._endpoints.call(
            lambda channel: CollectionServiceStub(channel).StartCollection,
            collection_pb2.StartCollectionRequest(dry_run=dry_run),
        )
        return StartedCollection(answer.epoch, answer.joined)

    async def state(self) -> CollectionState:
        """Return the collection under way, and the reports of the last ones."""
        answer = await self._endpoints.call(
            lambda channel: CollectionServiceStub(channel).GetCollection, collection_pb2.GetCollectionRequest()
        )
        return collection_state(answer)

    async def explain(self, block_id: bytes) -> BlockExplanation:
        """Return what keeps a block, and where its copies are."""
        answer = await self._endpoints.call(
            lambda channel: CollectionServiceStub(channel).ExplainBlock,
            collection_pb2.ExplainBlockRequest(block_id=block_id),
            timeout_s=_WALK_TIMEOUT_S,
        )
        return block_explanation(answer)

    async def reclaimable(self, vm_id: str, point_ids: Sequence[str]) -> Reclaimable:
        """Return what forgetting points of a VM would free; all that live if none is named."""
        request = collection_pb2.GetReclaimableRequest(
            vm_id=check_name(vm_id, "VM name"), point_ids=[check_id(point_id, "point id") for point_id in point_ids]
        )
        answer = await self._endpoints.call(
            lambda channel: CollectionServiceStub(channel).GetReclaimable, request, timeout_s=_WALK_TIMEOUT_S
        )
        return reclaimable(answer)
