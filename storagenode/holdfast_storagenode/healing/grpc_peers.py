"""A node's peers over gRPC, under the token that heartbeats bring."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, Final, TypeVar, cast

import grpc.aio
from google.protobuf.message import Message

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import RPC_TIMEOUT_S
from holdfast_core.model.names import split_ids
from holdfast_core.runtime.blocks.wire import GetAnswer, decode_get
from holdfast_core.runtime.capability import CAPABILITY_METADATA_KEY
from holdfast_core.runtime.channels import Channels
from holdfast_core.runtime.options import TlsFiles
from holdfast_core.runtime.requests import request_metadata
from holdfast_core.runtime.status import error_from_rpc
from holdfast_proto.v1 import peers_pb2 as pb
from holdfast_storagenode.batch import Batch
from holdfast_storagenode.cluster import ClusterKnowledge
from holdfast_storagenode.healing.peers import Comparison, Fetched
from holdfast_storagenode.store import BlockEntry, Holding, Verdict
from holdfast_storagenode.wire import PEER_SERVICE_NAME

Answer = TypeVar("Answer")

_VERDICTS: Final = frozenset(int(verdict) for verdict in Verdict)


class GrpcPeers:
    """Channels to a node's peers; see `Peers`. Made inside its event loop, and closed with `close`."""

    def __init__(self, cluster: ClusterKnowledge, *, tls: TlsFiles | None = None) -> None:
        """Call the nodes that `cluster` knows.

        Raises:
            HoldfastError: INVALID_ARGUMENT if the TLS files cannot be used.
        """
        self._cluster = cluster
        self._channels = Channels(tls)

    async def compare(self, node_id: str, partitions: Sequence[int], *, layout_epoch: int) -> Comparison:
        """See `Peers`."""
        request = pb.ComparePartitionsRequest(partitions=partitions, layout_epoch=layout_epoch)
        answer = await self._call(node_id, "ComparePartitions", request, pb.ComparePartitionsResponse.FromString)
        return Comparison(
            answer.fenced_epoch,
            tuple(
                tuple(Holding(held.tenant, held.count, held.digest) for held in partition.holdings)
                for partition in answer.partitions
            ),
        )

    async def listing(
        self, node_id: str, *, partitions: Sequence[int], tenant: int
    ) -> AsyncGenerator[list[BlockEntry], None]:
        """See `Peers`."""
        request = pb.ListPartitionRequest(partitions=partitions, tenant=tenant)
        pages = self._stream(node_id, "ListPartition", request, pb.ListPartitionResponse.FromString)
        async with aclosing(pages):
            async for page in pages:
                ids = split_ids(page.block_ids)
                if not len(ids) == len(page.lengths) == len(page.stamps) == len(page.kinds):
                    raise _broken(node_id)
                yield [
                    BlockEntry(block_id, length, kind, stamp)
                    for block_id, length, kind, stamp in zip(ids, page.lengths, page.kinds, page.stamps, strict=True)
                ]

    async def fetch(self, node_id: str, *, tenant: int, ids: Sequence[bytes], bytes_max: int) -> list[Fetched]:
        """See `Peers`."""
        request = pb.FetchBlocksRequest(tenant=tenant, block_ids=b"".join(ids))
        items: list[Fetched] = []
        size = 0
        answers = self._stream(node_id, "FetchBlocks", request, decode_get)
        async with aclosing(answers):
            async for answer in answers:
                size += len(answer.blocks)
                if answer.first != len(items) or len(items) + len(answer.verdicts) > len(ids) or size > bytes_max:
                    raise _broken(node_id)
                items.extend(_unpack(answer, node_id))
        if len(items) != len(ids):
            raise _broken(node_id)
        return items

    async def confirm(
        self, node_id: str, *, tenant: int, ids: Sequence[bytes], layout_epoch: int, collection_epoch: int
    ) -> list[Verdict]:
        """See `Peers`."""
        request = pb.ConfirmBlocksRequest(
            tenant=tenant, block_ids=b"".join(ids), layout_epoch=layout_epoch, collection_epoch=collection_epoch
        )
        answer = await self._call(node_id, "ConfirmBlocks", request, pb.ConfirmBlocksResponse.FromString)
        return _verdicts(answer.verdicts, node_id, count=len(ids))

    async def hand(self, node_id: str, *, tenant: int, batch: Batch, collection_epoch: int) -> list[Verdict]:
        """See `Peers`."""
        request = pb.HandBlocksRequest(
            tenant=tenant,
            layout_epoch=batch.layout_epoch,
            block_ids=b"".join(batch.ids),
            lengths=batch.lengths,
            blocks=bytes(batch.data),
            collection_epoch=collection_epoch,
        )
        answer = await self._call(node_id, "HandBlocks", request, pb.HandBlocksResponse.FromString)
        return _verdicts(answer.verdicts, node_id, count=len(batch.ids))

    async def close(self) -> None:
        """Close every channel; calls under way fail."""
        await self._channels.close()

    async def _call(self, node_id: str, method: str, request: Message, read: Callable[[bytes], Answer]) -> Answer:
        call = (await self._channel(node_id)).unary_unary(
            f"/{PEER_SERVICE_NAME}/{method}", request_serializer=_serialize, response_deserializer=read
        )
        try:
            return await call(request, metadata=self._metadata(), timeout=RPC_TIMEOUT_S)
        except grpc.aio.AioRpcError as failure:
            raise error_from_rpc(failure, peer=f"storage node {node_id}") from failure

    async def _stream(
        self, node_id: str, method: str, request: Message, read: Callable[[bytes], Answer]
    ) -> AsyncGenerator[Answer, None]:
        """Yield the answers of a call as they come; each is waited for `RPC_TIMEOUT_S` at most."""
        open_call = (await self._channel(node_id)).unary_stream(
            f"/{PEER_SERVICE_NAME}/{method}", request_serializer=_serialize, response_deserializer=read
        )
        call: Any = open_call(request, metadata=self._metadata())
        try:
            while True:
                async with asyncio.timeout(RPC_TIMEOUT_S):
                    answer = await call.read()
                if answer is grpc.aio.EOF:
                    return
                yield cast("Answer", answer)
        except grpc.aio.AioRpcError as failure:
            raise error_from_rpc(failure, peer=f"storage node {node_id}") from failure
        except TimeoutError as failure:
            raise HoldfastError(
                ErrorCode.UNREACHABLE, f"storage node {node_id} did not answer within {RPC_TIMEOUT_S:g} s"
            ) from failure
        finally:
            call.cancel()

    async def _channel(self, node_id: str) -> grpc.aio.Channel:
        await self._channels.tidy()
        node = self._cluster.peers.get(node_id)
        if node is None or not node.address or not self._cluster.peer_capability:
            raise HoldfastError(
                ErrorCode.UNREACHABLE, f"no coordinator has said yet how storage node {node_id} is reached"
            )
        return self._channels.to(node.address)

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (*request_metadata(), (CAPABILITY_METADATA_KEY, self._cluster.peer_capability))


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _unpack(answer: GetAnswer, node_id: str) -> list[Fetched]:
    verdicts = _verdicts(answer.verdicts, node_id, count=len(answer.lengths))
    items: list[Fetched] = []
    at = 0
    for verdict, length in zip(verdicts, answer.lengths, strict=True):
        items.append(answer.blocks[at : at + length] if verdict is Verdict.OK else verdict)
        at += length
    return items


def _verdicts(packed: bytes, node_id: str, *, count: int) -> list[Verdict]:
    if len(packed) != count or not _VERDICTS.issuperset(packed):
        raise _broken(node_id)
    return [Verdict(byte) for byte in packed]


def _broken(node_id: str) -> HoldfastError:
    return HoldfastError(
        ErrorCode.CORRUPT, f"storage node {node_id} answers in another form, or with more, than it was asked for"
    )
