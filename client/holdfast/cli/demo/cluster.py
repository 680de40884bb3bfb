"""The demo's cluster: a real `holdfast up` as a child process, one node of which can be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from holdfast.cli.directory import UpDirectory
from holdfast_core.model.errors import ErrorCode, HoldfastError

_READY: Final = "ready coordinator="
_STOP_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class DemoCluster:
    """A running cluster.

    Attributes:
        coordinator: HOST:PORT.
        directory: where it keeps everything.
    """

    coordinator: str
    directory: UpDirectory

    def kill_node(self, number: int) -> None:
        """Kill a storage node with SIGKILL: no drain, no goodbye."""
        os.kill(int(self.directory.pid_file(f"node-{number}").read_text()), signal.SIGKILL)


@contextmanager
def running_cluster(data: Path, *, nodes: int) -> Iterator[DemoCluster]:
    """Run `holdfast up` on `data` while the block runs.

    Raises:
        HoldfastError: NOT_READY if it does not start; it has said why on stderr.
    """
    command = (
        sys.executable,
        "-m",
        "holdfast.cli.main",
        "up",
        "--port",
        "0",
        "--nodes",
        str(nodes),
        "--data",
        str(data),
    )
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        if not line.startswith(_READY):
            raise HoldfastError(ErrorCode.NOT_READY, f"the demo's cluster did not start (exit code {process.wait()})")
        yield DemoCluster(coordinator=line.removeprefix(_READY), directory=UpDirectory(data))
    finally:
        process.terminate()
        try:
            process.wait(timeout=_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
