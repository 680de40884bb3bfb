"""Messages of the negotiation, from the greeting to the choice of an export."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from holdfast_core.model.nbd.parts import (
    U16,
    U32,
    NbdWireError,
    bounded,
    check_magic,
    decoded,
    packed_text,
    take,
    take_text,
    unpack,
)
from holdfast_core.model.nbd.protocol import (
    INIT_MAGIC,
    OPTION_BYTES_MAX,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    Handshake,
    Info,
)

GREETING: Final = struct.Struct(">QQH")
CLIENT_FLAGS: Final = struct.Struct(">I")
OPTION_HEADER: Final = struct.Struct(">QII")
OPTION_REPLY_HEADER: Final = struct.Struct(">QIII")
EXPORT_NAME_REPLY: Final = struct.Struct(">QH")
EXPORT_NAME_PADDING: Final = 124

_EXPORT_INFO = struct.Struct(">HQH")
_BLOCK_SIZE_INFO = struct.Struct(">HIII")
_MINIMUM_MAX: Final = 64 * 1024


class OptionHeader(NamedTuple):
    """An option's number, as sent, and the length of its data."""

    option: int
    length: int


class OptionReplyHeader(NamedTuple):
    """Which option is answered, the kind of answer, and the length of its data."""

    option: int
    kind: int
    length: int


class ExportInfo(NamedTuple):
    """Size in bytes and flags of an export."""

    size_bytes: int
    flags: int


class BlockSizes(NamedTuple):
    """An export's smallest, preferred and largest request, in bytes."""

    minimum: int
    preferred: int
    maximum: int


class MetaQuery(NamedTuple):
    """What LIST_META_CONTEXT and SET_META_CONTEXT ask: contexts of an export."""

    export: str
    queries: tuple[str, ...]


def pack_greeting(flags: int) -> bytes:
    """Return the server's first bytes."""
    return GREETING.pack(INIT_MAGIC, OPTION_MAGIC, flags)


def unpack_greeting(data: bytes) -> int:
    """Return the server's handshake flags.

    Raises:
        NbdWireError: this is no NBD server, or one of the old style.
    """
    init, option, flags = unpack(GREETING, data, "greeting")
    if init != INIT_MAGIC:
        raise NbdWireError("this is no NBD server")
    if option != OPTION_MAGIC or not flags & Handshake.FIXED_NEWSTYLE:
        raise NbdWireError("the NBD server speaks the old style of negotiation, which is not supported")
    return int(flags)


def pack_option(option: int, data: bytes = b"") -> bytes:
    """Return an option with its data."""
    return OPTION_HEADER.pack(OPTION_MAGIC, option, len(data)) + data


def unpack_option_header(data: bytes) -> OptionHeader:
    """Return an option's header.

    Raises:
        NbdWireError: it is none, or its data is longer than `OPTION_BYTES_MAX`.
    """
    magic, option, length = unpack(OPTION_HEADER, data, "option")
    check_magic(magic, OPTION_MAGIC, "option")
    return OptionHeader(option, bounded(length, OPTION_BYTES_MAX, "option"))


def pack_option_reply(option: int, kind: int, data: bytes = b"") -> bytes:
    """Return an answer to an option."""
    return OPTION_REPLY_HEADER.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def unpack_option_reply_header(data: bytes) -> OptionReplyHeader:
    """Return the header of an answer to an option.

    Raises:
        NbdWireError: it is none, or its data is longer than `OPTION_BYTES_MAX`.
    """
    magic, option, kind, length = unpack(OPTION_REPLY_HEADER, data, "option reply")
    check_magic(magic, OPTION_REPLY_MAGIC, "option reply")
    return OptionReplyHeader(option, kind, bounded(length, OPTION_BYTES_MAX, "option reply"))


def pack_info_request(export: str, infos: Sequence[int] = ()) -> bytes:
    """Return the data of INFO or GO."""
    return packed_text(export) + U16.pack(len(infos)) + b"".join(U16.pack(info) for info in infos)


def unpack_info_request(data: bytes) -> tuple[str, tuple[int, ...]]:
    """Return the export's name and the kinds of information asked for.

    Raises:
        NbdWireError: malformed.
    """
    export, at = take_text(data, 0, "request for an export")
    (count,) = take(U16, data, at, "request for an export")
    at += U16.size
    if len(data) != at + count * U16.size:
        raise NbdWireError("the request for an export has another length than it says")
    return export, struct.unpack_from(f">{count}H", data, at)


def pack_export_info(info: ExportInfo) -> bytes:
    """Return the data of an INFO reply that tells size and flags."""
    return _EXPORT_INFO.pack(Info.EXPORT, info.size_bytes, info.flags)


def pack_text_info(kind: Info, text: str) -> bytes:
    """Return the data of an INFO reply that tells the name or the description."""
    return U16.pack(kind) + text.encode()


def pack_block_size_info(sizes: BlockSizes) -> bytes:
    """Return the data of an INFO reply that tells the sizes of requests."""
    return _BLOCK_SIZE_INFO.pack(Info.BLOCK_SIZE, *sizes)


def unpack_info(data: bytes) -> ExportInfo | BlockSizes | None:
    """Return what an INFO reply tells; None for a kind that is unknown or mere text.

    Raises:
        NbdWireError: malformed, or sizes that contradict one another.
    """
    (kind,) = take(U16, data, 0, "information about an export")
    if kind == Info.EXPORT:
        _, size, flags = unpack(_EXPORT_INFO, data, "information about an export")
        return ExportInfo(size, flags)
    if kind == Info.BLOCK_SIZE:
        sizes = BlockSizes(*unpack(_BLOCK_SIZE_INFO, data, "information about sizes")[1:])
        small = sizes.minimum and not sizes.minimum & (sizes.minimum - 1) and sizes.minimum <= _MINIMUM_MAX
        if not small or not sizes.minimum <= sizes.preferred or sizes.maximum < sizes.minimum:
            raise NbdWireError("the server's sizes of requests contradict one another")
        return sizes
    return None


def pack_meta_query(query: MetaQuery) -> bytes:
    """Return the data of LIST_META_CONTEXT or SET_META_CONTEXT."""
    queries = b"".join(packed_text(text) for text in query.queries)
    return packed_text(query.export) + U32.pack(len(query.queries)) + queries


def unpack_meta_query(data: bytes) -> MetaQuery:
    """Return what is asked.

    Raises:
        NbdWireError: malformed.
    """
    export, at = take_text(data, 0, "query for contexts")
    (count,) = take(U32, data, at, "query for contexts")
    at += U32.size
    if count > (len(data) - at) // U32.size:
        raise NbdWireError("the query for contexts names more of them than it holds")
    queries = []
    for _ in range(count):
        text, at = take_text(data, at, "query for contexts")
        queries.append(text)
    if at != len(data):
        raise NbdWireError("the query for contexts is longer than it says")
    return MetaQuery(export, tuple(queries))


def pack_meta_context(context_id: int, name: str) -> bytes:
    """Return the data of a META_CONTEXT reply."""
    return U32.pack(context_id) + name.encode()


def unpack_meta_context(data: bytes) -> tuple[int, str]:
    """Return a context's number and name.

    Raises:
        NbdWireError: malformed.
    """
    (context_id,) = take(U32, data, 0, "context")
    return context_id, decoded(data[U32.size :], "context")


def pack_server(name: str, description: str = "") -> bytes:
    """Return the data of a SERVER reply, one line of LIST."""
    return packed_text(name) + description.encode()


def unpack_server(data: bytes) -> str:
    """Return the export's name of a SERVER reply.

    Raises:
        NbdWireError: malformed.
    """
    return take_text(data, 0, "list of exports")[0]


def pack_export_name_reply(info: ExportInfo, *, zeroes: bool) -> bytes:
    """Return the answer to EXPORT_NAME; `zeroes` where the client did not ask to leave the padding out."""
    return EXPORT_NAME_REPLY.pack(*info) + (bytes(EXPORT_NAME_PADDING) if zeroes else b"")


def decode_name(data: bytes) -> str:
    """Return an export's name, the data of EXPORT_NAME.

    Raises:
        NbdWireError: it is too long or no UTF-8.
    """
    return decoded(data, "export's name")
