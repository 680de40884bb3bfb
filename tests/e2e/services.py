"""Single services as processes: several coordinators over etcd and their storage nodes, each killable."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

from tests.e2e.harness import COMMAND, environment, eventually


class Service:
    """One `holdfast coordinator` or `holdfast storagenode`; it keeps its port over restarts."""

    def __init__(self, name: str, arguments: Sequence[str], log: Path) -> None:
        self._name = name
        self._arguments = tuple(arguments)
        self._log = log
        self._bind = "127.0.0.1:0"
        self._process: subprocess.Popen[str] | None = None
        self.address = ""

    def start(self) -> Service:
        """Start it and wait for its line `listening HOST:PORT`."""
        with self._log.open("a") as log:
            process = subprocess.Popen(
                [*COMMAND, *self._arguments, "--bind", self._bind],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(),
            )
        assert process.stdout is not None
        self._process = process
        lines: list[str] = []
        threading.Thread(target=lambda: lines.extend(process.stdout or ()), daemon=True).start()

        def listens() -> bool:
            assert process.poll() is None, f"{self._name} ended: {self._log.read_text()[-2000:]}"
            return bool(lines)

        eventually(listens, f"{self._name} listens")
        self.address = self._bind = lines[0].removeprefix("listening ").strip()
        return self

    def kill(self) -> None:
        """Kill it at once."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(timeout=20)

    def stop(self) -> int:
        """End it by SIGTERM and return its exit code."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.terminate()
        return self._process.wait(timeout=30)
