"""Processes that seal spans for the SDK, seen from the SDK: started, fed, and ended.

The interpreter lock lets threads hash and compress side by side, but not the work between: with small blocks it costs
a sixth of a backup. Here each span is read and sealed in another process; what comes back is its part of the index, by
a socket, and its sealed blocks, by shared memory.

Nothing is forked: the program around the SDK has threads, and so has gRPC. A process gets its standard streams and
what is sent to it: keys, the descriptors of volumes, its arena. It holds nothing that another one would miss, so it is
ended by killing it; one whose SDK dies sees its socket end.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import PurePath
from typing import Final

from holdfast.descriptors import RawReader
from holdfast.sealing_messages import (
    MESSAGE_BYTES_MAX,
    READY,
    SLOT_BYTES,
    SLOTS,
    SpanRequest,
    VolumeRequest,
    pack_forget,
    unpack_answer,
)
from holdfast.spans import SealedSpan
from holdfast_core.model.block import Codec
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.lent import SealingKeys

_MODULE: Final = "holdfast.sealing_worker"
_INTERPRETERS: Final = ("python", "pypy")
_EXIT_WAIT_S: Final = 5.0
_LAST_WORDS_BYTES: Final = 4096


class _Process:
    """One process with its socket and its arena. What changes is guarded by the pool's lock."""

    child: subprocess.Popen[bytes] | None = None

    def __init__(self) -> None:
        """Prepare one; what is sent before it starts waits for it.

        Raises:
            OSError: the system does not let us.
        """
        self.free: list[int] = []  # slots of the arena, none until it is ready
        self.given: deque[tuple[Future[SealedSpan], int]] = deque()  # answers come in this order
        self.channel, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.last_words = -1
        arena = -1
        try:
            self.last_words = os.memfd_create("holdfast-sealing-stderr")
            arena = os.memfd_create("holdfast-sealing-arena")
            os.ftruncate(arena, SLOTS * SLOT_BYTES)
            self.arena = memoryview(mmap.mmap(arena, SLOTS * SLOT_BYTES))
            self.send(b"\0", [arena])
        except OSError:
            self.release()
            raise
        finally:
            if arena >= 0:
                os.close(arena)

    def start(self) -> None:
        """Start it.

        Raises:
            OSError: the system does not let us.
        """
        self.child = _spawn(self._theirs, self.last_words)
        self._theirs.close()

    def slot(self, number: int) -> memoryview:
        """Return a slot of the arena."""
        return self.arena[number * SLOT_BYTES : (number + 1) * SLOT_BYTES]

    def send(self, packet: bytes, descriptors: Iterable[int] = ()) -> None:
        """Send a packet. Never waits: what is under way is bounded, and a socket holds more."""
        try:
            socket.send_fds(self.channel, [packet], list(descriptors))
        except (BrokenPipeError, ConnectionResetError):
            # It has died. Whoever reads its answers sees that too, and ends what was given to it.
            return

    def receive(self) -> bytes:
        """Wait for an answer; b"" when the process has ended."""
        try:
            return self.channel.recv(MESSAGE_BYTES_MAX)
        except ConnectionResetError:
            return b""

    def kill(self) -> None:
        """End it, if it has started, so that its answers end; `release` waits until it is gone."""
        self._theirs.close()
        if self.child is not None:
            self.child.kill()

    def release(self) -> None:
        """Wait until it is gone, and close what is ours; after `kill`, and once nobody reads its answers."""
        if self.child is not None:
            self.child.wait()
        self._theirs.close()
        self.channel.close()
        if self.last_words >= 0:
            os.close(self.last_words)

    def ending(self) -> str:
        """Say how it ended; waits for it, as its socket has closed already."""
        assert self.child is not None, "its socket stays open until it starts"
        try:
            code = self.child.wait(_EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
            return "it closed its socket and went on"
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        size = os.fstat(self.last_words).st_size
        said = os.pread(self.last_words, _LAST_WORDS_BYTES, max(0, size - _LAST_WORDS_BYTES))
        lines = said.decode(errors="replace").strip().splitlines()
        return f"exit code {code}" + (f": {lines[-1]}" if lines else "")


def _spawn(stdin: socket.socket, stderr: int) -> subprocess.Popen[bytes]:
    # The mask is inherited: an interrupt of the terminal must not reach it while it loads and has no handler yet.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", _MODULE],
            stdin=stdin.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=_environment(),
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _environment() -> dict[str, str]:
    """The environment without our settings, some of which are secrets, and with the modules that are found here."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HOLDFAST_")}
    kept["PYTHONPATH"] = os.pathsep.join([path for path in sys.path if path])
    return kept


def _check_interpreter() -> None:
    """Check that there is a Python to start; a program that embeds or freezes one would start itself.

    Raises:
        HoldfastError: INVALID_ARGUMENT.
    """
    name = PurePath(sys.executable or "").name
    if getattr(sys, "frozen", False) or not name.startswith(_INTERPRETERS):
        raise _cannot_start("this program brings its own Python interpreter")


def _cannot_start(reason: str) -> HoldfastError:
    return HoldfastError(
        ErrorCode.INVALID_ARGUMENT,
        f'processes that seal cannot be started here: {reason}; take sealing="auto" or "threads"',
    )


class SealingPool:
    """Processes that seal spans, for any number of sessions. Safe to share between threads.

    Attributes:
        started: done when every process takes spans, or failed with what kept one from it.
        session_count: sessions that use it now; its owner counts.
    """

    def __init__(self, processes: int) -> None:
        """Start the processes; they load while the caller goes on.

        Raises:
            HoldfastError: INVALID_ARGUMENT if they cannot be started.
        """
        _check_interpreter()
        self.started: Future[None] = Future()
        self.session_count = 0
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Future[SealedSpan], SpanRequest]] = deque()
        self._failure: HoldfastError | None = None
        self._starting = True
        self._volume_count = 0
        self._processes: list[_Process] = []
        self._threads: list[threading.Thread] = []
        try:
            for _ in range(processes):
                self._processes.append(_Process())
            # First: while processes load, every processor is busy, and a thread waits long for its first turn.
            for process in self._processes:
                thread = threading.Thread(target=self._collect, args=(process,), name="holdfast-sealing", daemon=True)
                thread.start()
                self._threads.append(thread)
            for process in self._processes:
                process.start()
        except OSError as error:
            self.close()
            raise _cannot_start(str(error)) from error

    @property
    def pids(self) -> tuple[int, ...]:
        """Numbers of the processes."""
        return tuple(process.child.pid for process in self._processes if process.child is not None)

    @property
    def failure(self) -> HoldfastError | None:
        """What every further span fails with, once a process has ended that was not told to."""
        return self._failure

    def open_volume(self, source: RawReader, *, session: int, codec: Codec, keys: SealingKeys) -> int:
        """Tell every process of a volume; returns the number to name it by. The descriptor is duplicated."""
        with self._lock:
            self._volume_count += 1
            number = self._volume_count
            request = VolumeRequest(number, session, codec, keys, source.name, source.size_bytes, source.live)
            packet = request.packed()
            for process in self._processes:
                process.send(packet, [source.descriptor])
        return number

    def submit(self, request: SpanRequest) -> Future[SealedSpan]:
        """Have a span sealed. Until a process takes it, it can be cancelled.

        The future fails with HoldfastError: what the source raises; INTERNAL if a process ends in the middle.
        """
        future: Future[SealedSpan] = Future()
        with self._lock:
            failure = self._failure
            if failure is None:
                self._waiting.append((future, request))
                self._hand_out()
        if failure is not None:
            future.set_exception(failure)
        return future

    def forget(self, session: int) -> None:
        """Let the processes close a session's volumes and forget its keys and fingerprints. Its spans are done."""
        with self._lock:
            for process in self._processes:
                process.send(pack_forget(session))

    def close(self) -> None:
        """End every process and wait until it is gone; spans that are not done fail with CANCELLED. Only once."""
        self._fail(HoldfastError(ErrorCode.CANCELLED, "the processes that seal were ended"))
        # All of them before any is waited for: the system takes apart what one held while it does so for the next.
        for process in self._processes:
            process.kill()
        for thread in self._threads:
            thread.join()
        for process in self._processes:
            process.release()

    def _hand_out(self) -> None:
        """Give waiting spans to processes that have room. The lock is held."""
        while self._waiting:
            process = max(self._processes, key=lambda each: len(each.free))
            if not process.free:
                return
            future, request = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                slot = process.free.pop()
                process.given.append((future, slot))
                process.send(request.packed(slot))

    def _collect(self, process: _Process) -> None:
        """Take one process's answers until it ends; runs in a thread of its own."""
        try:
            while packet := process.receive():
                if packet == READY:
                    self._ready(process)
                else:
                    self._take(process, packet)
        finally:
            self._lost(process)

    def _ready(self, process: _Process) -> None:
        with self._lock:
            if self._failure is None:
                process.free.extend(range(SLOTS))
                self._hand_out()
            all_ready = self._starting and all(each.free or each.given for each in self._processes)
            self._starting = self._starting and not all_ready
        if all_ready:
            self.started.set_result(None)

    def _take(self, process: _Process, packet: bytes) -> None:
        future, slot = process.given[0]
        span: SealedSpan | HoldfastError
        try:
            span = unpack_answer(packet, process.slot(slot))
        except HoldfastError as error:
            span = error
        with self._lock:
            process.given.popleft()
            process.free.append(slot)
            self._hand_out()
        if isinstance(span, HoldfastError):
            future.set_exception(span)
        else:
            future.set_result(span)

    def _lost(self, process: _Process) -> None:
        """Fail everything: a span of this session is gone, and no other session should meet half a pool."""
        if self._failure is None:
            how = process.ending()
            self._fail(HoldfastError(ErrorCode.INTERNAL, f"a process that seals blocks ended by itself ({how})"))
        for future, _ in process.given:
            assert self._failure is not None, "it was set above, or by whoever closes"
            future.set_exception(self._failure)

    def _fail(self, failure: HoldfastError) -> None:
        """Take no more spans, and fail those that no process has yet."""
        with self._lock:
            if self._failure is None:
                self._failure = failure
            waiting, self._waiting = self._waiting, deque()
            for process in self._processes:
                process.free.clear()
            starting, self._starting = self._starting, False
        for future, _ in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(self._failure)
        if starting:
            self.started.set_exception(self._failure)
