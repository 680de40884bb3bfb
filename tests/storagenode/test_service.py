"""The block service: every verb under a capability, whole batches or none, limits, order, metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import generate_latest

from holdfast_core.model.block import Kind, block_id
from holdfast_core.model.errors import ErrorCode
from holdfast_core.model.limits import BATCH_BLOCKS_MAX, BATCH_BYTES_MAX, CLOCK_TOLERANCE_S, IDS_PER_REQUEST_MAX
from holdfast_core.runtime.capability import CapabilitySigner
from holdfast_proto.v1 import blocks_pb2 as pb
from holdfast_storagenode.segments.record import STAMP_MAX
from holdfast_storagenode.store import Verdict
from tests.storagenode.blocks import make_block, make_blocks
from tests.storagenode.cluster import NodeClient, eventually, make_layout, mint, refusal
from tests.storagenode.conftest import Served
from tests.storagenode.engines import plant_rot
from tests.storagenode.remote import batch_of, unpack

BLOCKS = make_blocks(3)
IDS = b"".join(block.id for block in BLOCKS)
VERBS = ("put", "get", "has", "scan", "delete", "status")


async def call(client: NodeClient, verb: str) -> object:
    """Make the call of a verb about `BLOCKS`."""
    if verb == "put":
        return await client.put([batch_of(BLOCKS)])
    if verb == "get":
        return await client.stream("GetBlocks", pb.GetBlocksRequest(block_ids=IDS))
    if verb == "has":
        return await client.call("HasBlocks", pb.HasBlocksRequest(block_ids=IDS))
    if verb == "scan":
        return await client.stream("ScanBlocks", pb.ScanBlocksRequest())
    if verb == "delete":
        return await client.call("DeleteBlocks", pb.DeleteBlocksRequest(block_ids=IDS, cutoff=STAMP_MAX))
    return await client.call("GetNodeStatus", pb.GetNodeStatusRequest())


@pytest.mark.parametrize("verb", VERBS)
async def test_each_call_takes_its_own_verb_and_no_other(served: Served, verb: str) -> None:
    signer = served.coordinator.signer
    await call(served.client(mint(signer, verbs=[verb])), verb)
    others = [each for each in VERBS if each != verb]
    error = await refusal(call(served.client(mint(signer, verbs=others)), verb))
    assert error.code is ErrorCode.DENIED
    assert verb in error.message


@pytest.mark.parametrize("verb", VERBS)
async def test_no_call_works_without_a_good_capability(served: Served, verb: str) -> None:
    signer = served.coordinator.signer
    foreign = CapabilitySigner(signer.key_id, bytes(32), "d" * 32)
    stolen = CapabilitySigner(signer.key_id, bytes([9]) * 32, served.coordinator.cluster_id)
    for token in ("", "nonsense", mint(foreign), mint(stolen), mint(signer, ttl_s=-CLOCK_TOLERANCE_S - 60)):
        error = await refusal(call(served.client(token), verb))
        assert error.code is ErrorCode.DENIED
    await call(served.client(), verb)


async def test_another_tenant_sees_and_changes_nothing(served: Served) -> None:
    await call(served.client(), "put")
    other = served.client(mint(served.coordinator.signer, tenant=2))
    assert (
        unpack(await other.stream("GetBlocks", pb.GetBlocksRequest(block_ids=IDS)), [b.id for b in BLOCKS])
        == [Verdict.MISSING] * 3
    )
    assert (await call(other, "has")).verdicts == bytes([Verdict.MISSING] * 3)  # type: ignore[attr-defined]
    assert await call(other, "scan") == []
    assert (await call(other, "delete")).verdicts == bytes([Verdict.MISSING] * 3)  # type: ignore[attr-defined]
    assert (await other.put([batch_of(BLOCKS)]))[0].verdicts == bytes([Verdict.OK] * 3)
    assert (await call(served.client(), "has")).verdicts == bytes([Verdict.OK] * 3)  # type: ignore[attr-defined]


async def test_a_capability_reaches_its_kinds_alone(served: Served) -> None:
    blocks = [make_block(number, kind=kind) for number, kind in enumerate(Kind)]
    packed = b"".join(block.id for block in blocks)
    await served.client().put([batch_of(blocks)])
    confined = served.client(mint(served.coordinator.signer, kinds=frozenset({int(Kind.INDEX)})))
    mixed = await refusal(confined.put([batch_of([make_block(9, kind=Kind.INDEX), make_block(10)])]))
    assert mixed.code is ErrorCode.DENIED
    assert mixed.block_ids == (make_block(10).id,)
    only = bytes([Verdict.DENIED, Verdict.DENIED, Verdict.OK])
    (answer,) = await confined.stream("GetBlocks", pb.GetBlocksRequest(block_ids=packed))
    assert (answer.verdicts, list(answer.lengths), answer.blocks) == (only, [0, 0, len(blocks[2].data)], blocks[2].data)
    assert (await confined.call("HasBlocks", pb.HasBlocksRequest(block_ids=packed))).verdicts == only
    (listed,) = await confined.stream("ScanBlocks", pb.ScanBlocksRequest())
    assert listed.block_ids == blocks[2].id
    deleted = await confined.call("DeleteBlocks", pb.DeleteBlocksRequest(block_ids=packed, cutoff=STAMP_MAX))
    assert deleted.verdicts == only
    assert (await served.client().call("HasBlocks", pb.HasBlocksRequest(block_ids=packed))).verdicts == bytes(
        [Verdict.OK, Verdict.OK, Verdict.MISSING]
    )


async def test_a_writer_reads_the_index_and_no_data(served: Served) -> None:
    blocks = [make_block(number, kind=kind) for number, kind in enumerate(Kind)]
    packed = b"".join(block.id for block in blocks)
    index = frozenset({int(Kind.INDEX)})
    writer = served.client(mint(served.coordinator.signer, verbs=("put", "has", "get"), read_kinds=index))
    assert (await writer.put([batch_of(blocks)]))[0].verdicts == bytes([Verdict.OK] * 3)
    (answer,) = await writer.stream("GetBlocks", pb.GetBlocksRequest(block_ids=packed))
    assert answer.verdicts == bytes([Verdict.DENIED, Verdict.DENIED, Verdict.OK])
    assert answer.blocks == blocks[2].data
    assert (await writer.call("HasBlocks", pb.HasBlocksRequest(block_ids=packed))).verdicts == bytes([Verdict.OK] * 3)


async def test_expiry_is_checked_again_for_each_batch(served: Served) -> None:
    client = served.client(mint(served.coordinator.signer, ttl_s=100))
    second = asyncio.Event()

    async def requests() -> AsyncIterator[pb.PutBlocksRequest]:
        yield batch_of(make_blocks(1), sequence=1)
        await second.wait()
        yield batch_of(make_blocks(1, first=1), sequence=2)

    answers = aiter(client.stub.PutBlocks(requests(), metadata=client.metadata))
    assert (await anext(answers)).sequence == 1
    served.clock.ahead_ms = 101_000 + int(CLOCK_TOLERANCE_S * 1000)
    second.set()
    error = await refusal(client.collect(answers))
    assert error.code is ErrorCode.DENIED
    assert "expired" in error.message


async def test_batches_go_on_while_earlier_ones_wait_and_are_answered_as_they_complete(served: Served) -> None:
    client = served.client()
    batches = [batch_of(make_blocks(2, first=10 * at), sequence=100 - at) for at in range(20)]
    answers = await client.put(batches)
    assert sorted(answer.sequence for answer in answers) == sorted(batch.sequence for batch in batches)
    assert all(answer.verdicts == bytes([Verdict.OK] * 2) for answer in answers)

    sent = asyncio.Event()

    async def requests() -> AsyncIterator[pb.PutBlocksRequest]:
        for at in range(8):
            yield batch_of(make_blocks(1, first=1000 + at), sequence=at)
        sent.set()

    syncing = served.node.core.store._committer.lock  # type: ignore[attr-defined]
    syncing.acquire()
    try:
        stream = aiter(client.stub.PutBlocks(requests(), metadata=client.metadata))
        # Nothing can be decided while the lock is held, and yet the node takes all eight.
        reading = asyncio.ensure_future(anext(stream))
        await asyncio.wait_for(sent.wait(), 5)
        await eventually(lambda: served.node._workers._executor._work_queue.qsize() >= 1)
        assert not reading.done(), "no acknowledgement without a commit"
    finally:
        syncing.release()
    answers = [await reading, *[answer async for answer in stream]]
    assert {answer.sequence for answer in answers} == set(range(8))


@pytest.mark.parametrize("bad", range(3))
async def test_a_batch_with_one_wrong_block_leaves_nothing(served: Served, bad: int) -> None:
    request = batch_of(BLOCKS)
    content = bytearray(request.blocks)
    content[len(content) // 3 * bad + 80] ^= 1
    request.blocks = bytes(content)
    error = await refusal(served.client().put([request]))
    assert error.code is ErrorCode.CORRUPT
    assert error.block_ids == (BLOCKS[bad].id,)
    assert (await call(served.client(), "has")).verdicts == bytes([Verdict.MISSING] * 3)  # type: ignore[attr-defined]


async def test_bytes_that_are_no_sealed_block_are_refused(served: Served) -> None:
    junk = b"J" * 200
    request = pb.PutBlocksRequest(layout_epoch=1, block_ids=block_id(junk), lengths=[200], blocks=junk)
    assert (await refusal(served.client().put([request]))).code is ErrorCode.CORRUPT


async def test_malformed_batches_are_refused(served: Served) -> None:
    good = batch_of(BLOCKS)
    size = len(BLOCKS[0].data)
    for change in (
        {"block_ids": IDS[:-1]},
        {"block_ids": IDS[:-32]},
        {"lengths": [size, size]},
        {"lengths": [size, size, size - 1]},
        {"blocks": good.blocks + b"?"},
        {"block_ids": b"", "lengths": [], "blocks": b""},
    ):
        request = pb.PutBlocksRequest()
        request.CopyFrom(good)
        for name, value in change.items():
            request.ClearField(name)  # type: ignore[arg-type]
            request.MergeFrom(pb.PutBlocksRequest(**{name: value}))  # type: ignore[arg-type]
        error = await refusal(served.client().put([request]))
        assert error.code is ErrorCode.INVALID_ARGUMENT, change
    error = await refusal(served.client().call("HasBlocks", pb.HasBlocksRequest(block_ids=b"short")))
    assert error.code is ErrorCode.INVALID_ARGUMENT
    error = await refusal(served.client().stream("ScanBlocks", pb.ScanBlocksRequest(after=b"short")))
    assert error.code is ErrorCode.INVALID_ARGUMENT


async def test_limits_are_kept(served: Served) -> None:
    client = served.client()
    many = pb.PutBlocksRequest(layout_epoch=1, block_ids=bytes(32 * (BATCH_BLOCKS_MAX + 1)))
    large = pb.PutBlocksRequest(layout_epoch=1, block_ids=bytes(32), blocks=bytes(BATCH_BYTES_MAX + 1))
    for request in (many, large):
        assert (await refusal(client.put([request]))).code is ErrorCode.LIMIT_EXCEEDED
    ids = bytes(32 * (IDS_PER_REQUEST_MAX + 1))
    for work in (
        client.call("HasBlocks", pb.HasBlocksRequest(block_ids=ids)),
        client.stream("GetBlocks", pb.GetBlocksRequest(block_ids=ids)),
        client.call("DeleteBlocks", pb.DeleteBlocksRequest(block_ids=ids)),
    ):
        assert (await refusal(work)).code is ErrorCode.LIMIT_EXCEEDED


async def test_an_older_layout_is_refused_once_a_newer_is_known(served: Served) -> None:
    client = served.client()
    served.coordinator.layout = make_layout(3)
    await eventually(lambda: served.coordinator.beats[-1].status.layout_epoch == 3)
    error = await refusal(client.put([batch_of(BLOCKS, layout_epoch=2)]))
    assert error.code is ErrorCode.WRONG_EPOCH
    assert error.retryable
    assert error.facts == {"newest_epoch": "3"}
    error = await refusal(client.call("HasBlocks", pb.HasBlocksRequest(block_ids=IDS, layout_epoch=2)))
    assert error.code is ErrorCode.WRONG_EPOCH
    assert (await client.call("HasBlocks", pb.HasBlocksRequest(block_ids=IDS))).verdicts == bytes([3, 3, 3])
    assert len(await client.put([batch_of(BLOCKS, layout_epoch=3)])) == 1
    assert len(await client.put([batch_of(BLOCKS, layout_epoch=4)])) == 1, "the client may know more than the node"


async def test_large_reads_come_in_batches_in_order(served: Served) -> None:
    client = served.client()
    blocks = make_blocks(60, size=65_536)
    for at in range(0, 60, 15):
        await client.put([batch_of(blocks[at : at + 15])])
    missing = make_block(999)
    asked = [*blocks[30:], missing, *blocks[:30]]
    answers = await client.stream("GetBlocks", pb.GetBlocksRequest(block_ids=b"".join(b.id for b in asked)))
    assert unpack(answers, [b.id for b in asked]) == [*blocks[30:], Verdict.MISSING, *blocks[:30]]
    assert 4 <= len(answers) <= 6
    assert await client.stream("GetBlocks", pb.GetBlocksRequest()) == []


async def test_what_happens_is_counted(served: Served) -> None:
    client = served.client()
    size = len(BLOCKS[0].data)
    await client.put([batch_of(BLOCKS)])
    await client.put([batch_of(BLOCKS)])
    await client.stream("GetBlocks", pb.GetBlocksRequest(block_ids=IDS))
    plant_rot(served.directory, BLOCKS[0].data)
    await client.stream("GetBlocks", pb.GetBlocksRequest(block_ids=IDS))
    await refusal(client.put([batch_of(BLOCKS, layout_epoch=0)]))
    await client.put([batch_of(make_blocks(1, first=70))])
    assert served.metric("holdfast_node_blocks_total", {"direction": "in"}) == 7
    assert served.metric("holdfast_node_bytes_total", {"direction": "in"}) == 7 * size
    assert served.metric("holdfast_node_blocks_total", {"direction": "deduplicated"}) == 3
    assert served.metric("holdfast_node_blocks_total", {"direction": "out"}) == 5
    assert served.metric("holdfast_node_bytes_total", {"direction": "out"}) == 5 * size
    assert served.metric("holdfast_node_stored_blocks") == 4
    assert served.metric("holdfast_node_corrupt_found_total") == 1
    assert served.metric("holdfast_node_quarantined_blocks") == 1
    assert served.metric("holdfast_node_refused_batches_total", {"code": "WRONG_EPOCH"}) == 1
    assert served.metric("holdfast_node_group_commit_seconds_count") >= 2
    assert served.metric("holdfast_node_used_bytes") >= 4 * size
    assert served.metric("holdfast_node_free_bytes") > 0
    page = generate_latest(served.node._host.registry).decode()
    assert "holdfast_node_group_commit_seconds_bucket" in page
    assert 'holdfast_calls_total{method="/holdfast.v1.BlockService/PutBlocks",status="OK"}' in page


async def test_status_and_health_answer(served: Served) -> None:
    client = served.client()
    await client.put([batch_of(BLOCKS)])
    status = (await client.call("GetNodeStatus", pb.GetNodeStatusRequest())).status
    assert (status.node_id, status.zone, status.block_count, status.up) == ("node-1", "zone-a", 3, True)
    assert (status.address, status.layout_epoch, status.full) == (served.address, 1, False)
    health = health_pb2_grpc.HealthStub(client.channel)
    answer = await health.Check(health_pb2.HealthCheckRequest(service="holdfast.v1.BlockService"))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.slow
async def test_a_client_that_gives_up_harms_nobody(served: Served) -> None:
    client = served.client()
    started = asyncio.Event()

    async def requests() -> AsyncIterator[pb.PutBlocksRequest]:
        for at in range(50):
            yield batch_of(make_blocks(4, size=20_000, first=100 * at), sequence=at)
            started.set()
        await asyncio.Event().wait()

    stream = client.stub.PutBlocks(requests(), metadata=client.metadata)
    await started.wait()
    stream.cancel()
    again = served.client()
    assert len(await again.put([batch_of(BLOCKS)])) == 1
    assert unpack(await again.stream("GetBlocks", pb.GetBlocksRequest(block_ids=IDS)), [b.id for b in BLOCKS]) == BLOCKS
    await eventually(lambda: served.metric("holdfast_calls_in_flight") == 0)
