"""Messages of the transmission: requests, simple replies and the chunks of structured ones."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final, NamedTuple

from holdfast_core.model.nbd.parts import U32, NbdWireError, check_magic, take, unpack
from holdfast_core.model.nbd.protocol import (
    CHUNK_MAGIC,
    NAME_BYTES_MAX,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    Chunk,
)

REQUEST: Final = struct.Struct(">IHHQQI")
SIMPLE_REPLY: Final = struct.Struct(">IIQ")
CHUNK_HEADER: Final = struct.Struct(">IHHQI")
OFFSET: Final = struct.Struct(">Q")
HOLE: Final = struct.Struct(">QI")

_EXTENT = struct.Struct(">II")
_ERROR = struct.Struct(">IH")


class Request(NamedTuple):
    """A request; `cookie` comes back with its reply."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int


class SimpleReply(NamedTuple):
    """A simple reply's error (0: none) and cookie."""

    error: int
    cookie: int


class ChunkHeader(NamedTuple):
    """The head of one chunk of a structured reply."""

    flags: int
    kind: int
    cookie: int
    length: int


class StatusExtent(NamedTuple):
    """One extent of a block-status answer: length in bytes, and the context's flags."""

    length: int
    flags: int


def pack_request(request: Request) -> bytes:
    """Return a request; a WRITE's data follows it."""
    return REQUEST.pack(REQUEST_MAGIC, *request)


def unpack_request(data: bytes) -> Request:
    """Return a request. Command, flags and range are the server's to judge: only it knows the export.

    Raises:
        NbdWireError: it is none.
    """
    magic, flags, command, cookie, offset, length = unpack(REQUEST, data, "request")
    check_magic(magic, REQUEST_MAGIC, "request")
    return Request(flags, command, cookie, offset, length)


def pack_simple_reply(reply: SimpleReply) -> bytes:
    """Return a simple reply; a READ's data follows it where there is no error."""
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, *reply)


def unpack_simple_reply(data: bytes) -> SimpleReply:
    """Return a simple reply.

    Raises:
        NbdWireError: it is none.
    """
    magic, error, cookie = unpack(SIMPLE_REPLY, data, "reply")
    check_magic(magic, SIMPLE_REPLY_MAGIC, "reply")
    return SimpleReply(error, cookie)


def reply_magic(data: bytes) -> int:
    """Return the magic that a reply begins with, to tell simple ones (16 bytes) from chunks (20 bytes).

    Raises:
        NbdWireError: it is neither.
    """
    (magic,) = take(U32, data, 0, "reply")
    if magic not in (SIMPLE_REPLY_MAGIC, CHUNK_MAGIC):
        raise NbdWireError(f"a reply begins with {magic:#010x}, which is no reply's magic")
    return int(magic)


def pack_chunk_header(header: ChunkHeader) -> bytes:
    """Return the head of a chunk."""
    return CHUNK_HEADER.pack(CHUNK_MAGIC, *header)


def unpack_chunk_header(data: bytes) -> ChunkHeader:
    """Return the head of a chunk; its length is the reader's to judge.

    Raises:
        NbdWireError: it is none.
    """
    magic, flags, kind, cookie, length = unpack(CHUNK_HEADER, data, "chunk")
    check_magic(magic, CHUNK_MAGIC, "chunk")
    return ChunkHeader(flags, kind, cookie, length)


def pack_hole(offset: int, length: int) -> bytes:
    """Return the data of an OFFSET_HOLE chunk."""
    return HOLE.pack(offset, length)


def unpack_hole(data: bytes) -> tuple[int, int]:
    """Return offset and length of a hole.

    Raises:
        NbdWireError: malformed.
    """
    offset, length = unpack(HOLE, data, "hole")
    return offset, length


def pack_block_status(context_id: int, extents: Iterable[StatusExtent]) -> bytes:
    """Return the data of a BLOCK_STATUS chunk."""
    return U32.pack(context_id) + b"".join([_EXTENT.pack(*extent) for extent in extents])


def unpack_block_status(data: bytes) -> tuple[int, list[StatusExtent]]:
    """Return the context's number and its extents, at least one, none of them empty.

    Raises:
        NbdWireError: malformed.
    """
    (context_id,) = take(U32, data, 0, "block status")
    rest = data[U32.size :]
    if not rest or len(rest) % _EXTENT.size:
        raise NbdWireError("a block status has no extents, or half of one")
    extents = [StatusExtent(length, flags) for length, flags in _EXTENT.iter_unpack(rest)]
    if not all(extent.length for extent in extents):
        raise NbdWireError("a block status holds an empty extent")
    return context_id, extents


def pack_error(error: int, message: str = "", *, offset: int | None = None) -> bytes:
    """Return the data of an ERROR chunk, or of ERROR_OFFSET where an offset is given."""
    text = message.encode()[:NAME_BYTES_MAX]
    data = _ERROR.pack(error, len(text)) + text
    return data if offset is None else data + OFFSET.pack(offset)


def unpack_error(kind: int, data: bytes) -> tuple[int, str]:
    """Return error and message of a chunk whose kind has `CHUNK_ERROR_BIT`, of an unknown kind too.

    Raises:
        NbdWireError: malformed, or an error of number 0.
    """
    error, length = take(_ERROR, data, 0, "error")
    end = _ERROR.size + length
    trailing = OFFSET.size if kind == Chunk.ERROR_OFFSET else 0
    known = kind in (Chunk.ERROR, Chunk.ERROR_OFFSET)
    if end > len(data) or (known and len(data) != end + trailing):
        raise NbdWireError("an error has another length than it says")
    if not error:
        raise NbdWireError("an error says that there is none")
    return error, data[_ERROR.size : end].decode(errors="replace")
