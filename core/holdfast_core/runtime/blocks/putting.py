"""Putting a few blocks on their owners, for services that write now and then. The SDK's writer pipelines instead.

A block counts as written when a write quorum of the newest layout's owners hold it durably (DESIGN section 6); owners
that could not be reached are filled in by repair.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence

import grpc.aio

from holdfast_core.model.block import SealedBlock
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.layout import Layout
from holdfast_core.model.limits import BATCH_BYTES_TARGET, RPC_TIMEOUT_S
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.status import error_from_rpc
from holdfast_proto.v1.blocks_pb2 import VERDICT_OK, VERDICT_PRESENT, PutBlocksRequest, PutBlocksResponse

_GOOD = frozenset((VERDICT_OK, VERDICT_PRESENT))


async def put_blocks(
    pool: NodePool,
    node_id: str,
    blocks: Sequence[SealedBlock],
    capability: str,
    *,
    layout_epoch: int,
    timeout_s: float = RPC_TIMEOUT_S,
) -> None:
    """Put blocks on one node and wait until all are durable there; `timeout_s` bounds the wait for each batch.

    Raises:
        HoldfastError: what the node said, or UNREACHABLE.
    """
    call = pool.put_stream(
        node_id,
        capability,
        serializer=PutBlocksRequest.SerializeToString,
        deserializer=PutBlocksResponse.FromString,
    )
    try:
        for sequence, batch in enumerate(_batches(blocks)):
            request = PutBlocksRequest(
                sequence=sequence,
                layout_epoch=layout_epoch,
                block_ids=b"".join(block.id for block in batch),
                lengths=[len(block.data) for block in batch],
                blocks=b"".join(block.data for block in batch),
            )
            async with asyncio.timeout(timeout_s):
                await call.write(request)
                answer = await call.read()
            if not isinstance(answer, PutBlocksResponse):
                raise _failed(ErrorCode.UNREACHABLE, node_id, "ended the stream early")
            if len(answer.verdicts) != len(batch) or not _GOOD.issuperset(answer.verdicts):
                raise _failed(ErrorCode.INTERNAL, node_id, "refused blocks without a reason")
        await call.done_writing()
    except TimeoutError as error:
        pool.failed(node_id)
        raise _failed(ErrorCode.UNREACHABLE, node_id, f"acknowledged nothing for {timeout_s:g} s") from error
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error, peer=f"storage node {node_id}") from error
    except asyncio.InvalidStateError as error:
        raise _failed(ErrorCode.UNREACHABLE, node_id, "ended the stream") from error
    finally:
        call.cancel()


async def put_to_quorum(
    pool: NodePool, layout: Layout, blocks: Sequence[SealedBlock], capability: str, *, timeout_s: float = RPC_TIMEOUT_S
) -> None:
    """Put every block on all its owners, and return once each is durable on a write quorum of them.

    Raises:
        HoldfastError: NO_QUORUM, with what the first failing node said, if too few owners took one.
    """
    durable: Counter[bytes] = Counter()
    failures: list[HoldfastError] = []
    by_node: dict[str, list[SealedBlock]] = {}
    for block in blocks:
        for node_id in layout.owners_of_block(block.id):
            by_node.setdefault(node_id, []).append(block)

    async def put(node_id: str, its: Sequence[SealedBlock]) -> None:
        try:
            await put_blocks(pool, node_id, its, capability, layout_epoch=layout.epoch, timeout_s=timeout_s)
        except HoldfastError as error:
            failures.append(error)
        else:
            durable.update(block.id for block in its)

    async with plain_task_group() as group:
        for node_id, its in by_node.items():
            group.create_task(put(node_id, its))
    short = [block.id for block in blocks if durable[block.id] < layout.write_quorum]
    if short:
        raise HoldfastError(
            ErrorCode.NO_QUORUM,
            f"{len(short)} blocks are on fewer than {layout.write_quorum} owners: {failures[0].message}",
            block_ids=short,
        )


def _batches(blocks: Sequence[SealedBlock]) -> Iterator[list[SealedBlock]]:
    batch: list[SealedBlock] = []
    size = 0
    for block in blocks:
        if batch and size + len(block.data) > BATCH_BYTES_TARGET:
            yield batch
            batch, size = [], 0
        batch.append(block)
        size += len(block.data)
    if batch:
        yield batch


def _failed(code: ErrorCode, node_id: str, why: str) -> HoldfastError:
    return HoldfastError(code, f"storage node {node_id} {why}", facts={"node_id": node_id})
