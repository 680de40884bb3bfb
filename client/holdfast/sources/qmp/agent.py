"""QEMU's guest agent, as far as freezing file systems goes (QEMU's documentation, `interop/qemu-ga-ref`)."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from holdfast_core.model.errors import ErrorCode, HoldfastError

ANSWERS_WITHIN_S: Final = 5.0
THAWS_WITHIN_S: Final = 30.0
_ANSWER_BYTES_MAX: Final = 1 << 20


class GuestAgent:
    """A connection to an agent's channel. An agent that is not there just does not answer."""

    def __init__(self, path: Path) -> None:
        """Connect and wait for the agent.

        Raises:
            OSError: nobody listens, or nobody answers in time.
        """
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX)
        self._pending = b""
        try:
            self._socket.settimeout(ANSWERS_WITHIN_S)
            self._socket.connect(str(path))
            self._catch_up(ANSWERS_WITHIN_S)
        except BaseException:
            self.close()
            raise

    def freeze(self) -> int:
        """Freeze the guest's file systems; returns how many.

        Raises:
            OSError: the agent refuses, or does not answer in time.
        """
        count = self._execute("guest-fsfreeze-freeze", ANSWERS_WITHIN_S)
        if not isinstance(count, int):
            raise OSError(f"the guest agent behind {self._path} answers nonsense")
        return count

    def thaw(self) -> None:
        """Thaw them; without a freeze it does nothing.

        Raises:
            OSError: the agent refuses, or does not answer in time.
        """
        self._catch_up(THAWS_WITHIN_S)
        self._execute("guest-fsfreeze-thaw", THAWS_WITHIN_S)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _catch_up(self, within_s: float) -> None:
        """Read past what answers an earlier client, or a command that was given up; a number tells where that ends."""
        number = secrets.randbits(31)
        self._send({"execute": "guest-sync", "arguments": {"id": number}})
        deadline_s = time.monotonic() + within_s
        answer: dict[str, Any] = {}
        while answer.get("return") != number:
            answer = self._answer(deadline_s)

    def _execute(self, command: str, within_s: float) -> Any:
        self._send({"execute": command})
        answer = self._answer(time.monotonic() + within_s)
        if "return" not in answer:
            error = answer.get("error")
            reason = error.get("desc") if isinstance(error, dict) else ""
            raise OSError(f"the guest agent refused {command}: {str(reason)[:200] or 'no reason given'}")
        return answer["return"]

    def _send(self, message: dict[str, Any]) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _answer(self, deadline_s: float) -> dict[str, Any]:
        while True:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(f"the guest agent behind {self._path} does not answer in time")
            if b"\n" in self._pending:
                break
            self._socket.settimeout(left_s)
            piece = self._socket.recv(65536)
            if not piece or len(self._pending) > _ANSWER_BYTES_MAX:
                raise OSError(f"the guest agent behind {self._path} has gone")
            self._pending += piece
        line, _, self._pending = self._pending.partition(b"\n")
        try:
            answer = json.loads(line.lstrip(b"\xff"))
        except (ValueError, RecursionError) as error:
            raise OSError(f"the guest agent behind {self._path} answers nonsense") from error
        return answer if isinstance(answer, dict) else {}


@contextlib.contextmanager
def frozen(path: Path) -> Iterator[bool]:
    """Freeze a guest's file systems for as long as the block takes; gives whether they are.

    An agent that does not answer or refuses leaves the point as good as after a crash, which its record says: a guest
    that is still booting is no reason to have no backup.

    Raises:
        HoldfastError: SOURCE_UNREADABLE if the guest may have been left frozen.
    """
    try:
        agent = GuestAgent(path)
    except OSError:
        yield False
        return
    try:
        try:
            stopped = agent.freeze() > 0
        except OSError:
            stopped = False
        yield stopped
    finally:
        # Also where freezing failed: its answer may merely have come too late.
        _thaw(agent, path)


def _thaw(agent: GuestAgent, path: Path) -> None:
    try:
        with contextlib.closing(agent):
            agent.thaw()
    except OSError as error:
        raise HoldfastError(
            ErrorCode.SOURCE_UNREADABLE,
            f"the guest agent behind {path} did not confirm that it thawed the guest's file systems ({error}); "
            "if the guest hangs, send it guest-fsfreeze-thaw",
        ) from error
