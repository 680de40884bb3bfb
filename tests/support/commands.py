"""Commands as processes of their own that need not load Python and Holdfast again: forked from one that has.

Of the 0.45 s of processor time of a short command 0.4 s go into loading modules. The tests run hundreds
of them, so one process for each process of tests loads `holdfast.cli.app`, starts nothing, and forks for each command.
Everything else is as in a process that was started afresh: environment, working directory, pipes, exit code, death by a
signal. `tests.e2e.harness.COMMAND` starts one the long way, and services always go that way.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

_REQUEST_BYTES_MAX: Final = 1 << 20
_PIPES: Final = 3
# What most commands load once they know what they are to do.
_LOADED_LATE: Final = (
    "grpc.aio",
    "holdfast.manager",
    "holdfast.restoring",
    "holdfast_core.runtime.server",
    "pydantic.type_adapter",
)


class CommandServer:
    """The loaded process and the socket at which it takes requests. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="holdfast-commands-")
        self._path = str(Path(self._folder.name) / "socket")
        self._process: subprocess.Popen[bytes] | None = None

    def run(
        self, arguments: Sequence[str], *, stdin: bytes | None, environment: Mapping[str, str], timeout_s: float
    ) -> subprocess.CompletedProcess[bytes]:
        """Run one command and return its exit code and output. Raises TimeoutExpired after killing it."""
        self._start()
        with contextlib.ExitStack() as stack:
            connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            connection.settimeout(timeout_s)
            connection.connect(self._path)
            given, stdin_end = os.pipe()
            stdout_end, stdout = os.pipe()
            stderr_end, stderr = os.pipe()
            request = {"arguments": list(arguments), "environment": dict(environment), "folder": os.getcwd()}
            try:
                passed = array.array("i", [given, stdout, stderr])
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)]
                connection.sendmsg([json.dumps(request).encode()], ancillary)
            finally:
                for descriptor in (given, stdout, stderr):
                    os.close(descriptor)
            out, err = _Reader(stdout_end), _Reader(stderr_end)
            _write(stdin_end, stdin or b"")
            try:
                code = int(connection.recv(64))
            except TimeoutError:
                connection.shutdown(socket.SHUT_RDWR)
                raise subprocess.TimeoutExpired(list(arguments), timeout_s) from None
            return subprocess.CompletedProcess(list(arguments), code, out.all(), err.all())

    def _start(self) -> None:
        with self._lock:
            if self._process is not None:
                return
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
                listener.bind(self._path)
                listener.listen(64)
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "tests.support.commands", str(listener.fileno())],
                    cwd=Path(__file__).parents[2],
                    stdin=subprocess.PIPE,
                    pass_fds=[listener.fileno()],
                    env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
                )
            atexit.register(self._stop)

    def _stop(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=20)
        self._folder.cleanup()


class _Reader:
    """All that comes out of a pipe, read by a thread so that no pipe fills up."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._content = b""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with open(self._descriptor, "rb") as pipe:
            self._content = pipe.read()

    def all(self) -> bytes:
        """What was written until the last writer closed."""
        self._thread.join()
        return self._content


def _write(descriptor: int, content: bytes) -> None:
    with open(descriptor, "wb") as pipe, contextlib.suppress(BrokenPipeError):
        pipe.write(content)
        pipe.flush()


def _serve(listener: socket.socket) -> Sequence[str]:
    """Fork for each request until standard input ends; return, in the forked process only, the command to run."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        readable, _, _ = select.select([listener.fileno(), 0], [], [])
        if 0 in readable:
            sys.exit(0)
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        message, descriptors, _, _ = socket.recv_fds(connection, _REQUEST_BYTES_MAX, _PIPES)
        child = os.fork()
        if child == 0:
            connection.close()
            return _become(json.loads(message), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        os._exit(_watch(child, connection))


def _watch(child: int, connection: socket.socket) -> int:
    """Tell the caller how the command ended; kill the command if the caller goes."""
    ended = os.pidfd_open(child)
    readable, _, _ = select.select([ended, connection.fileno()], [], [])
    if ended not in readable:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(BrokenPipeError):
        connection.send(str(os.waitstatus_to_exitcode(status)).encode())
    return 0


def _become(request: Mapping[str, object], descriptors: Sequence[int]) -> Sequence[str]:
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    environment, arguments = request["environment"], request["arguments"]
    assert isinstance(environment, dict)
    assert isinstance(arguments, list)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(str(request["folder"]))
    return arguments


def _main() -> None:
    from holdfast.cli import app, main

    for module in _LOADED_LATE:
        importlib.import_module(module)
    app.command()
    gc.freeze()  # Collections in the children must not touch, and so copy, every page that they share.
    assert threading.active_count() == 1, "a process with threads must not fork"
    listener = socket.socket(fileno=int(sys.argv[1]))
    sys.argv = ["holdfast", *_serve(listener)]
    main.main()


COMMANDS: Final = CommandServer()

if __name__ == "__main__":
    _main()
