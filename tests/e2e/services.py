"""Single services as processes: several coordinators over etcd and their storage nodes, each killable.

And the tokens that they share, as an operator would make them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast_core.runtime.credentials import new_token, write_token
from tests.e2e.harness import COMMAND, environment, eventually


@dataclass(frozen=True, slots=True)
class Tokens:
    """Files of the tokens that all coordinators of a cluster take."""

    admin: Path
    node: Path

    @classmethod
    def make(cls, folder: Path) -> Tokens:
        """Draw both and write them to a folder."""
        made = cls(folder / "admin.token", folder / "node.token")
        for path in (made.admin, made.node):
            write_token(path, new_token(os.urandom))
        return made

    @property
    def coordinator_options(self) -> tuple[str, ...]:
        """What a coordinator is told."""
        return ("--admin-token-file", str(self.admin), "--node-token-file", str(self.node))

    @property
    def node_options(self) -> tuple[str, ...]:
        """What a node is told."""
        return ("--token-file", str(self.node))

    @property
    def client_options(self) -> tuple[str, ...]:
        """What a command is told."""
        return ("--token-file", str(self.admin))


class Service:
    """One `holdfast coordinator` or `holdfast storagenode`; it keeps its port over restarts.

    `within` is a command that runs it somewhere else, as `ip netns exec NAME`; `variables` are set in its environment,
    and may be changed between two starts.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        log: Path,
        *,
        bind: str = "127.0.0.1:0",
        within: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log = log
        self.variables = dict(variables or {})
        self._arguments = tuple(arguments)
        self._bind = bind
        self._within = tuple(within)
        self._process: subprocess.Popen[str] | None = None
        self.address = ""

    def start(self) -> Service:
        """Start it and wait for its line `listening HOST:PORT`."""
        with self.log.open("a") as log:
            process = subprocess.Popen(
                [*self._within, *COMMAND, *self._arguments, "--bind", self._bind],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment() | self.variables,
            )
        assert process.stdout is not None
        self._process = process
        lines: list[str] = []
        threading.Thread(target=lambda: lines.extend(process.stdout or ()), daemon=True).start()

        def listens() -> bool:
            assert process.poll() is None, f"{self.name} ended: {self.log.read_text()[-2000:]}"
            return bool(lines)

        eventually(listens, f"{self.name} listens")
        self.address = self._bind = lines[0].removeprefix("listening ").strip()
        return self

    @property
    def runs(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """Kill it at once."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(timeout=20)

    def pause(self) -> None:
        """Stop it in its tracks: its connections stay open, and it does nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after `pause`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> int:
        """End it by SIGTERM and return its exit code."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.terminate()
        return self._process.wait(timeout=30)
