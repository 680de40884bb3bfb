"""One service as a child process: started, heard until it says where it listens, watched, drained."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from holdfast.cli.directory import UpDirectory
from holdfast.cli.parent import PARENT_VARIABLE
from holdfast_core.model.errors import ErrorCode, HoldfastError

_COMMAND: Final = (sys.executable, "-m", "holdfast.cli.main")
_LISTENING: Final = "listening "
# Their own drain takes 10 s at most.
_DRAIN_S: Final = 20.0
_LAST_WORDS_BYTES: Final = 4096


def _environment() -> dict[str, str]:
    """The caller's environment without settings of Holdfast, which are about another cluster than this one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HOLDFAST_")}
    return {**kept, PARENT_VARIABLE: str(os.getpid())}


class Child:
    """A running service.

    Attributes:
        name: "coordinator" or "node-1" and so on.
        address: HOST:PORT that it serves on.
    """

    def __init__(self, name: str, process: asyncio.subprocess.Process, directory: UpDirectory) -> None:
        self.name = name
        self.address = ""
        self._process = process
        self._log = directory.log(name)
        self._pid_file = directory.pid_file(name)

    @classmethod
    async def start(cls, name: str, arguments: Sequence[str], directory: UpDirectory, *, within_s: float) -> Child:
        """Start `holdfast ARGUMENTS` and wait until it serves; its log goes to the directory.

        It gets a session of its own, so that Ctrl-C reaches `up` alone, which then ends its children in order.

        Raises:
            HoldfastError: NOT_READY with its last words if it ends instead, or says nothing in time.
        """
        log = directory.open_log(name)
        try:
            process = await asyncio.create_subprocess_exec(
                *_COMMAND,
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                env=_environment(),
            )
        finally:
            os.close(log)
        child = cls(name, process, directory)
        directory.pid_file(name).write_text(f"{process.pid}\n")
        try:
            async with asyncio.timeout(within_s):
                child.address = await child._hear_address()
        except TimeoutError as error:
            raise HoldfastError(
                ErrorCode.NOT_READY, f"{name} did not start within {within_s:g} s; see {child._log}"
            ) from error
        finally:
            if not child.address:
                await child.end()
        return child

    async def _hear_address(self) -> str:
        assert self._process.stdout is not None
        line = (await self._process.stdout.readline()).decode().strip()
        if line.startswith(_LISTENING):
            return line.removeprefix(_LISTENING)
        code = await self._process.wait()
        raise HoldfastError(
            ErrorCode.NOT_READY, f"{self.name} did not start (exit code {code}): {self._last_words() or line}"
        )

    def _last_words(self) -> str:
        with self._log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _LAST_WORDS_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        return lines[-1].removeprefix("holdfast: ") if lines else ""

    async def wait(self) -> str:
        """Wait until it ends and return how, e.g. "was killed by SIGKILL"; what it still prints is dropped."""
        assert self._process.stdout is not None
        while await self._process.stdout.read(4096):
            pass
        code = await self._process.wait()
        self._pid_file.unlink(missing_ok=True)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"{how}; its log is {self._log}"

    async def end(self) -> bool:
        """Drain it by SIGTERM and reap it; after 20 s kill it. Returns whether it went by itself."""
        self._pid_file.unlink(missing_ok=True)
        if self._process.returncode is not None:
            return True
        with suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(_DRAIN_S):
                await self._process.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
            return False
        return True
