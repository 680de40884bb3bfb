"""A block store that is really a node reached over gRPC, so that the conformance suite runs on it too."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from holdfast_core.model.block import verify
from holdfast_core.runtime.capability import CapabilitySigner
from holdfast_proto.v1 import blocks_pb2 as pb
from holdfast_storagenode.segments.record import STAMP_MAX
from holdfast_storagenode.store import BlockEntry, Found, Holding, Sealed, StoreStatus, Verdict, kind_of
from tests.storagenode.cluster import LoopThread, NodeClient, mint

Answer = TypeVar("Answer")

NOT_ON_THE_WIRE = "the block service does not offer it"


def batch_of(blocks: Sequence[Sealed], *, sequence: int = 0, layout_epoch: int = 1) -> pb.PutBlocksRequest:
    """Return the message that puts `blocks`."""
    return pb.PutBlocksRequest(
        sequence=sequence,
        layout_epoch=layout_epoch,
        block_ids=b"".join(block.id for block in blocks),
        lengths=[len(block.data) for block in blocks],
        blocks=b"".join(block.data for block in blocks),
    )


def unpack(responses: Sequence[pb.GetBlocksResponse], ids: Sequence[bytes]) -> list[Found]:
    """Return what GetBlocks answered, one item an id."""
    found: list[Found] = []
    for response in responses:
        assert response.first == len(found)
        at = 0
        for verdict, length in zip(response.verdicts, response.lengths, strict=True):
            if verdict == Verdict.OK:
                found.append(verify(ids[len(found)], response.blocks[at : at + length]))
                at += length
            else:
                assert length == 0
                found.append(Verdict(verdict))
        assert at == len(response.blocks)
    return found


class RemoteStore:
    """A `BlockStore` that speaks to one node with capabilities that it mints itself."""

    def __init__(self, loop: LoopThread, address: str, signer: CapabilitySigner) -> None:
        self._loop = loop
        self._address = address
        self._signer = signer

    def put(self, tenant: int, blocks: Sequence[Sealed], *, stamp: int = 0) -> list[Verdict]:
        (answer,) = self._loop.run(self._with(tenant, lambda client: client.put([batch_of(blocks)]), stamp))
        return [Verdict(verdict) for verdict in answer.verdicts]

    def get(self, tenant: int, ids: Sequence[bytes], *, bytes_max: int) -> list[Found]:
        request = pb.GetBlocksRequest(block_ids=b"".join(ids))
        responses = self._loop.run(self._with(tenant, lambda client: client.stream("GetBlocks", request)))
        found = unpack(responses, ids)
        assert len(found) == len(ids)
        size = 0
        for at, item in enumerate(found):
            size += 0 if isinstance(item, Verdict) else len(item.data)
            if size > bytes_max and at:
                return found[:at]
        return found

    def has(self, tenant: int, ids: Sequence[bytes], *, verify: bool = False, stamp: int = 0) -> list[Verdict]:
        request = pb.HasBlocksRequest(block_ids=b"".join(ids), verify=verify)
        answer = self._loop.run(self._with(tenant, lambda client: client.call("HasBlocks", request), stamp))
        return [Verdict(verdict) for verdict in answer.verdicts]

    def kinds(self, tenant: int, ids: Sequence[bytes]) -> list[int | None]:
        found = self.get(tenant, ids, bytes_max=1 << 30)
        return [None if isinstance(item, Verdict) else kind_of(item.data) for item in found]

    def delete(self, tenant: int, ids: Sequence[bytes], *, cutoff: int | None = None) -> list[Verdict]:
        request = pb.DeleteBlocksRequest(block_ids=b"".join(ids), cutoff=STAMP_MAX if cutoff is None else cutoff)
        answer = self._loop.run(self._with(tenant, lambda client: client.call("DeleteBlocks", request)))
        return [Verdict(verdict) for verdict in answer.verdicts]

    def scan(
        self,
        tenant: int,
        *,
        partition: int | None,
        end: int | None = None,
        after: bytes,
        limit: int,
        with_quarantined: bool = False,
    ) -> list[BlockEntry]:
        request = pb.ScanBlocksRequest(after=after, limit=limit, with_quarantined=with_quarantined)
        if partition is not None:
            request.partition = partition
            request.partition_count = 0 if end is None else end - partition
        responses = self._loop.run(self._with(tenant, lambda client: client.stream("ScanBlocks", request)))
        listed = [
            (response.block_ids[32 * at : 32 * at + 32], length, response.stamps[at], at in response.quarantined)
            for response in responses
            for at, length in enumerate(response.lengths)
        ]
        kinds = self.kinds(tenant, [block_id for block_id, *_ in listed])
        return [
            BlockEntry(block_id, length, kind or 0, stamp, quarantined)
            for (block_id, length, stamp, quarantined), kind in zip(listed, kinds, strict=True)
        ]

    def tenants(self) -> list[int]:
        raise NotImplementedError(NOT_ON_THE_WIRE)

    def holdings(self, partition: int) -> list[Holding]:
        raise NotImplementedError(NOT_ON_THE_WIRE)

    def quarantined(self, *, limit: int) -> list[tuple[int, bytes]]:
        raise NotImplementedError(NOT_ON_THE_WIRE)

    @property
    def epoch(self) -> int:
        raise NotImplementedError(NOT_ON_THE_WIRE)

    def learn_epoch(self, epoch: int) -> None:
        raise NotImplementedError(NOT_ON_THE_WIRE)

    def raise_floor(self, partitions: Sequence[int], epoch: int) -> None:
        raise NotImplementedError(NOT_ON_THE_WIRE)

    def status(self) -> StoreStatus:
        request = pb.GetNodeStatusRequest()
        answer = self._loop.run(self._with(1, lambda client: client.call("GetNodeStatus", request)))
        return StoreStatus(
            capacity_bytes=answer.status.capacity_bytes,
            used_bytes=answer.status.used_bytes,
            free_bytes=answer.status.free_bytes,
            block_count=answer.status.block_count,
            quarantined_count=answer.status.quarantined_count,
            full=answer.status.full,
            failed=False,
        )

    def close(self) -> None:
        return None

    async def _with(self, tenant: int, work: Callable[[NodeClient], Awaitable[Answer]], stamp: int = 0) -> Answer:
        client = NodeClient(self._address, mint(self._signer, tenant=tenant, collection_epoch=stamp))
        try:
            return await work(client)
        finally:
            await client.close()
