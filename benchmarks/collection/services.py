"""A coordinator and three storage nodes as processes of their own, on loopback, with directories below one folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from holdfast_core.runtime.credentials import new_token, write_token

NODES: Final = 3
_COMMAND: Final = (sys.executable, "-m", "holdfast.cli.main")


@dataclass
class Processes:
    """The processes of one cluster, by name.

    Attributes:
        folder: where they keep everything.
        nodes: how many nodes the first layout waits for.
        coordinator_options: what the coordinator is told besides.
        node_options: what every node is told besides.
        running: the processes that run.
        address: HOST:PORT of the coordinator.
    """

    folder: Path
    nodes: int = NODES
    coordinator_options: Sequence[str] = ()
    node_options: Sequence[str] = ()
    running: dict[str, subprocess.Popen[str]] = field(default_factory=dict)
    address: str = ""

    @property
    def token_file(self) -> Path:
        """The administrator's token."""
        return self.folder / "admin.token"

    def node_folder(self, node_id: str) -> Path:
        """Where a node keeps its blocks."""
        return self.folder / node_id

    @property
    def node_ids(self) -> tuple[str, ...]:
        """Names of the nodes."""
        return tuple(f"node-{number}" for number in range(1, self.nodes + 1))

    def start_coordinator(self) -> None:
        """Make the tokens and start the coordinator, which begins no collection by itself.

        Started again, it serves on the same address, and has the same tokens.
        """
        for name in ("admin", "node"):
            if not self.address:
                write_token(self.folder / f"{name}.token", new_token(os.urandom))
        data = self.folder / "coordinator"
        self.address = self._start(
            "coordinator",
            *(
                "coordinator",
                "--data",
                str(data),
                "--nodes",
                str(self.nodes),
                "--create-master-key",
                "--bind",
                self.address or "127.0.0.1:0",
            ),
            *("--admin-token-file", str(self.token_file), "--node-token-file", str(self.folder / "node.token")),
            *("--collect-every", "0", "--log-level", "warning", *self.coordinator_options),
        )

    def start_nodes(self) -> None:
        """Start all nodes."""
        for node_id in self.node_ids:
            self.start_node(node_id)

    def start_node(self, node_id: str, *options: str) -> None:
        """Start a node with options of its own."""
        self._start(
            node_id,
            *("storagenode", "--data", str(self.node_folder(node_id)), "--coordinator", self.address),
            *("--node-id", node_id, "--zone", node_id, "--bind", "127.0.0.1:0"),
            *("--token-file", str(self.folder / "node.token"), "--log-level", "warning", *self.node_options, *options),
        )

    def lose(self, node_id: str) -> None:
        """Kill a node, and remove its directory."""
        process = self.running.pop(node_id)
        process.kill()
        process.wait(timeout=20)
        shutil.rmtree(self.node_folder(node_id))

    def stop(self, *names: str) -> None:
        """Stop the processes named, or all."""
        for name in names or tuple(self.running):
            process = self.running.pop(name)
            process.terminate()
            process.wait(timeout=120)

    def forget_peaks(self) -> None:
        """Let the peaks of memory count from now on."""
        for process in self.running.values():
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")

    def peak_rss_bytes(self, name: str) -> int:
        """Return the most memory that a process has held since its peak was forgotten."""
        return self._status_kib(name, "VmHWM") * 1024

    def rss_bytes(self, name: str) -> int:
        """Return the memory that a process holds now."""
        return self._status_kib(name, "VmRSS") * 1024

    def cpu_s(self, name: str) -> float:
        """Return the processor time that a process has used."""
        fields = Path(f"/proc/{self.running[name].pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _status_kib(self, name: str, field_name: str) -> int:
        for line in Path(f"/proc/{self.running[name].pid}/status").read_text().splitlines():
            if line.startswith(f"{field_name}:"):
                return int(line.split()[1])
        raise RuntimeError(f"the system does not tell {field_name}")

    def log(self, name: str) -> str:
        """Return what a process has logged."""
        return (self.folder / f"{name}.log").read_text()

    def _start(self, name: str, *arguments: str) -> str:
        log = (self.folder / f"{name}.log").open("a")
        process = subprocess.Popen([*_COMMAND, *arguments], stdout=subprocess.PIPE, stderr=log, text=True)
        log.close()
        self.running[name] = process
        if process.stdout is None or not (line := process.stdout.readline()):
            raise RuntimeError(f"{name} ended; see {self.folder / name}.log")
        return line.removeprefix("listening ").strip()
