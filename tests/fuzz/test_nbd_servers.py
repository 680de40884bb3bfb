"""NBD servers that send anything: the client fails plainly, or returns what the answer says and nothing else."""

from __future__ import annotations

import itertools
import socket
from typing import Any, cast

from hypothesis import example, given, settings
from hypothesis import strategies as st

from holdfast.sources.nbd_connection import NbdAsked, NbdConnection, NbdEndpoint, NbdExtent
from holdfast_core.model import nbd
from holdfast_core.model.errors import ErrorCode, HoldfastError
from tests.fuzz.mutations import mutated, outcome

SIZE = 1 << 20
CONTEXT = nbd.CONTEXT_BITMAP_PREFIX + "holdfast-a"
ASKED = NbdAsked("disk", (nbd.CONTEXT_ALLOCATION, CONTEXT), (nbd.CONTEXT_BITMAP_PREFIX,))
LENGTH = 600


class Prepared:
    """A server whose whole side of the talk is known beforehand; then it hangs up."""

    def __init__(self, answers: bytes) -> None:
        self._answers = answers

    def connected(self, timeout_s: float) -> socket.socket:
        """Return the client's end of a connection."""
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.sendall(self._answers)
            theirs.shutdown(socket.SHUT_WR)
            # What the client says is read when there is room no more, which is never: it says little.
            self._kept = theirs.dup()
        return ours

    def close(self) -> None:
        """Hang up for good."""
        self._kept.close()


def reply(option: nbd.Option, kind: int, data: bytes = b"") -> bytes:
    """An answer to an option."""
    return nbd.pack_option_reply(option, kind, data)


def chunk(kind: int, data: bytes, *, done: bool = False, cookie: int = 1) -> bytes:
    """A chunk of a structured reply."""
    return nbd.pack_chunk_header(nbd.ChunkHeader(int(done), kind, cookie, len(data))) + data


NEGOTIATED = b"".join(
    [
        nbd.pack_greeting(nbd.Handshake.FIXED_NEWSTYLE | nbd.Handshake.NO_ZEROES),
        reply(nbd.Option.STRUCTURED_REPLY, nbd.Reply.ACK),
        reply(nbd.Option.LIST_META_CONTEXT, nbd.Reply.META_CONTEXT, nbd.pack_meta_context(0, CONTEXT)),
        reply(nbd.Option.LIST_META_CONTEXT, nbd.Reply.ACK),
        reply(nbd.Option.SET_META_CONTEXT, nbd.Reply.META_CONTEXT, nbd.pack_meta_context(7, nbd.CONTEXT_ALLOCATION)),
        reply(nbd.Option.SET_META_CONTEXT, nbd.Reply.META_CONTEXT, nbd.pack_meta_context(9, CONTEXT)),
        reply(nbd.Option.SET_META_CONTEXT, nbd.Reply.ACK),
        reply(nbd.Option.GO, nbd.Reply.INFO, nbd.pack_block_size_info(nbd.BlockSizes(1, 4096, 1 << 25))),
        reply(nbd.Option.GO, nbd.Reply.INFO, nbd.pack_export_info(nbd.ExportInfo(SIZE, nbd.Transmission.HAS_FLAGS))),
        reply(nbd.Option.GO, nbd.Reply.ACK),
    ]
)
READ = b"".join(
    [
        chunk(nbd.Chunk.OFFSET_DATA, nbd.OFFSET.pack(100) + b"x" * 400),
        chunk(nbd.Chunk.OFFSET_HOLE, nbd.pack_hole(500, 200)),
        chunk(nbd.Chunk.NONE, b"", done=True),
    ]
)
STATUS = b"".join(
    [
        chunk(nbd.Chunk.BLOCK_STATUS, nbd.pack_block_status(7, [nbd.StatusExtent(4096, 3)]), cookie=2),
        chunk(
            nbd.Chunk.BLOCK_STATUS,
            nbd.pack_block_status(9, [nbd.StatusExtent(4096, 0), nbd.StatusExtent(1 << 31, 1)]),
            done=True,
            cookie=2,
        ),
    ]
)
FAILED = chunk(nbd.Chunk.ERROR_OFFSET, nbd.pack_error(nbd.Errno.IO, "a \x1b[31mbad\x07 sector", offset=100), done=True)
EXPORT_NAMED = b"".join(
    [
        nbd.pack_greeting(nbd.Handshake.FIXED_NEWSTYLE),
        reply(nbd.Option.STRUCTURED_REPLY, nbd.Reply.ERR_UNSUP),
        reply(nbd.Option.GO, nbd.Reply.ERR_UNSUP),
        nbd.pack_export_name_reply(nbd.ExportInfo(SIZE, 1), zeroes=True),
        nbd.pack_simple_reply(nbd.SimpleReply(0, 1)) + b"y" * LENGTH,
    ]
)


def talk(answers: bytes) -> tuple[NbdConnection, bytes, list[NbdExtent]]:
    """Negotiate, read and ask for the status of the bitmap."""
    server = Prepared(answers)
    try:
        connection = NbdConnection(cast(NbdEndpoint, cast(Any, server)), ASKED, timeout_s=5.0)
        try:
            buffer = bytearray(LENGTH)
            start = min(100, max(0, connection.export.size_bytes - LENGTH))
            usable = memoryview(buffer)[: min(LENGTH, connection.export.size_bytes)]
            connection.read_into(start, usable)
            told: list[NbdExtent] = []
            if CONTEXT in connection.export.contexts and connection.export.size_bytes > 1:
                told = connection.block_status(CONTEXT, 1, connection.export.size_bytes)
            return connection, bytes(usable), told
        finally:
            connection.close()
    finally:
        server.close()


def test_the_right_answers_are_understood() -> None:
    connection, data, told = talk(NEGOTIATED + READ + STATUS)
    assert connection.export.listed == (CONTEXT,)
    assert data == b"x" * 400 + bytes(200)
    assert told == [NbdExtent(1, 4097, 0), NbdExtent(4097, SIZE, 1)]
    assert talk(EXPORT_NAMED)[1] == b"y" * LENGTH


def test_what_a_server_says_of_an_error_is_cleaned() -> None:
    error = outcome(lambda: talk(NEGOTIATED + FAILED), ErrorCode.SOURCE_UNREADABLE)
    assert isinstance(error, HoldfastError)
    assert "Input/output error (a ?[31mbad? sector)" in error.message
    assert error.message.isprintable()


@settings(max_examples=400, deadline=None)
@given(
    answers=mutated(NEGOTIATED + READ + STATUS, EXPORT_NAMED + FAILED)
    | mutated(EXPORT_NAMED, NEGOTIATED + READ)
    | mutated(NEGOTIATED + FAILED, STATUS)
    | st.binary(max_size=200)
)
@example(answers=NEGOTIATED + chunk(nbd.Chunk.OFFSET_DATA, b"12345678"))
@example(
    answers=NEGOTIATED + nbd.pack_chunk_header(nbd.ChunkHeader(0, nbd.Chunk.OFFSET_DATA, 1, 2**32 - 1)) + b"x" * 99
)
@example(answers=NEGOTIATED + READ + nbd.pack_chunk_header(nbd.ChunkHeader(1, nbd.Chunk.BLOCK_STATUS, 2, 2**32 - 1)))
@example(answers=NEGOTIATED + chunk(nbd.Chunk.ERROR, nbd.pack_error(5)) * 1000)
@example(answers=NEGOTIATED.replace(nbd.pack_meta_context(9, CONTEXT), nbd.pack_meta_context(7, CONTEXT)))
@example(answers=NEGOTIATED + nbd.pack_simple_reply(nbd.SimpleReply(0, 1)) + b"x" * LENGTH)
def test_whatever_comes_is_an_answer_or_a_plain_error(answers: bytes) -> None:
    result = outcome(lambda: talk(answers), ErrorCode.SOURCE_UNREADABLE)
    if isinstance(result, HoldfastError):
        assert result.message.isprintable()
        return
    connection, data, told = result
    assert len(data) == min(LENGTH, connection.export.size_bytes)
    assert all(one.end == other.start for one, other in itertools.pairwise(told))
    if told:
        assert (told[0].start, told[-1].end <= connection.export.size_bytes) == (1, True)


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(
        st.tuples(st.booleans(), st.integers(60, 720), st.integers(0, 640)),
        max_size=4,
    )
    | st.permutations([(True, 100, 250), (False, 350, 50), (True, 400, 300)])
)
@example(pieces=[(False, 100, LENGTH)])
@example(pieces=[(True, 100, 300), (True, 399, 301)])
@example(pieces=[(True, 100, 300), (True, 401, 299)])
@example(pieces=[(True, 100, LENGTH), (False, 100, 1)])
def test_a_read_is_done_when_each_byte_came_once(pieces: list[tuple[bool, int, int]]) -> None:
    chunks, expected = [], bytearray(LENGTH)
    came: list[int] = []
    for number, (hole, offset, length) in enumerate(pieces):
        if hole:
            chunks.append(chunk(nbd.Chunk.OFFSET_HOLE, nbd.pack_hole(offset, length)))
        else:
            chunks.append(chunk(nbd.Chunk.OFFSET_DATA, nbd.OFFSET.pack(offset) + bytes([number + 1]) * length))
            expected[max(0, offset - 100) : max(0, offset - 100 + length)] = bytes([number + 1]) * length
        came += range(offset, offset + length)
    whole = all(length for _, _, length in pieces) and sorted(came) == list(range(100, 100 + LENGTH))
    answers = NEGOTIATED + b"".join(chunks) + chunk(nbd.Chunk.NONE, b"", done=True) + STATUS
    result = outcome(lambda: talk(answers), ErrorCode.SOURCE_UNREADABLE)
    assert isinstance(result, HoldfastError) == (not whole)
    if not isinstance(result, HoldfastError):
        assert result[1] == bytes(expected)
