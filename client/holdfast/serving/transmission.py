"""The server's side of NBD's transmission: requests of one connection, several at a time, answered as they are done."""

from __future__ import annotations

import asyncio
from typing import Final

from holdfast.serving.device import Device, Span
from holdfast.serving.negotiation import CONTEXT_ID, Chosen
from holdfast_core.model import nbd
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.nbd import Chunk, Command, CommandFlag, Errno, Status

REQUESTS_MAX: Final = 64
"""Requests of one connection that are worked on at a time."""

BYTES_MAX: Final = nbd.REQUEST_BYTES_MAX
"""Bytes that the requests of one connection may be about to read or write at a time."""

EXTENTS_MAX: Final = 4096

_ALLOWED: Final = {
    Command.READ: CommandFlag.DF,
    Command.WRITE: CommandFlag.FUA,
    Command.FLUSH: CommandFlag(0),
    Command.TRIM: CommandFlag.FUA,
    Command.CACHE: CommandFlag(0),
    Command.WRITE_ZEROES: CommandFlag.FUA | CommandFlag.NO_HOLE,
    Command.BLOCK_STATUS: CommandFlag.REQ_ONE,
}
_WRITING: Final = frozenset({Command.WRITE, Command.TRIM, Command.WRITE_ZEROES})
_NO_SPACE: Final = frozenset({"ENOSPC", "EDQUOT", "EFBIG"})


class RefusedError(Exception):
    """A request that is answered with an error, and the connection goes on."""

    def __init__(self, error: Errno, reason: str) -> None:
        super().__init__(reason)
        self.error = error


class Transmission:
    """Serves one connection after its negotiation."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, chosen: Chosen) -> None:
        """Bind to a connection and the export that it chose."""
        self._reader = reader
        self._writer = writer
        self._device: Device = chosen.device
        self._structured = chosen.structured
        self._allocation = chosen.allocation
        self._tasks: set[asyncio.Task[None]] = set()
        self._bytes = 0
        self._room = asyncio.Event()
        self._sending = asyncio.Lock()

    async def run(self) -> None:
        """Serve until the client disconnects; what it asked for before is finished.

        Raises:
            NbdWireError: the client does not keep to the protocol.
            asyncio.IncompleteReadError, ConnectionError: it went away.
        """
        try:
            while True:
                request = nbd.unpack_request(await self._reader.readexactly(nbd.REQUEST.size))
                if request.command == Command.DISC:
                    return
                await self._take(request)
        finally:
            await self._finish()

    async def _take(self, request: nbd.Request) -> None:
        """Read what belongs to a request and begin to work on it, once there is room."""
        payload = b""
        weight = request.length if request.command in (Command.READ, Command.WRITE) else 0
        if request.command == Command.WRITE and request.length > nbd.REQUEST_BYTES_MAX:
            raise nbd.NbdWireError(f"the client writes {request.length} bytes at once")
        weight = min(weight, nbd.REQUEST_BYTES_MAX)
        while len(self._tasks) >= REQUESTS_MAX or (self._bytes and self._bytes + weight > BYTES_MAX):
            self._room.clear()
            await self._room.wait()
        if request.command == Command.WRITE:
            payload = await self._reader.readexactly(request.length)
        self._bytes += weight
        task = asyncio.create_task(self._serve(request, payload))
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._done(done, weight))

    def _done(self, task: asyncio.Task[None], weight: int) -> None:
        self._tasks.discard(task)
        self._bytes -= weight
        self._room.set()
        failure = None if task.cancelled() else task.exception()
        if failure is not None:
            # The client has gone, or a reply could not be made: the connection cannot go on.
            self._writer.transport.abort()
            if not isinstance(failure, OSError):
                context = {"message": "a request of an NBD client failed", "exception": failure}
                asyncio.get_running_loop().call_exception_handler(context)

    async def _finish(self) -> None:
        """Wait for what is under way; if the server cannot wait any longer, end it, but in no case leave it behind."""
        while self._tasks:
            try:
                await asyncio.wait(self._tasks)
            except asyncio.CancelledError:
                for task in self._tasks:
                    task.cancel()

    async def _serve(self, request: nbd.Request, payload: bytes) -> None:
        try:
            self._check(request)
            reply = await self._perform(request, payload)
        except RefusedError as error:
            reply = self._failure(request, error.error, str(error))
        except HoldfastError as error:
            # Guests stop and wait where there is no space; every other error of a disk is one to them.
            full = error.code is ErrorCode.TARGET_UNWRITABLE and error.facts.get("errno") in _NO_SPACE
            reply = self._failure(request, Errno.NOSPC if full else Errno.IO, error.message)
        async with self._sending:
            for part in reply:
                self._writer.write(part)
            await self._writer.drain()

    def _check(self, request: nbd.Request) -> None:
        """Refuse what is not allowed.

        Raises:
            RefusedError: as it says.
        """
        command, size = request.command, self._device.size_bytes
        if command not in _ALLOWED:
            raise RefusedError(Errno.INVAL, f"command {command} is not known")
        if request.flags & ~_ALLOWED[Command(command)] & 0xFFFF:
            raise RefusedError(Errno.INVAL, f"flags {request.flags:#x} do not belong to command {command}")
        if command == Command.FLUSH:
            return
        if command in _WRITING and self._device.read_only:
            raise RefusedError(Errno.PERM, "the export is read-only")
        if not request.length:
            raise RefusedError(Errno.INVAL, "the request is about no bytes")
        if request.offset > size or request.length > size - request.offset:
            beyond = Errno.NOSPC if command in _WRITING else Errno.INVAL
            raise RefusedError(beyond, f"the request goes beyond the export's {size} bytes")
        if command == Command.READ and request.length > nbd.REQUEST_BYTES_MAX:
            raise RefusedError(Errno.OVERFLOW, f"no more than {nbd.REQUEST_BYTES_MAX} bytes are read at once")
        if command == Command.BLOCK_STATUS and not self._allocation:
            raise RefusedError(Errno.INVAL, "no context was agreed on")

    async def _perform(self, request: nbd.Request, payload: bytes) -> list[bytes]:
        """Do what is asked; returns the reply in parts.

        Raises:
            HoldfastError: what the device says.
        """
        device, command = self._device, request.command
        if command == Command.READ:
            return self._data(request, await device.pieces(request.offset, request.length))
        if command == Command.BLOCK_STATUS:
            spans = await device.spans(request.offset, request.length)
            return self._status(request, spans)
        if command == Command.WRITE:
            await device.write(request.offset, payload)
        elif command == Command.WRITE_ZEROES:
            allocate = bool(request.flags & CommandFlag.NO_HOLE)
            await device.zero(request.offset, request.length, allocate=allocate)
        elif command == Command.TRIM:
            await device.trim(request.offset, request.length)
        elif command == Command.CACHE:
            device.fetch_ahead(request.offset, request.length)
        if command == Command.FLUSH or request.flags & CommandFlag.FUA:
            await device.flush()
        return [nbd.pack_simple_reply(nbd.SimpleReply(0, request.cookie))]

    def _data(self, request: nbd.Request, pieces: list[bytes]) -> list[bytes]:
        if self._structured:
            length = nbd.OFFSET.size + request.length
            chunk = nbd.ChunkHeader(nbd.CHUNK_DONE, Chunk.OFFSET_DATA, request.cookie, length)
            head = nbd.pack_chunk_header(chunk) + nbd.OFFSET.pack(request.offset)
        else:
            head = nbd.pack_simple_reply(nbd.SimpleReply(0, request.cookie))
        # The head goes with the first piece, in one packet where that is all; the other pieces are not copied again.
        return [head + pieces[0], *pieces[1:]]

    def _status(self, request: nbd.Request, spans: list[Span]) -> list[bytes]:
        limit = 1 if request.flags & CommandFlag.REQ_ONE else EXTENTS_MAX
        extents = [
            nbd.StatusExtent(span.length, Status.HOLE | Status.ZERO if span.zero else 0) for span in spans[:limit]
        ]
        data = nbd.pack_block_status(CONTEXT_ID, extents)
        return self._chunk(request, Chunk.BLOCK_STATUS, data)

    def _chunk(self, request: nbd.Request, kind: Chunk, data: bytes) -> list[bytes]:
        return [nbd.pack_chunk_header(nbd.ChunkHeader(nbd.CHUNK_DONE, kind, request.cookie, len(data))) + data]

    def _failure(self, request: nbd.Request, error: Errno, reason: str) -> list[bytes]:
        if self._structured:
            return self._chunk(request, Chunk.ERROR, nbd.pack_error(error, reason))
        return [nbd.pack_simple_reply(nbd.SimpleReply(error, request.cookie))]
