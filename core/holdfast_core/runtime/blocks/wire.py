"""The messages that carry blocks, without the copies that protobuf makes of them. Shared by both ends.

protobuf copies a megabyte into a message and once more at every look at the field. Here the field that holds the blocks
is cut out before protobuf parses the rest; on the wire nothing differs from `blocks.proto` (ADR 0033, ADR 0051).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from holdfast_proto.v1.blocks_pb2 import GetBlocksResponse

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_VARINT_BITS_MAX: Final = 64


@dataclass(frozen=True, slots=True)
class GetAnswer:
    """A GetBlocksResponse; `blocks` is a view of the bytes that came. See the proto file for the rest."""

    first: int
    verdicts: bytes
    lengths: Sequence[int]
    blocks: memoryview


def decode_get(data: bytes) -> GetAnswer:
    """Return an answer without copying its blocks.

    Raises:
        ValueError: the bytes are no message, or lengths and blocks do not fit together.
    """
    rest, blocks = cut_bytes_field(data, GetBlocksResponse.BLOCKS_FIELD_NUMBER)
    head = GetBlocksResponse.FromString(rest)
    lengths = tuple(head.lengths)
    if len(lengths) != len(head.verdicts) or sum(lengths) != len(blocks):
        raise ValueError("lengths and blocks do not fit together")
    return GetAnswer(head.first, head.verdicts, lengths, blocks)


def cut_bytes_field(data: bytes, number: int) -> tuple[bytes, memoryview]:
    """Split a serialised message into everything but the `bytes` field of that number, and a view of that field.

    As with protobuf, the field's last occurrence counts, and a field that is not there is empty.

    Raises:
        ValueError: the bytes are no message.
    """
    view = memoryview(data)
    found = view[:0]
    kept: list[memoryview] = []
    at = 0
    while at < len(data):
        begin = at
        tag, at = _read_varint(data, at)
        wire_type = tag & 7
        if wire_type == _LENGTH:
            length, at = _read_varint(data, at)
            end = at + length
        elif wire_type == _VARINT:
            _, end = _read_varint(data, at)
        elif wire_type in (_FIXED64, _FIXED32):
            end = at + (8 if wire_type == _FIXED64 else 4)
        else:
            raise ValueError("a field has an unknown wire type")
        if end > len(data):
            raise ValueError("a field is cut off")
        if tag == bytes_tag(number):
            found = view[at:end]
        else:
            kept.append(view[begin:end])
        at = end
    return b"".join(kept), found


def bytes_tag(number: int) -> int:
    """Return the tag of a length-delimited field."""
    return number << 3 | _LENGTH


def varint(value: int) -> bytes:
    """Encode a non-negative number as protobuf does."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < _VARINT_BITS_MAX:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("a number is cut off or too long")
