"""Records of a segment file (docs/segment-format.md). Pure: bytes in, values out.

A file is a file header of 32 bytes and records one after another without padding. A record is a header of 64 bytes
and, for blocks, the sealed block. A block's bytes need no checksum of their own: its id is their hash. The checksum
of a header is keyed with the data directory's incarnation, which no tenant learns: after damage the next record is
searched for by its header, and a block whose bytes imitate a record (a tombstone for somebody else's block, say) must
not be found. A record of stamps carries ids in place of a block, and their hash in place of its id.
"""

from __future__ import annotations

import enum
import struct
from typing import Final, NamedTuple

from blake3 import blake3

from holdfast_core.model.limits import BLOCK_ID_BYTES, MIB, SEALED_BYTES_MAX

SEGMENT_BYTES_TARGET: Final = 256 * MIB
FILE_HEADER_BYTES: Final = 32
RECORD_HEADER_BYTES: Final = 64
RECORD_MAGIC: Final = b"HFR1"
INCARNATION_BYTES: Final = 16
STAMPED_IDS_MAX: Final = SEALED_BYTES_MAX // BLOCK_ID_BYTES
STAMP_MAX: Final = 2**32 - 1

_FILE_MAGIC: Final = b"HFSG"
_CHECKSUM_BYTES: Final = 8
_KEY_CONTEXT: Final = "holdfast v1 segment header checksum"
# magic, segment number, incarnation of the data directory; the checksum follows
_FILE_HEADER: Final = struct.Struct("<4sI16s")
# magic, type, kind, reserved, tenant, payload length, stamp or target segment, target offset, id; the checksum follows
_RECORD_HEADER: Final = struct.Struct("<4sBBHIIII32s")


class RecordType(enum.IntEnum):
    """What a record says."""

    # The sealed block follows.
    BLOCK = 1
    # The block with this id was deleted; nothing follows.
    TOMBSTONE = 2
    # The copy at the target position was found corrupt; nothing follows.
    QUARANTINE = 3
    # A corrupt copy that was moved; its bytes follow and are not expected to match the id.
    CORRUPT_BLOCK = 4
    # Blocks that were there were stamped; their ids follow, and the record's id is the hash of these.
    STAMP = 5


class RecordHeader(NamedTuple):
    """A record's header; `length` counts the bytes that follow it.

    The stamp is set for what carries a block and for STAMP, the target for QUARANTINE alone.
    """

    type: RecordType
    tenant: int
    block_id: bytes
    kind: int = 0
    length: int = 0
    stamp: int = 0
    target_segment: int = 0
    target_offset: int = 0

    @property
    def record_bytes(self) -> int:
        """Bytes of the whole record."""
        return RECORD_HEADER_BYTES + self.length

    @property
    def carries_block(self) -> bool:
        """Whether bytes of a block follow."""
        return self.type is RecordType.BLOCK or self.type is RecordType.CORRUPT_BLOCK


class RecordFormat:
    """Packs and parses the headers of one data directory, whose incarnation (16 bytes) keys their checksums."""

    def __init__(self, incarnation: bytes) -> None:
        if len(incarnation) != INCARNATION_BYTES:
            raise ValueError(f"an incarnation takes {INCARNATION_BYTES} bytes")
        self._incarnation = incarnation
        self._key = blake3(incarnation, derive_key_context=_KEY_CONTEXT).digest()

    def pack(self, header: RecordHeader) -> bytes:
        """Return the 64 bytes of a record's header."""
        body = _RECORD_HEADER.pack(
            RECORD_MAGIC,
            header.type,
            header.kind,
            0,
            header.tenant,
            header.length,
            # One place for both: no record has a stamp and a target.
            header.stamp or header.target_segment,
            header.target_offset,
            header.block_id,
        )
        return body + self._checksum(body)

    def parse(self, data: bytes | memoryview) -> RecordHeader | None:
        """Return the header that the first 64 bytes of `data` hold, or None if they are not a whole header."""
        if len(data) < RECORD_HEADER_BYTES or data[:4] != RECORD_MAGIC:
            return None
        body = data[: _RECORD_HEADER.size]
        if data[_RECORD_HEADER.size : RECORD_HEADER_BYTES] != self._checksum(body):
            return None
        _, type_number, kind, reserved, tenant, length, number, offset, block_id = _RECORD_HEADER.unpack(body)
        if reserved or length > SEALED_BYTES_MAX or type_number not in _TYPES:
            return None
        record_type = RecordType(type_number)
        if record_type is RecordType.QUARANTINE:
            header = RecordHeader(record_type, tenant, block_id, kind, length, 0, number, offset)
        else:
            header = RecordHeader(record_type, tenant, block_id, kind, length, number, 0, offset)
        stamps = record_type is RecordType.STAMP and length % BLOCK_ID_BYTES == 0
        return header if length == 0 or header.carries_block or stamps else None

    def file_header(self, segment: int) -> bytes:
        """Return the 32 bytes that begin segment number `segment`."""
        body = _FILE_HEADER.pack(_FILE_MAGIC, segment, self._incarnation)
        return body + self._checksum(body)

    def _checksum(self, body: bytes | memoryview) -> bytes:
        return blake3(body, key=self._key).digest(_CHECKSUM_BYTES)


_TYPES: Final = frozenset(int(record_type) for record_type in RecordType)
