"""An NBD server on an event loop: listens, and serves each connection until its client is done.

Whatever a client sends costs it its own connection at most. What a connection may hold of memory, and how many there
may be, is bounded.
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

from holdfast.serving.device import Device
from holdfast.serving.negotiation import Negotiation
from holdfast.serving.transmission import Transmission
from holdfast_core.model import nbd
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.options import format_address

CONNECTIONS_MAX: Final = 64
NEGOTIATION_S: Final = 30.0
_STREAM_BYTES: Final = 1024 * 1024
_CLOSE_S: Final = 10.0
_SOCKET_PATH_BYTES_MAX: Final = 107


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """Where to listen: a host, and a port of which 0 takes a free one."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class SocketAddress:
    """Where to listen: the path of a Unix socket."""

    path: Path


Address = TcpAddress | SocketAddress


class NbdServer:
    """Serves exports until it is closed. Belongs to an event loop."""

    def __init__(self, devices: Mapping[str, Device]) -> None:
        """Take the exports by name; the first is also the one without a name."""
        self._names = list(devices)
        self._exports: dict[str, Device] = {"": devices[self._names[0]], **devices}
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._server: asyncio.Server | None = None
        self._address: Address | None = None

    async def start(self, address: Address) -> None:
        """Listen.

        Raises:
            HoldfastError: INVALID_ARGUMENT if the address cannot be used; CONFLICT if somebody listens there.
        """
        try:
            if isinstance(address, SocketAddress):
                self._server = await self._listen_unix(address.path)
                self._address = address
            else:
                self._server = await asyncio.start_server(
                    self._connected, address.host, address.port, limit=_STREAM_BYTES
                )
                port = self._server.sockets[0].getsockname()[1]
                self._address = TcpAddress(address.host, port)
        except OSError as error:
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT, f"the server cannot listen there: {error.strerror or error}"
            ) from error

    async def _listen_unix(self, path: Path) -> asyncio.Server:
        if len(os.fsencode(path)) > _SOCKET_PATH_BYTES_MAX:
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT, f"the socket's path {path} is longer than {_SOCKET_PATH_BYTES_MAX} bytes"
            )
        _remove_dead_socket(path)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listening.bind(str(path))
            os.chmod(path, 0o600)  # before it listens: nobody connects in between
            return await asyncio.start_unix_server(self._connected, sock=listening, limit=_STREAM_BYTES)
        except BaseException:
            listening.close()
            raise

    def uri(self, name: str) -> str:
        """Return the NBD URI of an export."""
        if isinstance(self._address, SocketAddress):
            return f"nbd+unix:///{quote(name)}?socket={quote(str(self._address.path))}"
        assert self._address is not None, "the server listens"
        return f"nbd://{format_address(self._address.host, self._address.port)}/{quote(name)}"

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "asyncio serves each connection in a task"
        if len(self._connections) >= CONNECTIONS_MAX:
            writer.transport.abort()
            return
        self._connections[task] = writer
        try:
            await self._serve(reader, writer)
        except (nbd.NbdWireError, asyncio.IncompleteReadError, OSError, TimeoutError):
            # The client's own fault, or it is gone: it loses its connection, and nobody else notices.
            return
        except asyncio.CancelledError:
            if self._server is not None:  # else it is the server that ends, and asyncio would log this as a fault
                raise
        finally:
            self._connections.pop(task, None)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raw = writer.get_extra_info("socket")
        if raw.family != socket.AF_UNIX:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        async with asyncio.timeout(NEGOTIATION_S):
            chosen = await Negotiation(reader, writer, self._exports).run()
        if chosen is not None:
            await Transmission(reader, writer, chosen).run()

    async def close(self) -> None:
        """Stop listening, let what is under way finish, and close all connections; may be called more than once."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        if isinstance(self._address, SocketAddress):
            self._address.path.unlink(missing_ok=True)
        tasks = dict(self._connections)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CLOSE_S)
        for task, writer in tasks.items():
            writer.transport.abort()
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _remove_dead_socket(path: Path) -> None:
    """Remove a socket that a server left behind which was killed; one that is alive is not touched.

    Raises:
        HoldfastError: CONFLICT if somebody listens there; INVALID_ARGUMENT if it is something else than a socket.
    """
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"{path} is there and no socket; name another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise HoldfastError(ErrorCode.CONFLICT, f"somebody else listens on {path}; name another path")
