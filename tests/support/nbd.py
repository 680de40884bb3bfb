"""Real NBD servers for tests: QEMU's and nbdkit, given a socket that listens already, so that nobody has to wait."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from holdfast.sources.nbd_client import NbdEndpoint
from tests.support.qemu import program, tool

# The socket arrives as standard input and is passed on as systemd passes one: as descriptor 3, for this process.
_WITH_SOCKET: Final = 'exec 3<&0 0</dev/null; exec env LISTEN_PID=$$ LISTEN_FDS=1 "$@"'
_TALKS_MAX: Final = 8
_numbers = itertools.count(1)


@contextmanager
def nbd_server(folder: Path, *command: str | Path, tcp: bool = False) -> Iterator[NbdEndpoint]:
    """Run a server in the foreground on descriptor 3; yields where it listens."""
    with listening(folder, tcp=tcp) as (endpoint, ear):
        process = subprocess.Popen(
            ["/bin/sh", "-c", _WITH_SOCKET, "sh", program(str(command[0])), *map(str, command[1:])],
            stdin=ear.fileno(),
        )
        ear.close()
        try:
            yield endpoint
        finally:
            process.terminate()
            process.wait(30)


@contextmanager
def listening(folder: Path, *, tcp: bool = False) -> Iterator[tuple[NbdEndpoint, socket.socket]]:
    """Yield a socket that listens, and its address."""
    with socket.socket(socket.AF_INET if tcp else socket.AF_UNIX) as ear:
        if tcp:
            ear.bind(("127.0.0.1", 0))
            endpoint = NbdEndpoint("127.0.0.1", ear.getsockname()[1])
        else:
            path = folder / f"nbd-{next(_numbers)}"
            ear.bind(str(path))
            endpoint = NbdEndpoint(socket_path=str(path))
        ear.listen(16)
        yield endpoint, ear


@contextmanager
def scripted_server(folder: Path, talk: Callable[[socket.socket], None]) -> Iterator[NbdEndpoint]:
    """Serve each connection by `talk`, which ends it by returning; a client that hangs up is no error."""
    with listening(folder) as (endpoint, ear), ThreadPoolExecutor(_TALKS_MAX) as threads:

        def serve(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                connection.settimeout(30)
                talk(connection)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threads.submit(serve, ear.accept()[0])

        threads.submit(accept)
        try:
            yield endpoint
        finally:
            ear.shutdown(socket.SHUT_RDWR)


def qemu_nbd(image: Path, *options: str, format: str = "raw") -> Sequence[str | Path]:
    """The command of a `qemu-nbd` for any number of clients."""
    return ("qemu-nbd", "--persistent", "--shared=16", f"--format={format}", *options, image)


def qemu_io(image: Path, *commands: str, format: str = "qcow2") -> None:
    """Write to an image as a VM does, which ends cleanly afterwards."""
    tool("qemu-io", "-f", format, *itertools.chain.from_iterable(("-c", command) for command in commands), image)


def make_qcow2(path: Path, size: int, *commands: str, options: Sequence[str] = ()) -> Path:
    """Make an image and write to it."""
    tool("qemu-img", "create", "-q", "-f", "qcow2", *options, path, str(size))
    if commands:
        qemu_io(path, *commands)
    return path


def plain_bytes(image: Path, folder: Path) -> bytes:
    """The bytes of the disk that an image describes."""
    raw = folder / f"plain-{next(_numbers)}"
    tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw)
    try:
        return raw.read_bytes()
    finally:
        raw.unlink()


def bitmap_names(image: Path) -> set[str]:
    """The names of the bitmaps in an image."""
    described = json.loads(tool("qemu-img", "info", "--output=json", image))
    return {bitmap["name"] for bitmap in described["format-specific"]["data"].get("bitmaps", ())}
