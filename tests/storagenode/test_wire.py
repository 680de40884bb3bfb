"""The messages that are put together by hand say to protobuf exactly what protobuf would have said."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from holdfast_proto.v1 import blocks_pb2 as pb
from holdfast_storagenode.allocator import keep_freed_memory
from holdfast_storagenode.wire import decode_put, encode_get

FIELDS = st.builds(
    pb.PutBlocksRequest,
    sequence=st.integers(0, 2**64 - 1),
    layout_epoch=st.integers(0, 2**64 - 1),
    block_ids=st.binary(max_size=200),
    lengths=st.lists(st.integers(0, 2**32 - 1), max_size=20),
    blocks=st.binary(max_size=300),
)
# Fields that a later version may add: a number, 8 bytes, bytes, 4 bytes.
UNKNOWN = st.sampled_from([b"\x98\x06\x05", b"\x99\x06" + bytes(8), b"\x9a\x06\x03abc", b"\x9d\x06" + bytes(4), b""])


@given(FIELDS, UNKNOWN, UNKNOWN)
def test_a_request_is_read_as_protobuf_reads_it(request: pb.PutBlocksRequest, before: bytes, after: bytes) -> None:
    message = decode_put(before + request.SerializeToString() + after)
    assert bytes(message.blocks) == request.blocks
    again = pb.PutBlocksRequest.FromString(message.head.SerializeToString())
    assert not again.blocks
    again.blocks = request.blocks
    again.DiscardUnknownFields()
    assert again == request


@given(FIELDS)
def test_the_order_of_fields_does_not_matter_and_the_last_one_counts(request: pb.PutBlocksRequest) -> None:
    first = pb.PutBlocksRequest(blocks=b"earlier", sequence=1).SerializeToString()
    late = first + request.SerializeToString()
    expected = pb.PutBlocksRequest.FromString(late)
    message = decode_put(late)
    assert (bytes(message.blocks), message.head.sequence) == (expected.blocks, expected.sequence)


@given(st.binary(max_size=60))
def test_nonsense_is_refused_or_read_as_protobuf_reads_it(data: bytes) -> None:
    try:
        message = decode_put(data)
    except (ValueError, DecodeError):
        return
    assert isinstance(message.head, pb.PutBlocksRequest)


@pytest.mark.parametrize("data", [b"\x2a\x05abc", b"\x08", b"\x0b", b"\x09abc", b"\xff" * 11])
def test_what_is_cut_off_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"cut off|unknown"):
        decode_put(data)


@given(
    st.integers(0, 2**32 - 1),
    st.binary(max_size=20),
    st.lists(st.integers(0, 2**32 - 1), max_size=20),
    st.lists(st.binary(max_size=100), max_size=5),
)
def test_an_answer_is_what_protobuf_would_write(
    first: int, verdicts: bytes, lengths: list[int], blocks: list[bytes]
) -> None:
    message = pb.GetBlocksResponse(first=first, verdicts=verdicts, lengths=lengths, blocks=b"".join(blocks))
    packed = encode_get(first=first, verdicts=verdicts, lengths=lengths, blocks=blocks)
    assert pb.GetBlocksResponse.FromString(packed) == message


def test_the_allocator_listens() -> None:
    assert keep_freed_memory() is True
