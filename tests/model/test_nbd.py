"""NBD messages: what one side packs the other unpacks, and any bytes are safe to unpack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast_core.model import nbd
from tests.fuzz.mutations import mutated

U16 = st.integers(0, 2**16 - 1)
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
NAMES = st.text(st.characters(codec="utf-8"), max_size=40)


@given(U16, U16, U64, U64, U32)
def test_requests_survive_the_wire(flags: int, command: int, cookie: int, offset: int, length: int) -> None:
    request = nbd.Request(flags, command, cookie, offset, length)
    packed = nbd.pack_request(request)
    assert len(packed) == nbd.REQUEST.size == 28
    assert nbd.unpack_request(packed) == request


@given(U32, U64)
def test_simple_replies_survive_the_wire(error: int, cookie: int) -> None:
    packed = nbd.pack_simple_reply(nbd.SimpleReply(error, cookie))
    assert len(packed) == 16
    assert nbd.reply_magic(packed) == nbd.SIMPLE_REPLY_MAGIC
    assert nbd.unpack_simple_reply(packed) == (error, cookie)


@given(U16, U16, U64, U32)
def test_chunk_heads_survive_the_wire(flags: int, kind: int, cookie: int, length: int) -> None:
    packed = nbd.pack_chunk_header(nbd.ChunkHeader(flags, kind, cookie, length))
    assert len(packed) == 20
    assert nbd.reply_magic(packed) == nbd.CHUNK_MAGIC
    assert nbd.unpack_chunk_header(packed) == (flags, kind, cookie, length)


@given(NAMES, st.lists(NAMES, max_size=4))
def test_queries_for_contexts_survive_the_wire(export: str, queries: list[str]) -> None:
    query = nbd.MetaQuery(export, tuple(queries))
    assert nbd.unpack_meta_query(nbd.pack_meta_query(query)) == query


@given(NAMES, st.lists(U16, max_size=4))
def test_requests_for_an_export_survive_the_wire(export: str, infos: list[int]) -> None:
    assert nbd.unpack_info_request(nbd.pack_info_request(export, infos)) == (export, tuple(infos))


@given(U32, st.lists(st.tuples(st.integers(1, 2**32 - 1), U32), min_size=1, max_size=5))
def test_block_status_survives_the_wire(context_id: int, extents: list[tuple[int, int]]) -> None:
    told = [nbd.StatusExtent(*extent) for extent in extents]
    assert nbd.unpack_block_status(nbd.pack_block_status(context_id, told)) == (context_id, told)


@given(st.integers(1, 2**32 - 1), NAMES, st.one_of(st.none(), U64))
def test_errors_survive_the_wire(error: int, message: str, offset: int | None) -> None:
    kind = nbd.Chunk.ERROR if offset is None else nbd.Chunk.ERROR_OFFSET
    assert nbd.unpack_error(kind, nbd.pack_error(error, message, offset=offset)) == (error, message)


def test_the_negotiation_survives_the_wire() -> None:
    flags = nbd.Handshake.FIXED_NEWSTYLE | nbd.Handshake.NO_ZEROES
    assert nbd.unpack_greeting(nbd.pack_greeting(flags)) == flags
    option = nbd.pack_option(nbd.Option.GO, b"data")
    assert nbd.unpack_option_header(option[: nbd.OPTION_HEADER.size]) == (nbd.Option.GO, 4)
    reply = nbd.pack_option_reply(nbd.Option.GO, nbd.Reply.ERR_UNKNOWN, b"no")
    head = nbd.unpack_option_reply_header(reply[: nbd.OPTION_REPLY_HEADER.size])
    assert head.kind & nbd.REPLY_ERROR_BIT
    assert head == (nbd.Option.GO, nbd.Reply.ERR_UNKNOWN, 2)
    info = nbd.ExportInfo(1 << 40, nbd.Transmission.HAS_FLAGS | nbd.Transmission.SEND_FLUSH)
    assert nbd.unpack_info(nbd.pack_export_info(info)) == info
    sizes = nbd.BlockSizes(1, 4096, 32 << 20)
    assert nbd.unpack_info(nbd.pack_block_size_info(sizes)) == sizes
    assert nbd.unpack_info(nbd.pack_text_info(nbd.Info.DESCRIPTION, "a disk")) is None
    assert nbd.unpack_meta_context(nbd.pack_meta_context(7, nbd.CONTEXT_ALLOCATION)) == (7, nbd.CONTEXT_ALLOCATION)
    assert nbd.unpack_server(nbd.pack_server("root", "the first volume")) == "root"
    assert nbd.unpack_hole(nbd.pack_hole(65536, 4096)) == (65536, 4096)


def test_the_answer_to_export_name_is_padded_unless_the_client_spares_it() -> None:
    info = nbd.ExportInfo(4096, 1)
    assert len(nbd.pack_export_name_reply(info, zeroes=True)) == 134
    assert len(nbd.pack_export_name_reply(info, zeroes=False)) == 10


@pytest.mark.parametrize(
    ("unpack", "data"),
    [
        (nbd.unpack_greeting, b"HTTP/1.1 200 OK\r\n\r"),
        (nbd.unpack_greeting, nbd.pack_greeting(0)),
        (nbd.unpack_option_header, nbd.OPTION_HEADER.pack(nbd.OPTION_MAGIC, 7, nbd.OPTION_BYTES_MAX + 1)),
        (nbd.unpack_option_reply_header, nbd.OPTION_REPLY_HEADER.pack(nbd.OPTION_REPLY_MAGIC, 7, 1, 2**32 - 1)),
        (nbd.unpack_option_header, nbd.OPTION_HEADER.pack(0, 7, 0)),
        (nbd.unpack_info_request, b"\0\0\0\x05root"),
        (nbd.unpack_info_request, b"\0\0\0\x04root\0\2\0\0"),
        (nbd.unpack_info_request, b"\0\0\0\x04\xff\xff\xff\xff\0\0"),
        (nbd.unpack_info, nbd.pack_block_size_info(nbd.BlockSizes(3, 4096, 65536))),
        (nbd.unpack_info, nbd.pack_block_size_info(nbd.BlockSizes(4096, 512, 65536))),
        (nbd.unpack_meta_query, b"\0\0\0\0\xff\xff\xff\xff"),
        (nbd.unpack_meta_query, nbd.pack_meta_query(nbd.MetaQuery("", ("a",))) + b"x"),
        (nbd.decode_name, b"x" * (nbd.NAME_BYTES_MAX + 1)),
        (nbd.decode_name, b"\xff"),
        (nbd.unpack_request, b"\0" * nbd.REQUEST.size),
        (nbd.reply_magic, b"\0\0\0\0"),
        (nbd.unpack_block_status, b"\0\0\0\1"),
        (nbd.unpack_block_status, b"\0\0\0\1" + b"\0" * 8),
        (nbd.unpack_block_status, b"\0\0\0\1" + b"\1" * 7),
        (lambda data: nbd.unpack_error(nbd.Chunk.ERROR, data), nbd.pack_error(5, "x") + b"y"),
        (lambda data: nbd.unpack_error(nbd.Chunk.ERROR, data), b"\0\0\0\0\0\0"),
        (nbd.unpack_hole, b"\0" * 11),
    ],
)
def test_what_the_protocol_does_not_allow_is_refused(unpack: Callable[[bytes], Any], data: bytes) -> None:
    with pytest.raises(nbd.NbdWireError):
        unpack(data)


UNPACKERS: list[tuple[Callable[[bytes], Any], bytes]] = [
    (nbd.unpack_greeting, nbd.pack_greeting(3)),
    (nbd.unpack_option_header, nbd.pack_option(7)),
    (nbd.unpack_option_reply_header, nbd.pack_option_reply(7, 1)),
    (nbd.unpack_info_request, nbd.pack_info_request("root", [0, 3])),
    (nbd.unpack_info, nbd.pack_block_size_info(nbd.BlockSizes(1, 4096, 65536))),
    (nbd.unpack_meta_query, nbd.pack_meta_query(nbd.MetaQuery("root", ("base:", "qemu:")))),
    (nbd.unpack_meta_context, nbd.pack_meta_context(1, "base:allocation")),
    (nbd.unpack_server, nbd.pack_server("root", "first")),
    (nbd.decode_name, b"root"),
    (nbd.unpack_request, nbd.pack_request(nbd.Request(0, 0, 1, 0, 4096))),
    (nbd.unpack_simple_reply, nbd.pack_simple_reply(nbd.SimpleReply(0, 1))),
    (nbd.unpack_chunk_header, nbd.pack_chunk_header(nbd.ChunkHeader(1, 1, 1, 8))),
    (nbd.unpack_block_status, nbd.pack_block_status(1, [nbd.StatusExtent(4096, 3)])),
    (lambda data: nbd.unpack_error(nbd.Chunk.ERROR_OFFSET, data), nbd.pack_error(5, "lost", offset=4)),
    (nbd.unpack_hole, nbd.pack_hole(0, 4096)),
]


@pytest.mark.slow
@given(st.data(), st.sampled_from(range(len(UNPACKERS))))
def test_any_bytes_are_safe_to_unpack(data: st.DataObject, which: int) -> None:
    unpack, good = UNPACKERS[which]
    piece = data.draw(st.one_of(mutated(good), st.binary(max_size=80)))
    refused = None
    try:
        unpack(piece)
    except nbd.NbdWireError as error:
        refused = error
    assert refused is None or str(refused)
    unpack(good)
