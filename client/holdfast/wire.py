"""PutBlocks messages made by hand, byte-compatible with blocks.proto (ADR 0051).

protobuf would copy every body three times (into the message, out of it, into gRPC). Here a batch is joined once, and
the same bytes go to every owner: the sequence number is the batch's, not the stream's, and the epoch is the layout's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from holdfast_core.model.block import SealedBlock
from holdfast_core.model.limits import BLOCK_ID_BYTES
from holdfast_core.runtime.blocks.wire import varint

# Tags of PutBlocksRequest: field number << 3 | wire type (0 varint, 2 length-delimited).
_TAG_SEQUENCE: Final = b"\x08"
_TAG_LAYOUT_EPOCH: Final = b"\x10"
_TAG_BLOCK_IDS: Final = b"\x1a"
_TAG_LENGTHS: Final = b"\x22"
_TAG_BLOCKS: Final = b"\x2a"


def encode_put(blocks: Sequence[SealedBlock], *, sequence: int, layout_epoch: int) -> bytes:
    """Return a serialised PutBlocksRequest."""
    lengths = b"".join([varint(len(block.data)) for block in blocks])
    body_bytes = sum([len(block.data) for block in blocks])
    head = b"".join(
        (
            _TAG_SEQUENCE,
            varint(sequence),
            _TAG_LAYOUT_EPOCH,
            varint(layout_epoch),
            _TAG_BLOCK_IDS,
            varint(len(blocks) * BLOCK_ID_BYTES),
        )
    )
    parts = [head]
    parts.extend([block.id for block in blocks])
    parts.extend((_TAG_LENGTHS, varint(len(lengths)), lengths, _TAG_BLOCKS, varint(body_bytes)))
    parts.extend([block.data for block in blocks])
    return b"".join(parts)


def as_is(message: bytes) -> bytes:
    """Serialise what is serialised already."""
    return message
