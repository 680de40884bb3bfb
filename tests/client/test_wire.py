"""Requests made by hand are what protobuf would make of them."""

from __future__ import annotations

from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from holdfast.batches import Batch
from holdfast.wire import encode_put
from holdfast_core.model.block import block_id, verify
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.blocks.wire import decode_get, varint
from holdfast_proto.v1.blocks_pb2 import (
    VERDICT_CORRUPT,
    VERDICT_MISSING,
    VERDICT_OK,
    GetBlocksResponse,
    PutBlocksRequest,
)

bodies = st.lists(st.binary(max_size=300), max_size=20)
numbers = st.integers(min_value=1, max_value=2**64 - 1)


@given(bodies, numbers, numbers)
def test_a_batch_reads_back_as_protobuf(data: list[bytes], sequence: int, epoch: int) -> None:
    blocks = [verify(block_id(body), body) for body in data]
    request = PutBlocksRequest.FromString(encode_put(blocks, sequence=sequence, layout_epoch=epoch))
    assert request.sequence == sequence
    assert request.layout_epoch == epoch
    assert request.block_ids == b"".join(block.id for block in blocks)
    assert list(request.lengths) == [len(body) for body in data]
    assert request.blocks == b"".join(data)


verdicts = st.sampled_from([VERDICT_OK, VERDICT_MISSING, VERDICT_CORRUPT])


@given(st.integers(0, 2**32 - 1), st.lists(st.tuples(verdicts, st.binary(max_size=300)), max_size=20), st.binary())
def test_an_answer_reads_as_protobuf_reads_it(first: int, entries: list[tuple[int, bytes]], unknown: bytes) -> None:
    bodies = [body if verdict == VERDICT_OK else b"" for verdict, body in entries]
    message = GetBlocksResponse(
        first=first,
        verdicts=bytes(verdict for verdict, _ in entries),
        lengths=[len(body) for body in bodies],
        blocks=b"".join(bodies),
    )
    # A field that this version does not know, number 15, in front: order and strangers do not matter.
    data = b"\x7a" + varint(len(unknown)) + unknown + message.SerializeToString()
    answer = decode_get(data)
    assert answer.first == first
    assert answer.verdicts == message.verdicts
    assert list(answer.lengths) == list(message.lengths)
    assert bytes(answer.blocks) == message.blocks


@given(st.binary(max_size=60))
def test_bytes_that_are_no_answer_are_refused_cleanly(data: bytes) -> None:
    try:
        answer = decode_get(data)
    except (ValueError, DecodeError):
        return
    assert sum(answer.lengths) == len(answer.blocks)


@given(st.integers(min_value=0, max_value=127))
def test_small_numbers_take_one_byte(number: int) -> None:
    assert varint(number) == bytes([number])


def _batch(data: list[bytes], targets: list[str], needed: int) -> Batch:
    blocks = [verify(block_id(body), body) for body in data]
    wire = encode_put(blocks, sequence=7, layout_epoch=1)
    return Batch(blocks, wire=wire, sequence=7, layout_epoch=1, targets=targets, needed=needed)


@given(bodies)
def test_a_batch_gives_its_blocks_back(data: list[bytes]) -> None:
    batch = _batch(data, ["a"], 1)
    assert [block.data for block in batch.blocks()] == data
    assert batch.sealed_bytes == sum(map(len, data))


def test_a_batch_knows_quorum_loss_and_end() -> None:
    batch = _batch([b"x"], ["a", "b", "c"], 2)
    gone = HoldfastError(ErrorCode.UNREACHABLE, "gone")
    assert not batch.at_quorum
    assert not batch.lost
    batch.acknowledged.add("a")
    batch.failed["b"] = gone
    assert not batch.at_quorum
    assert not batch.lost
    assert not batch.settled
    batch.acknowledged.add("c")
    assert batch.at_quorum
    assert batch.settled
    other = _batch([b"x"], ["a", "b", "c"], 2)
    other.failed.update(a=gone, b=gone)
    assert other.lost
    assert not other.settled


def test_a_batch_whose_blocks_some_owners_hold_needs_fewer() -> None:
    batch = _batch([b"x"], ["c"], 0)
    assert batch.at_quorum
    assert not batch.settled
