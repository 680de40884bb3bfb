"""One connection to an NBD server: negotiation, reads and block status, one request at a time.

The server is not trusted: every length is checked before it is believed, a read is done only when each of its bytes
came exactly once, and each answer has a deadline, so that the worst a server can do is to fail the backup or to give
wrong bytes of its own disk. Text that it sends is cleaned before it reaches a message.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, NamedTuple

from holdfast_core.model import nbd
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import KIB, MIB
from holdfast_core.model.nbd import NbdWireError

CONNECT_TIMEOUT_S: Final = 10.0
ANSWER_TIMEOUT_S: Final = 60.0

# Longer reads are cut: an answer of this size is worth its turn, and keeps the memory of either side small.
_READ_BYTES_MAX: Final = 8 * MIB
_STATUS_BYTES_STEP: Final = 1024 * MIB
_STATUS_ANSWER_BYTES_MAX: Final = 8 * MIB
_CONTEXTS_LISTED_MAX: Final = 4096
_ERRORS_OF_ONE_ANSWER_MAX: Final = 64
_MESSAGE_CHARS_MAX: Final = 200
_EXPORT_BYTES_MAX: Final = 2**63 - 1
_ZEROES: Final = bytes(256 * KIB)


@dataclass(frozen=True, slots=True)
class NbdEndpoint:
    """Where an NBD server listens: a Unix socket if `socket_path` is given, else host and port."""

    host: str = ""
    port: int = nbd.DEFAULT_PORT
    socket_path: str = ""

    def __str__(self) -> str:
        """The endpoint as messages name it."""
        if self.socket_path:
            return self.socket_path
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def connected(self, timeout_s: float) -> socket.socket:
        """Return a new connection.

        Raises:
            OSError: nobody listens there, or does not answer in time.
        """
        if not self.socket_path:
            made = socket.create_connection((self.host, self.port), timeout_s)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return made
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            made.settimeout(timeout_s)
            made.connect(self.socket_path)
        except BaseException:
            made.close()
            raise
        return made


@dataclass(frozen=True, slots=True)
class NbdExport:
    """What the server said of an export.

    Attributes:
        size_bytes: its size.
        flags: bits of `nbd.Transmission`.
        request_bytes_min: offsets and lengths of requests are multiples of it.
        request_bytes_max: no request may be longer.
        structured: whether answers come in chunks, which block status needs.
        contexts: number of each metadata context that was asked for and is there, by name.
        listed: names of all contexts that match the queries that were listed.
    """

    size_bytes: int
    flags: int
    request_bytes_min: int
    request_bytes_max: int
    structured: bool
    contexts: Mapping[str, int]
    listed: tuple[str, ...]

    @property
    def read_only(self) -> bool:
        """Whether the server takes no writes to it from anybody."""
        return bool(self.flags & nbd.Transmission.READ_ONLY)

    @property
    def shareable(self) -> bool:
        """Whether it may be read over several connections."""
        return bool(self.flags & nbd.Transmission.CAN_MULTI_CONN)


class NbdExtent(NamedTuple):
    """A range of bytes, `start` to before `end`, and what a metadata context says of it."""

    start: int
    end: int
    flags: int


@dataclass(frozen=True, slots=True)
class NbdAsked:
    """What to ask a server for: an export, the contexts to use, and queries whose matches are to be listed."""

    export: str = ""
    contexts: tuple[str, ...] = ()
    queries: tuple[str, ...] = ()


class NbdConnection:
    """A connection whose negotiation is done. Not safe to share, but for `shut`."""

    export: NbdExport

    def __init__(self, endpoint: NbdEndpoint, asked: NbdAsked, *, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        """Connect and negotiate.

        Raises:
            HoldfastError: SOURCE_UNREADABLE if nobody answers, there is no such export, TLS is demanded, or the server
                does not keep to the protocol.
        """
        self.name = f"{asked.export!r} of {endpoint}" if asked.export else str(endpoint)
        self.broken = False
        self._timeout_s = timeout_s
        self._cookie = 0
        connect_s = min(CONNECT_TIMEOUT_S, timeout_s)
        self._deadline = time.monotonic() + connect_s
        try:
            self._socket = endpoint.connected(connect_s)
        except OSError as error:
            raise self._unreadable(f"no NBD server answers: {_reason(error)}") from error
        try:
            self.export = self._negotiated(asked)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError | NbdWireError):
                raise self._failed(error) from error
            raise

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes at `offset`.

        Raises:
            HoldfastError: SOURCE_UNREADABLE.
        """
        end = offset + len(buffer)
        if offset < 0 or end > self.export.size_bytes:
            raise ValueError("the range lies outside the export")
        step = min(_READ_BYTES_MAX, self.export.request_bytes_max)
        unit = self.export.request_bytes_min
        try:
            for start in range(offset, end, step):
                stop = min(start + step, end)
                view = buffer[start - offset : stop - offset]
                low, high = start - start % unit, min(self.export.size_bytes, -(-stop // unit) * unit)
                if (low, high) == (start, stop):
                    self._read(start, view)
                else:
                    whole = memoryview(bytearray(high - low))
                    for at in range(low, high, step):
                        self._read(at, whole[at - low : min(at + step, high) - low])
                    view[:] = whole[start - low : stop - low]
        except (OSError, NbdWireError) as error:
            raise self._failed(error) from error

    def block_status(self, context: str, start: int, end: int) -> list[NbdExtent]:
        """Return what a negotiated context says of the bytes from `start` on: up to `end`, or less, but not nothing.

        Raises:
            HoldfastError: SOURCE_UNREADABLE.
        """
        unit = self.export.request_bytes_min
        low = start - start % unit
        high = min(self.export.size_bytes, -(-end // unit) * unit, low + _STATUS_BYTES_STEP)
        if not 0 <= start < end <= self.export.size_bytes:
            raise ValueError("the range lies outside the export")
        try:
            told = self._status(low, high - low)[self.export.contexts[context]]
        except (OSError, NbdWireError) as error:
            raise self._failed(error) from error
        extents: list[NbdExtent] = []
        at = low
        for length, flags in told:
            upto = min(at + length, high, end)
            if upto > max(at, start):
                extents.append(NbdExtent(max(at, start), upto, flags))
            at += length
            if at >= min(high, end):
                break
        if not extents:
            self.broken = True
            raise self._unreadable("the NBD server says nothing of the range that it was asked about")
        return extents

    def shut(self) -> None:
        """Wake whoever waits for an answer, from another thread; the connection is of no more use."""
        self.broken = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it was not connected any more

    def close(self) -> None:
        """Say goodbye if it still may, and close; may be called more than once."""
        try:
            if not self.broken and hasattr(self, "export"):
                self._socket.settimeout(1.0)
                self._socket.sendall(nbd.pack_request(nbd.Request(0, nbd.Command.DISC, 0, 0, 0)))
        except OSError:
            self.broken = True
        finally:
            self.broken = True
            self._socket.close()

    # Negotiation

    def _negotiated(self, asked: NbdAsked) -> NbdExport:
        flags = nbd.unpack_greeting(self._receive(nbd.GREETING.size))
        no_zeroes = flags & nbd.Handshake.NO_ZEROES
        self._send(nbd.CLIENT_FLAGS.pack(nbd.Handshake.FIXED_NEWSTYLE | no_zeroes))
        structured = self._option(nbd.Option.STRUCTURED_REPLY)[0] == nbd.Reply.ACK
        contexts: dict[str, int] = {}
        listed: tuple[str, ...] = ()
        if structured and asked.queries:
            query = nbd.pack_meta_query(nbd.MetaQuery(asked.export, asked.queries))
            listed = tuple(name for _, name in self._contexts(nbd.Option.LIST_META_CONTEXT, query))
        if structured and asked.contexts:
            query = nbd.pack_meta_query(nbd.MetaQuery(asked.export, asked.contexts))
            for number, name in self._contexts(nbd.Option.SET_META_CONTEXT, query):
                if name not in asked.contexts or name in contexts or number in contexts.values():
                    raise NbdWireError(f"a context was not asked for, or came twice: {_clean(name)}")
                contexts[name] = number
        info, sizes = self._go(asked.export, zeroes=not no_zeroes)
        if info.size_bytes > _EXPORT_BYTES_MAX:
            raise NbdWireError(f"the export is said to have {info.size_bytes} bytes")
        return NbdExport(
            info.size_bytes,
            info.flags,
            sizes.minimum,
            min(nbd.REQUEST_BYTES_MAX, sizes.maximum - sizes.maximum % sizes.minimum),
            structured,
            MappingProxyType(contexts),
            listed,
        )

    def _option(self, option: nbd.Option, data: bytes = b"") -> tuple[int, list[bytes], list[bytes]]:
        """Send an option; returns how it ended, and the data of INFO and of META_CONTEXT answers before that."""
        self._send(nbd.pack_option(option, data))
        infos: list[bytes] = []
        contexts: list[bytes] = []
        while True:
            header = nbd.unpack_option_reply_header(self._receive(nbd.OPTION_REPLY_HEADER.size))
            if header.option != option:
                raise NbdWireError(f"option {option} was sent, and option {header.option} is answered")
            answer = self._receive(header.length)
            if header.kind == nbd.Reply.ACK or header.kind & nbd.REPLY_ERROR_BIT:
                return header.kind, infos, contexts
            kept = {int(nbd.Reply.INFO): infos, int(nbd.Reply.META_CONTEXT): contexts}.get(header.kind)
            if kept is None or len(kept) >= _CONTEXTS_LISTED_MAX:
                raise NbdWireError(f"option {option} is answered by {header.kind}, or too often")
            kept.append(answer)

    def _contexts(self, option: nbd.Option, query: bytes) -> list[tuple[int, str]]:
        kind, _, answers = self._option(option, query)
        return [nbd.unpack_meta_context(answer) for answer in answers] if kind == nbd.Reply.ACK else []

    def _go(self, export: str, *, zeroes: bool) -> tuple[nbd.ExportInfo, nbd.BlockSizes]:
        kind, answers, _ = self._option(nbd.Option.GO, nbd.pack_info_request(export, [nbd.Info.BLOCK_SIZE]))
        sizes = nbd.BlockSizes(1, 4 * KIB, nbd.REQUEST_BYTES_MAX)
        if kind == nbd.Reply.ERR_UNSUP:
            self._send(nbd.pack_option(nbd.Option.EXPORT_NAME, export.encode()))
            padding = nbd.EXPORT_NAME_PADDING if zeroes else 0
            answer = self._receive(nbd.EXPORT_NAME_REPLY.size + padding)
            return nbd.ExportInfo(*nbd.EXPORT_NAME_REPLY.unpack_from(answer)), sizes
        if kind & nbd.REPLY_ERROR_BIT:
            raise self._unreadable(_REFUSALS.get(kind, f"the NBD server refuses it with error {kind & 0xFFFF}"))
        info: nbd.ExportInfo | None = None
        for answer in answers:
            told = nbd.unpack_info(answer)
            if isinstance(told, nbd.ExportInfo):
                info = told
            elif isinstance(told, nbd.BlockSizes):
                sizes = told
        if info is None:
            raise NbdWireError("the server does not say how large the export is")
        return info, sizes

    # Requests

    def _request(self, command: nbd.Command, offset: int, length: int) -> int:
        self._deadline = time.monotonic() + self._timeout_s
        self._cookie += 1
        self._send(nbd.pack_request(nbd.Request(0, command, self._cookie, offset, length)))
        return self._cookie

    def _read(self, offset: int, view: memoryview) -> None:
        cookie = self._request(nbd.Command.READ, offset, len(view))
        if not self.export.structured:
            self._simple(self._receive(nbd.SIMPLE_REPLY.size), cookie)
            self._fill(view)
            return
        answer = _Answer(self, cookie)
        came: list[tuple[int, int]] = []
        while (header := answer.chunk()) is not None:
            if header.kind == nbd.Chunk.OFFSET_DATA and header.length > nbd.OFFSET.size:
                (at,) = nbd.OFFSET.unpack(self._receive(nbd.OFFSET.size))
                part = _part(view, at - offset, header.length - nbd.OFFSET.size)
                self._fill(part)
            elif header.kind == nbd.Chunk.OFFSET_HOLE and header.length == nbd.HOLE.size:
                at, length = nbd.unpack_hole(self._receive(nbd.HOLE.size))
                part = _part(view, at - offset, length)
                for zero in range(0, length, len(_ZEROES)):
                    part[zero : zero + len(_ZEROES)] = _ZEROES[: length - zero]
            else:
                raise NbdWireError(f"a read is answered by a chunk of kind {header.kind} with {header.length} bytes")
            came.append((at, at + len(part)))
            if len(came) > len(view):
                raise NbdWireError("a read is answered by more chunks than it has bytes")
        at = offset
        for start, end in sorted(came):
            if start != at:
                break
            at = end
        if at != offset + len(view):
            raise NbdWireError("a read is answered with bytes left out, or given twice")

    def _status(self, offset: int, length: int) -> Mapping[int, Sequence[nbd.StatusExtent]]:
        cookie = self._request(nbd.Command.BLOCK_STATUS, offset, length)
        answer = _Answer(self, cookie)
        told: dict[int, Sequence[nbd.StatusExtent]] = {}
        while (header := answer.chunk()) is not None:
            if header.kind != nbd.Chunk.BLOCK_STATUS or header.length > _STATUS_ANSWER_BYTES_MAX:
                raise NbdWireError(f"block status is answered by kind {header.kind} with {header.length} bytes")
            context, extents = nbd.unpack_block_status(self._receive(header.length))
            if context in told:
                raise NbdWireError("block status comes twice for one context")
            told[context] = extents
        if told.keys() != set(self.export.contexts.values()):
            raise NbdWireError("block status comes for other contexts than were negotiated")
        return told

    def _simple(self, data: bytes, cookie: int) -> None:
        reply = nbd.unpack_simple_reply(data)
        if reply.cookie != cookie:
            raise NbdWireError("an answer belongs to no request")
        if reply.error:
            raise self._unreadable(f"the NBD server reports: {_named(reply.error)}")

    # Bytes

    def _send(self, data: bytes) -> None:
        self._socket.settimeout(self._left_s())
        self._socket.sendall(data)

    def _receive(self, count: int) -> bytes:
        data = bytearray(count)
        self._fill(memoryview(data))
        return bytes(data)

    def _fill(self, view: memoryview) -> None:
        done, count = 0, len(view)
        while done < count:
            self._socket.settimeout(self._left_s())
            got = self._socket.recv_into(view[done:])
            if not got:
                raise ConnectionResetError("the NBD server ended the connection")
            done += got

    def _left_s(self) -> float:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        return left_s

    # Errors

    def _failed(self, error: OSError | NbdWireError) -> HoldfastError:
        self.broken = True
        if isinstance(error, NbdWireError):
            return self._unreadable(f"the NBD server does not keep to the protocol: {error}")
        return self._unreadable(_reason(error))

    def _unreadable(self, why: str) -> HoldfastError:
        return HoldfastError(ErrorCode.SOURCE_UNREADABLE, f"the export {self.name} cannot be read: {why}")


class _Answer:
    """The chunks of a structured reply to one request; errors among them are raised at its end."""

    def __init__(self, connection: NbdConnection, cookie: int) -> None:
        self._connection = connection
        self._cookie = cookie
        self._errors: list[str] = []
        self._done = False

    def chunk(self) -> nbd.ChunkHeader | None:
        """Return the head of the next chunk that carries content, whose data is to be read next; None at the end."""
        connection = self._connection
        while not self._done:
            begin = connection._receive(nbd.SIMPLE_REPLY.size)
            if nbd.reply_magic(begin) == nbd.SIMPLE_REPLY_MAGIC:
                connection._simple(begin, self._cookie)
                raise NbdWireError("a structured answer was agreed on, and a simple one came")
            rest = connection._receive(nbd.CHUNK_HEADER.size - nbd.SIMPLE_REPLY.size)
            header = nbd.unpack_chunk_header(begin + rest)
            if header.cookie != self._cookie:
                raise NbdWireError("an answer belongs to no request")
            self._done = bool(header.flags & nbd.CHUNK_DONE)
            if header.kind & nbd.CHUNK_ERROR_BIT:
                self._take_error(header)
            elif header.kind != nbd.Chunk.NONE:
                return header
            elif header.length or not self._done:
                raise NbdWireError("a chunk without content does not end its answer")
        if self._errors:
            raise connection._unreadable(f"the NBD server reports: {self._errors[0]}")
        return None

    def _take_error(self, header: nbd.ChunkHeader) -> None:
        if header.length > nbd.OPTION_BYTES_MAX or len(self._errors) >= _ERRORS_OF_ONE_ANSWER_MAX:
            raise NbdWireError("an answer has more errors, or longer ones, than an answer has")
        error, message = nbd.unpack_error(header.kind, self._connection._receive(header.length))
        self._errors.append(f"{_named(error)} ({_clean(message)})" if message else _named(error))


_REFUSALS: Final = MappingProxyType(
    {
        int(nbd.Reply.ERR_UNKNOWN): "the NBD server has no export of that name",
        int(nbd.Reply.ERR_TLS_REQD): "the NBD server wants TLS, which is not supported",
        int(nbd.Reply.ERR_POLICY): "the NBD server does not allow it",
        int(nbd.Reply.ERR_SHUTDOWN): "the NBD server is about to end",
    }
)


def _part(view: memoryview, start: int, length: int) -> memoryview:
    """Return the part of a read that a chunk is about, which lies wholly within it."""
    if start < 0 or length < 1 or start + length > len(view):
        raise NbdWireError("a read is answered with bytes from outside its range")
    return view[start : start + length]


def _named(error: int) -> str:
    return os.strerror(error) if error in set(nbd.Errno) else f"error {error}"


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    return error.strerror or str(error) or type(error).__name__


def _clean(text: str) -> str:
    """Return text of a server without anything that a terminal or log would act on."""
    return "".join(character if character.isprintable() else "?" for character in text[:_MESSAGE_CHARS_MAX])
