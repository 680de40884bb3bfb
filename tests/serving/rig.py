"""A small NBD client that can also misbehave, a `holdfast serve` as a process, and points to serve."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from holdfast_core.model import nbd
from holdfast_core.model.nbd import Command, Option
from tests.e2e.harness import COMMAND, environment, eventually

ANSWERS_WITHIN_S = 30.0


class Wire:
    """A connection that sends and takes bytes as they are; a context manager."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(ANSWERS_WITHIN_S)
        self.socket.connect(str(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send bytes."""
        self.socket.sendall(data)

    def take(self, count: int) -> bytes:
        """Return so many bytes; ConnectionError if they do not come."""
        data = bytearray()
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            if not piece:
                raise ConnectionError("the server has closed the connection")
            data += piece
        return bytes(data)

    def finish(self) -> None:
        """Say that nothing more will be sent."""
        with contextlib.suppress(OSError):  # the server may have hung up already
            self.socket.shutdown(socket.SHUT_WR)

    def ended(self) -> bool:
        """Whether the server closes the connection, whatever it sends before."""
        try:
            while self.socket.recv(65536):
                pass
        except ConnectionError:
            return True
        return True

    def greet(self, flags: int = 3) -> None:
        """Take the greeting and answer it."""
        assert nbd.unpack_greeting(self.take(nbd.GREETING.size)) == 3
        self.send(nbd.CLIENT_FLAGS.pack(flags))

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; return the kinds and data of the replies to it, up to the last."""
        self.send(nbd.pack_option(option, data))
        replies = []
        while True:
            head = nbd.unpack_option_reply_header(self.take(nbd.OPTION_REPLY_HEADER.size))
            assert head.option == option
            replies.append((head.kind, self.take(head.length)))
            if head.kind == nbd.Reply.ACK or head.kind & nbd.REPLY_ERROR_BIT:
                return replies


class Client(Wire):
    """A client of an export that waits for each answer.

    Attributes:
        info: size and flags of the export.
    """

    def __init__(self, path: Path, export: str = "root", *, structured: bool = True) -> None:
        super().__init__(path)
        self._cookie = 0
        self._structured = structured
        self.greet()
        if structured:
            assert self.option(Option.STRUCTURED_REPLY) == [(nbd.Reply.ACK, b"")]
            query = nbd.MetaQuery(export, (nbd.CONTEXT_ALLOCATION,))
            assert self.option(Option.SET_META_CONTEXT, nbd.pack_meta_query(query))[-1][0] == nbd.Reply.ACK
        replies = self.option(Option.GO, nbd.pack_info_request(export))
        assert replies[-1][0] == nbd.Reply.ACK, replies
        infos = [nbd.unpack_info(data) for kind, data in replies if kind == nbd.Reply.INFO]
        self.info = next(info for info in infos if isinstance(info, nbd.ExportInfo))

    def request(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b"") -> None:
        """Send a request and wait for nothing."""
        self._cookie += 1
        self.send(nbd.pack_request(nbd.Request(flags, command, self._cookie, offset, length)) + payload)

    def answer(self, length: int = 0) -> tuple[int, bytes]:
        """Return error and data of the next reply; `length` is what a simple reply to a read brings."""
        head = self.take(nbd.SIMPLE_REPLY.size)
        if nbd.reply_magic(head) == nbd.SIMPLE_REPLY_MAGIC:
            reply = nbd.unpack_simple_reply(head)
            return reply.error, self.take(length) if length and not reply.error else b""
        chunk = nbd.unpack_chunk_header(head + self.take(nbd.CHUNK_HEADER.size - len(head)))
        assert chunk.flags & nbd.CHUNK_DONE
        data = self.take(chunk.length)
        if chunk.kind & nbd.CHUNK_ERROR_BIT:
            return nbd.unpack_error(chunk.kind, data)[0], b""
        return 0, data

    def ask(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b"") -> int:
        """Send a request and return its error, 0 for none."""
        self.request(command, offset, length, flags=flags, payload=payload)
        return self.answer()[0]

    def read(self, offset: int, length: int) -> bytes:
        """Read; the server must not refuse."""
        self.request(Command.READ, offset, length)
        error, data = self.answer(length)
        assert error == 0, error
        return data[nbd.OFFSET.size :] if self._structured else data

    def write(self, offset: int, data: bytes, *, flags: int = 0) -> None:
        """Write; the server must not refuse."""
        assert self.ask(Command.WRITE, offset, len(data), flags=flags, payload=data) == 0

    def flush(self) -> None:
        """Flush; the server must not refuse."""
        assert self.ask(Command.FLUSH) == 0

    def status(self, offset: int, length: int, *, flags: int = 0) -> list[nbd.StatusExtent]:
        """Return block status; the server must not refuse."""
        self.request(Command.BLOCK_STATUS, offset, length, flags=flags)
        error, data = self.answer()
        assert error == 0, error
        return nbd.unpack_block_status(data)[1]


@dataclass
class Serve:
    """One `holdfast serve` in a process of its own. A context manager; kills what still runs.

    Attributes:
        lines: how many lines it prints when it is ready.
        uris: the NBD URIs that it printed.
    """

    coordinator: str
    token: str
    arguments: Sequence[str]
    folder: Path
    lines: int = 1
    uris: list[str] = field(default_factory=list)
    stdout: list[str] = field(default_factory=list)
    stderr: list[str] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Serve:
        token_file = self.folder / "serve.token"
        with os.fdopen(os.open(token_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
            stream.write(self.token)
        connection = ("--coordinator", self.coordinator, "--token-file", str(token_file))
        process = self.process = subprocess.Popen(
            [*COMMAND, "serve", *self.arguments, *connection],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        self.stdout.clear()
        self.stderr.clear()
        self._readers = [
            threading.Thread(target=lambda: self.stdout.extend(process.stdout or ()), daemon=True),
            threading.Thread(target=lambda: self.stderr.extend(process.stderr or ()), daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        try:
            eventually(lambda: len(self.stdout) >= self.lines or process.poll() is not None, "the ready line")
            assert self.stdout, "".join(self.stderr)
        except BaseException:
            self.kill()
            raise
        self.uris = [line.strip().removeprefix("ready ") for line in self.stdout]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()

    def stop(self) -> list[str]:
        """Send SIGTERM; returns the lines that it printed after the ready ones. It must end well."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=60)
        self._join()
        assert code == 0, "".join(self.stderr)
        return [line.strip() for line in self.stdout[len(self.uris) :]]

    def kill(self) -> None:
        """End it with SIGKILL, if it still runs."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(timeout=20)
        self._join()

    def _join(self) -> None:
        for reader in self._readers:
            reader.join(timeout=10)
