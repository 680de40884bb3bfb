"""The gRPC service that storage nodes offer one another: a shell over `PeerSide`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from holdfast_core.model.limits import BATCH_BLOCKS_MAX
from holdfast_proto.v1 import peers_pb2 as pb
from holdfast_storagenode.access import PEER_VERB, AccessControl
from holdfast_storagenode.batch import make_batch
from holdfast_storagenode.healing.serving import PeerSide
from holdfast_storagenode.metrics import NodeMetrics
from holdfast_storagenode.service import Context, ids_of, send_message, send_while_reading, shape_get
from holdfast_storagenode.wire import HandMessage


class PeerService:
    """Serves one node's peers, each under a capability that names it."""

    def __init__(self, side: PeerSide, access: AccessControl, metrics: NodeMetrics) -> None:
        self._side = side
        self._access = access
        self._metrics = metrics

    async def ComparePartitions(
        self, request: pb.ComparePartitionsRequest, context: Context
    ) -> pb.ComparePartitionsResponse:
        """Digest partitions."""
        caller = self._access.enter(context, PEER_VERB).node
        told = await self._side.compare(caller, list(request.partitions), layout_epoch=request.layout_epoch)
        response = pb.ComparePartitionsResponse(fenced_epoch=told.fenced_epoch)
        for held in told.holdings:
            entry = response.partitions.add()
            for holding in held:
                entry.holdings.add(tenant=holding.tenant, count=holding.count, digest=holding.digest)
        return response

    async def ListPartition(self, request: pb.ListPartitionRequest, context: Context) -> None:
        """List a tenant's blocks in some partitions, page by page."""
        capability = self._access.enter(context, PEER_VERB)
        left: Sequence[int] = tuple(request.partitions)
        after = b""
        while left:
            page, left = await self._side.page(capability.node, partitions=left, tenant=request.tenant, after=after)
            if page:
                after = page[-1].block_id
                await send_message(
                    context,
                    pb.ListPartitionResponse(
                        block_ids=b"".join(entry.block_id for entry in page),
                        lengths=[entry.length for entry in page],
                        stamps=[entry.stamp for entry in page],
                        kinds=bytes(entry.kind for entry in page),
                    ),
                )
            if left:
                self._access.recheck(capability)

    async def FetchBlocks(self, request: pb.FetchBlocksRequest, context: Context) -> None:
        """Send blocks in the order asked, reading the next batch while one is being sent."""
        capability = self._access.enter(context, PEER_VERB)
        tenant, ids = request.tenant, ids_of(request.block_ids)

        async def read(first: int) -> tuple[int, bytes]:
            count, answer = await self._side.fetch(
                capability.node,
                tenant=tenant,
                ids=ids[first : first + BATCH_BLOCKS_MAX],
                shape=partial(shape_get, first),
            )
            self._metrics.moved("to_peers", blocks=answer.block_count, size_bytes=answer.block_bytes)
            return count, answer.message

        await send_while_reading(context, read, id_count=len(ids), recheck=partial(self._access.recheck, capability))

    async def ConfirmBlocks(self, request: pb.ConfirmBlocksRequest, context: Context) -> pb.ConfirmBlocksResponse:
        """Say which blocks are durable here, and stamp them."""
        self._access.enter(context, PEER_VERB)
        verdicts = await self._side.confirm(
            tenant=request.tenant,
            ids=ids_of(request.block_ids),
            layout_epoch=request.layout_epoch,
            collection_epoch=request.collection_epoch,
        )
        return pb.ConfirmBlocksResponse(verdicts=bytes(verdicts))

    async def HandBlocks(self, request: HandMessage, context: Context) -> pb.HandBlocksResponse:
        """Take blocks that this node owns."""
        self._access.enter(context, PEER_VERB)
        head = request.head
        batch = make_batch(
            layout_epoch=head.layout_epoch, packed_ids=head.block_ids, lengths=head.lengths, data=request.blocks
        )
        verdicts = await self._side.hand(tenant=head.tenant, batch=batch, collection_epoch=head.collection_epoch)
        self._metrics.moved("from_peers", blocks=len(batch.ids), size_bytes=len(batch.data))
        return pb.HandBlocksResponse(verdicts=bytes(verdicts))
