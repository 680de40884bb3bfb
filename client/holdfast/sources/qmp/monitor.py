"""QEMU's monitor for threads: one connection, one command at a time, each with a deadline.

`qemu.qmp` is asynchronous and belongs to the extra `vm`; it is imported when the first monitor is opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from holdfast.background import LoopThread
from holdfast_core.model.errors import ErrorCode, HoldfastError

if TYPE_CHECKING:
    from qemu.qmp import QMPClient

GREETS_WITHIN_S: Final = 10.0
ANSWERS_WITHIN_S: Final = 60.0
_STEPS_S: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02)


class MonitorLost(HoldfastError):
    """QEMU does not answer any more: it has ended, or hangs. The code is SOURCE_UNREADABLE."""

    def __init__(self, message: str) -> None:
        super().__init__(ErrorCode.SOURCE_UNREADABLE, message)


@contextlib.contextmanager
def understanding(what: str) -> Iterator[None]:
    """Read an answer in the block: one of another form than QEMU's is a plain error, and no fault of ours.

    Raises:
        HoldfastError: SOURCE_UNREADABLE.
    """
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise HoldfastError(
            ErrorCode.SOURCE_UNREADABLE, f"QEMU tells of its {what} in a form that is not understood: {error!r:.200}"
        ) from error


class Monitor:
    """A connection to a QMP socket. QEMU serves one client at a time on each, so it is held only while needed.

    Attributes:
        path: the socket.
    """

    def __init__(self, path: Path) -> None:
        """Connect and agree on capabilities.

        Raises:
            HoldfastError: SOURCE_UNREADABLE if nobody listens, another client holds the socket, or the library is not
                installed.
        """
        try:
            from qemu.qmp import QMPClient
        except ModuleNotFoundError as error:
            raise HoldfastError(
                ErrorCode.SOURCE_UNREADABLE,
                "volumes of a running QEMU need the library qemu.qmp; install it with: pip install 'holdfast[vm]'",
            ) from error
        self.path = path
        self._loop = LoopThread()
        self._client: QMPClient = QMPClient("holdfast")
        self._client.logger.disabled = True  # What goes wrong is raised as well, and told once.
        self._client.events.event_filter = lambda _event: False  # Nobody reads them, and they would pile up.
        self._lost = False
        try:
            self._loop.run(self._connect())
        except BaseException:
            self._lost = True
            self.close()
            raise

    async def _connect(self) -> None:
        from qemu.qmp import QMPError

        try:
            await asyncio.wait_for(self._client.connect(str(self.path)), GREETS_WITHIN_S)
        except TimeoutError as error:
            raise MonitorLost(
                f"the QEMU behind {self.path} does not greet within {GREETS_WITHIN_S:g} s: another client holds this "
                "socket, or QEMU hangs; give Holdfast a QMP socket of its own"
            ) from error
        except (QMPError, OSError, EOFError, ValueError) as error:
            raise MonitorLost(f"no QEMU answers on the QMP socket {self.path}: {error}") from error

    def execute(self, command: str, arguments: Mapping[str, Any] = MappingProxyType({})) -> Any:
        """Run a command and return its answer.

        Raises:
            HoldfastError: SOURCE_UNREADABLE if QEMU refuses it; `MonitorLost` if it does not answer.
        """
        if self._lost:
            raise MonitorLost(f"the QEMU behind {self.path} has gone")
        try:
            return self._loop.run(self._execute(command, arguments))
        except MonitorLost:
            self._lost = True
            raise

    async def _execute(self, command: str, arguments: Mapping[str, Any]) -> Any:
        from qemu.qmp import ExecuteError, QMPError

        try:
            return await asyncio.wait_for(self._client.execute(command, dict(arguments)), ANSWERS_WITHIN_S)
        except ExecuteError as error:
            raise HoldfastError(ErrorCode.SOURCE_UNREADABLE, f"QEMU refused {command}: {error}") from error
        except TimeoutError as error:
            raise MonitorLost(f"QEMU did not answer {command} within {ANSWERS_WITHIN_S:g} s") from error
        except (QMPError, OSError, EOFError, ValueError) as error:
            raise MonitorLost(f"the QEMU behind {self.path} has gone") from error

    def transaction(self, actions: list[dict[str, Any]]) -> None:
        """Run actions so that all or none of them happen; nothing for none.

        Raises:
            HoldfastError: as `execute`.
        """
        if actions:
            self.execute("transaction", {"actions": actions})

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Ask until a condition holds; `what` names it.

        Raises:
            HoldfastError: SOURCE_UNREADABLE if it does not hold in time, and what the condition raises.
        """
        deadline_s = time.monotonic() + ANSWERS_WITHIN_S
        steps = iter(_STEPS_S)
        while not condition():
            if time.monotonic() > deadline_s:
                raise HoldfastError(
                    ErrorCode.SOURCE_UNREADABLE, f"QEMU behind {self.path} did not get done with {what} in time"
                )
            time.sleep(next(steps, _STEPS_S[-1]))

    def close(self) -> None:
        """Close the connection; may be called more than once."""
        self._loop.close(self._disconnect())

    async def _disconnect(self) -> None:
        from qemu.qmp import QMPError

        try:
            await asyncio.wait_for(self._client.disconnect(), GREETS_WITHIN_S)
        except (QMPError, OSError, EOFError, ValueError, TimeoutError):
            # Why it broke was told when it broke, and there is nothing left to close.
            self._lost = True
