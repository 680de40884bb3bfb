"""Requests made by hand are what protobuf would make of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from holdfast.batches import Batch
from holdfast.wire import encode_put, varint
from holdfast_core.model.block import block_id, verify
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_proto.v1.blocks_pb2 import PutBlocksRequest

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
