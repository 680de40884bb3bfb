"""Holdfast as a user runs it: `holdfast up`, segment stores on the same disk, and the SDK in a process of its own."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from benchmarks.contenders.base import Contender, Saved
from benchmarks.measure import CommandFailed, Measured, process_tree, run_measured, stored_bytes, tree_cpu_s

_READY: Final = "ready coordinator="
_READY_TIMEOUT_S: Final = 60.0
_STOP_TIMEOUT_S: Final = 60.0


class Holdfast(Contender):
    """A cluster of `nodes` storage nodes that keeps every block on each of them.

    Args:
        nodes: storage nodes, and copies of a block.
        codec: name of the volume's codec; `default` is what users get.
    """

    def __init__(self, *, nodes: int, codec: str = "default") -> None:
        suffix = "" if codec == "default" else f" {codec}"
        self.name = f"holdfast {nodes} node{'s' if nodes > 1 else ''}{suffix}"
        self.copies = nodes
        self._codec = codec

    def open(self, folder: Path, disk: Path) -> None:
        """Start the cluster and register the disk as a VM."""
        self.start(folder)
        try:
            self._client(["register", str(disk), self._codec])
        except CommandFailed:
            self.close()
            raise

    def start(self, folder: Path) -> str:
        """Start the cluster below `folder`; returns its coordinator's HOST:PORT."""
        self._folder = folder
        self._cluster = folder / "cluster"
        self._points: list[str] = []
        command = [str(Path(sys.executable).with_name("holdfast")), "up", "--data", str(self._cluster), "--port", "0"]
        command += ["--nodes", str(self.copies), "--replicas", str(self.copies)]
        with open(folder / "cluster.log", "wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log)
        self._coordinator = self._await_ready()
        return self._coordinator

    def save(self) -> Saved:
        """Make a snapshot, then backups of its line."""
        took, server_cpu_s, said = self._client(["save", *self._points[:1]])
        self._points.append(said["result"])
        facts = {name: float(count) for name, count in said["stats"].items()}
        facts |= {"call_quorum_s": said["quorum_s"], "call_committed_s": said["committed_s"]}
        return Saved(
            done_s=said["done_at"] - took.started_s,
            client=took,
            server_cpu_s=server_cpu_s,
            replicated_s=said["replicated_at"] - took.started_s,
            facts=facts,
        )

    def restore(self, folder: Path) -> tuple[Saved, Path]:
        """Restore the newest point."""
        newest = self._points[-1] if len(self._points) > 1 else ""
        took, server_cpu_s, said = self._client(["restore", self._points[0], newest, str(folder)])
        # The client's process may go on for a moment to close; the peers' times include theirs, so this one does too.
        saved = Saved(done_s=took.wall_s, client=took, server_cpu_s=server_cpu_s, replicated_s=0.0)
        return saved, Path(said["result"])

    def stored_bytes(self) -> int:
        """Bytes of the cluster's folder: segments, indexes, metadata, all copies."""
        return stored_bytes(self._cluster)

    def close(self) -> None:
        """Stop the cluster as an operator would."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._kill()
            raise
        finally:
            if self._process.stdout is not None:
                self._process.stdout.close()

    def _client(self, arguments: list[str]) -> tuple[Measured, float, dict[str, Any]]:
        before = tree_cpu_s(self._process.pid)
        command = [sys.executable, "-m", "benchmarks.client", self._coordinator, *arguments]
        took = run_measured(command, scratch=self._folder)
        lines = took.output.splitlines()
        return took, tree_cpu_s(self._process.pid) - before, json.loads(lines[-1]) if lines else {}

    def _kill(self) -> None:
        for pid in process_tree(self._process.pid):
            os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def _await_ready(self) -> str:
        out = self._process.stdout
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while out is not None and select.select([out], [], [], max(0.0, deadline - time.monotonic()))[0]:
            line = out.readline().decode()
            if line.startswith(_READY):
                return line.removeprefix(_READY).strip()
            if not line:
                break
        self._kill()
        said = (self._folder / "cluster.log").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"`holdfast up` did not become ready: {said}")


def holdfast_there() -> bool:
    """Whether the `holdfast` command is installed beside this interpreter."""
    return shutil.which(str(Path(sys.executable).with_name("holdfast"))) is not None
