"""CollectionService: the gRPC shell around collections and questions about blocks. Decides nothing itself."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Final, TypeAlias

import grpc.aio

from holdfast_coordinator.access.call import Call, current_call
from holdfast_coordinator.collection.explaining import AS_INDEX, Hits, hits_of, holders
from holdfast_coordinator.collection.graph import Graph, read_graph
from holdfast_coordinator.collection.held import HeldTree, held_trees
from holdfast_coordinator.collection.reclaimable import Exclusive, LeafSample, exclusive_to
from holdfast_coordinator.collection.running import Collections
from holdfast_coordinator.ownership import APP_LIST, POINT_LIST, check_may, of_tenant, of_vm
from holdfast_coordinator.reach import sealed_lengths
from holdfast_coordinator.tenant import Tenant
from holdfast_coordinator.view import ClusterState, ClusterView
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import BLOCK_ID_BYTES
from holdfast_core.model.names import check_name
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.blocks.reader import BlockReader
from holdfast_core.runtime.metadata.store import MetadataStore
from holdfast_proto.v1 import collection_pb2 as pb
from holdfast_proto.v1.blocks_pb2 import VERDICT_CORRUPT, VERDICT_OK
from holdfast_proto.v1.collection_pb2_grpc import CollectionServiceServicer

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
_CLUSTER: Final = "cluster"
_COPY_STATES: Final[Mapping[int, str]] = {VERDICT_OK: "ok", VERDICT_CORRUPT: "corrupt"}


class CollectionService(CollectionServiceServicer):
    """Collections of the whole cluster, and what holds the blocks of the tenant that a call is made in."""

    def __init__(self, store: MetadataStore, collections: Collections, view: ClusterView, pool: NodePool) -> None:
        """Bind to the logic and to the nodes."""
        self._store = store
        self._collections = collections
        self._view = view
        self._pool = pool

    async def StartCollection(self, request: pb.StartCollectionRequest, context: Context) -> pb.StartCollectionResponse:
        """Begin a collection, or find the one that is under way."""
        call = current_call()
        call.require(_CLUSTER)
        call.entry.details["dry_run"] = str(request.dry_run).lower()
        epoch, joined = await self._collections.begin(call.entry, dry_run=request.dry_run)
        return pb.StartCollectionResponse(epoch=epoch, joined=joined)

    async def GetCollection(self, request: pb.GetCollectionRequest, context: Context) -> pb.GetCollectionResponse:
        """Say how collection stands."""
        current_call().require(_CLUSTER)
        reports = await self._collections.reports()
        return pb.GetCollectionResponse(running=reports.running, last=reports.last, planned=reports.planned)

    async def ExplainBlock(self, request: pb.ExplainBlockRequest, context: Context) -> pb.ExplainBlockResponse:
        """Say what holds a block, of what the caller may list, and where its copies are."""
        call = current_call()
        call.require(of_tenant(call.entry.tenant))
        block_id = request.block_id
        if len(block_id) != BLOCK_ID_BYTES:
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"a block id has {BLOCK_ID_BYTES} bytes")
        call.entry.details["block"] = block_id.hex()
        state = await self._fresh()
        trees = await self._trees(call)
        graph: Graph[Hits] = await read_graph(
            (tree.root for tree in trees),
            self._reader(call.of, state).fetch,
            call.of.ring.opener(),
            lambda leaf: hits_of(leaf, block_id),
            given={block_id: AS_INDEX},
        )
        found, more = holders(trees, graph)
        return pb.ExplainBlockResponse(
            holders=found,
            more=more,
            copies=await self._copies(call.of, state, block_id),
            damaged=await self._store.get(call.of.space.damaged_block(block_id)) is not None,
        )

    async def GetReclaimable(self, request: pb.GetReclaimableRequest, context: Context) -> pb.GetReclaimableResponse:
        """Say what forgetting points of a VM would free."""
        call = current_call()
        call.require(of_vm(check_name(request.vm_id, "VM name")))
        check_may(call, POINT_LIST, of_vm(request.vm_id))
        point_ids = await self._living(call.of, request.vm_id, list(request.point_ids))
        state = await self._fresh()
        trees = await held_trees(
            self._store, call.of.space, may_see_points=lambda _: True, may_see_objects=lambda _: True
        )
        roots: dict[str, list[bytes]] = {point_id: [] for point_id in point_ids}
        others: list[bytes] = []
        for tree in trees:
            (others if tree.is_session else roots.get(tree.resource_id, others)).append(tree.root)
        sample = LeafSample()
        graph = await read_graph(
            (tree.root for tree in trees), self._reader(call.of, state).fetch, call.of.ring.opener(), sample.keep
        )
        exclusive = exclusive_to(list(roots.values()), others, graph, sample.bits)
        nodes = [node.node_id for node in state.nodes if node.up]
        lengths = await sealed_lengths(self._pool, nodes, call.of.grants.size_scanner(), set(exclusive.together))
        return _answer(point_ids, exclusive, lengths, bits=sample.bits, replicas=_replicas(state))

    async def _living(self, tenant: Tenant, vm_id: str, point_ids: list[str]) -> list[str]:
        """Return the points to look at: those named, or all that live."""
        points = {stored.message.point_id: stored.message for stored in await tenant.points.of_vm(vm_id)}
        if not points:
            await tenant.vms.get(vm_id)
        for point_id in point_ids:
            if point_id not in points or points[point_id].forgotten:
                raise HoldfastError(ErrorCode.NOT_FOUND, f"there is no living point {point_id} of the VM {vm_id}")
        return list(dict.fromkeys(point_ids)) or [name for name, point in points.items() if not point.forgotten]

    async def _trees(self, call: Call) -> list[HeldTree]:
        return await held_trees(
            self._store,
            call.of.space,
            may_see_points=partial(call.may, POINT_LIST),
            may_see_objects=partial(call.may, APP_LIST),
        )

    async def _fresh(self) -> ClusterState:
        await self._view.current_layouts()
        self._pool.update(self._view.state.nodes)
        return self._view.state

    def _reader(self, tenant: Tenant, state: ClusterState) -> BlockReader:
        return BlockReader(self._pool, lambda: state.layout_set.layouts, tenant.grants.index_reader)

    async def _copies(self, tenant: Tenant, state: ClusterState, block_id: bytes) -> list[pb.BlockCopy]:
        """Let every node read and hash its copy; those that have none and own none are left out."""
        newest = state.layout_set.newest
        owners = newest.owners_of_block(block_id) if newest else ()
        states: dict[str, str] = {}

        async def ask(node_id: str) -> None:
            try:
                verdicts = await self._pool.has_blocks(node_id, block_id, tenant.grants.presence_asker(), verify=True)
            except HoldfastError as error:
                if error.code is not ErrorCode.UNREACHABLE:
                    raise
                states[node_id] = "unreachable"
                return
            states[node_id] = _COPY_STATES.get(verdicts[0], "missing")

        async with plain_task_group() as group:
            for node in state.nodes:
                group.create_task(ask(node.node_id))
        return [
            pb.BlockCopy(node_id=node_id, state=found, owner=node_id in owners)
            for node_id, found in sorted(states.items())
            if node_id in owners or found != "missing"
        ]


def _replicas(state: ClusterState) -> int:
    newest = state.layout_set.newest
    return newest.replicas if newest else 0


def _answer(
    point_ids: list[str], exclusive: Exclusive, lengths: dict[bytes, int], *, bits: int, replicas: int
) -> pb.GetReclaimableResponse:
    """Add up; a sampled id stands for 2**bits. Pure."""
    scale = 1 << bits

    def size(ids: frozenset[bytes]) -> int:
        return scale * sum(lengths.get(block_id, 0) for block_id in ids)

    total = size(exclusive.together)
    return pb.GetReclaimableResponse(
        points=[
            pb.ReclaimablePoint(point_id=point_id, bytes=size(ids), blocks=scale * len(ids))
            for point_id, ids in zip(point_ids, exclusive.alone, strict=True)
        ],
        bytes=total,
        blocks=scale * len(exclusive.together),
        copies_bytes=total * replicas,
        estimated=bits > 0,
    )
