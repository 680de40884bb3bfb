"""The messages that carry blocks, without the copies that protobuf makes of them (ADR 0033).

On the wire nothing differs from `blocks.proto` and `peers.proto`: the field that holds the blocks is cut out of a
request before protobuf parses the rest, and set behind the rest of an answer after protobuf has written it. Everything
else stays protobuf's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import grpc

from holdfast_core.runtime.blocks.wire import bytes_tag, cut_bytes_field, varint
from holdfast_proto.v1 import blocks_pb2 as pb
from holdfast_proto.v1 import peers_pb2
from holdfast_proto.v1.blocks_pb2_grpc import add_BlockServiceServicer_to_server
from holdfast_proto.v1.peers_pb2_grpc import add_PeerServiceServicer_to_server

SERVICE_NAME: Final = "holdfast.v1.BlockService"
PEER_SERVICE_NAME: Final = "holdfast.v1.PeerService"


@dataclass(frozen=True, slots=True)
class PutMessage:
    """A PutBlocksRequest: `head` has all fields but the blocks, which are a view of the bytes that came."""

    head: pb.PutBlocksRequest
    blocks: memoryview


def decode_put(data: bytes) -> PutMessage:
    """Return a request without copying its blocks.

    Raises:
        ValueError: the bytes are no message.
    """
    rest, blocks = cut_bytes_field(data, pb.PutBlocksRequest.BLOCKS_FIELD_NUMBER)
    return PutMessage(pb.PutBlocksRequest.FromString(rest), blocks)


@dataclass(frozen=True, slots=True)
class HandMessage:
    """A HandBlocksRequest: `head` has all fields but the blocks, which are a view of the bytes that came."""

    head: peers_pb2.HandBlocksRequest
    blocks: memoryview


def decode_hand(data: bytes) -> HandMessage:
    """Return a request without copying its blocks.

    Raises:
        ValueError: the bytes are no message.
    """
    rest, blocks = cut_bytes_field(data, peers_pb2.HandBlocksRequest.BLOCKS_FIELD_NUMBER)
    return HandMessage(peers_pb2.HandBlocksRequest.FromString(rest), blocks)


def encode_get(*, first: int, verdicts: bytes, lengths: Iterable[int], blocks: list[bytes]) -> bytes:
    """Return the bytes of a GetBlocksResponse, which are those of a FetchBlocksResponse; the blocks are copied once."""
    head = pb.GetBlocksResponse(first=first, verdicts=verdicts, lengths=lengths).SerializeToString()
    tag = varint(bytes_tag(pb.GetBlocksResponse.BLOCKS_FIELD_NUMBER))
    return b"".join((head, tag, varint(sum(map(len, blocks))), *blocks))


def add_block_service(servicer: Any, server: Any) -> None:
    """Register `servicer` as the generated code would, with the two messages in the form of this module."""
    generated = _Handlers()
    add_BlockServiceServicer_to_server(servicer, generated)  # type: ignore[arg-type]  # it only hands over handlers
    handlers = generated.handlers
    handlers["PutBlocks"] = grpc.stream_stream_rpc_method_handler(
        servicer.PutBlocks,
        request_deserializer=decode_put,
        response_serializer=pb.PutBlocksResponse.SerializeToString,
    )
    handlers["GetBlocks"] = grpc.unary_stream_rpc_method_handler(
        servicer.GetBlocks, request_deserializer=pb.GetBlocksRequest.FromString, response_serializer=_already_bytes
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
    server.add_registered_method_handlers(SERVICE_NAME, handlers)


def add_peer_service(servicer: Any, server: Any) -> None:
    """As `add_block_service`, for the service of peers."""
    generated = _Handlers()
    add_PeerServiceServicer_to_server(servicer, generated)  # type: ignore[arg-type]  # it only hands over handlers
    handlers = generated.handlers
    handlers["FetchBlocks"] = grpc.unary_stream_rpc_method_handler(
        servicer.FetchBlocks,
        request_deserializer=peers_pb2.FetchBlocksRequest.FromString,
        response_serializer=_already_bytes,
    )
    handlers["HandBlocks"] = grpc.unary_unary_rpc_method_handler(
        servicer.HandBlocks,
        request_deserializer=decode_hand,
        response_serializer=peers_pb2.HandBlocksResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(PEER_SERVICE_NAME, handlers),))
    server.add_registered_method_handlers(PEER_SERVICE_NAME, handlers)


class _Handlers:
    """Takes the handlers that the generated code makes, in the place of a server."""

    def __init__(self) -> None:
        self.handlers: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Leave aside: the same handlers come once more by name."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """Take them."""
        self.handlers = dict(handlers)


def _already_bytes(message: bytes) -> bytes:
    return message
