"""The nodes, as a sweep sees them: something that lists copies and deletes them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Final, Protocol

import grpc.aio

from holdfast_coordinator.collection.planning import ListedPage
from holdfast_coordinator.grants import Grants
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.names import split_ids
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.capability import CAPABILITY_METADATA_KEY
from holdfast_core.runtime.status import error_from_rpc
from holdfast_proto.v1.blocks_pb2 import DeleteBlocksRequest, ScanBlocksRequest
from holdfast_proto.v1.blocks_pb2_grpc import BlockServiceStub

LIST_TIMEOUT_S: Final = 600.0
DELETE_TIMEOUT_S: Final = 120.0


class NodeScanner(Protocol):
    """Lists and deletes copies of blocks on storage nodes, by node and tenant."""

    def listed(
        self, node_id: str, tenant: int, *, first: int, end: int, after: bytes
    ) -> AsyncGenerator[ListedPage, None]:
        """Yield what a node holds in the partitions from `first` to before `end`, above the id `after` (b"" for all).

        Copies that the node set aside as corrupt are among it, and named as such.

        Raises:
            HoldfastError: UNREACHABLE or what the node says; then a listing may go on behind the last id that came.
        """

    async def delete(self, node_id: str, tenant: int, block_ids: Sequence[bytes], *, cutoff: int) -> bytes:
        """Delete those of the blocks whose stamps lie below `cutoff`; return a `Verdict` byte each.

        Raises:
            HoldfastError: UNREACHABLE or what the node says: CONFLICT if it has seen a higher cut-off.
        """


class GrpcScanner:
    """A scanner over the nodes that a pool knows."""

    def __init__(self, pool: NodePool, grants: Callable[[int], Awaitable[Grants]], refresh: Callable[[], None]) -> None:
        """Bind to the nodes; `grants` mints a tenant's capabilities, `refresh` tells the pool where nodes are."""
        self._pool = pool
        self._grants = grants
        self._refresh = refresh

    async def listed(
        self, node_id: str, tenant: int, *, first: int, end: int, after: bytes
    ) -> AsyncGenerator[ListedPage, None]:
        """See `NodeScanner.listed`."""
        token = (await self._grants(tenant)).size_scanner()
        self._refresh()
        request = ScanBlocksRequest(partition=first, partition_count=end - first, after=after, with_quarantined=True)
        call = BlockServiceStub(self._pool.channel(node_id)).ScanBlocks(
            request, metadata=((CAPABILITY_METADATA_KEY, token),), timeout=LIST_TIMEOUT_S
        )
        try:
            async for answer in call:
                ids = split_ids(answer.block_ids)
                if len(answer.stamps) != len(ids) or len(answer.lengths) != len(ids):
                    # An older node, which would delete whatever the cut-off says.
                    raise HoldfastError(ErrorCode.NOT_READY, f"storage node {node_id} does not tell stamps; update it")
                if answer.quarantined and max(answer.quarantined) >= len(ids):
                    raise HoldfastError(
                        ErrorCode.INTERNAL, f"storage node {node_id} calls blocks corrupt that it does not list"
                    )
                quarantined = frozenset(ids[at] for at in answer.quarantined)
                yield ListedPage(ids, answer.lengths, answer.stamps, quarantined)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, peer=f"storage node {node_id}") from error
        finally:
            call.cancel()

    async def delete(self, node_id: str, tenant: int, block_ids: Sequence[bytes], *, cutoff: int) -> bytes:
        """See `NodeScanner.delete`."""
        token = (await self._grants(tenant)).deleter()
        self._refresh()
        try:
            answer = await BlockServiceStub(self._pool.channel(node_id)).DeleteBlocks(
                DeleteBlocksRequest(block_ids=b"".join(block_ids), cutoff=cutoff),
                metadata=((CAPABILITY_METADATA_KEY, token),),
                timeout=DELETE_TIMEOUT_S,
            )
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, peer=f"storage node {node_id}") from error
        verdicts: bytes = answer.verdicts
        if len(verdicts) != len(block_ids):
            raise HoldfastError(ErrorCode.INTERNAL, f"storage node {node_id} answered for another number of blocks")
        return verdicts
