"""Runs `holdfast up` and the command line as processes of their own, as a user's script does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.support.commands import COMMANDS

COMMAND = (sys.executable, "-m", "holdfast.cli.main")


def environment() -> dict[str, str]:
    """This process's environment with no setting of Holdfast but its home, where tokens of clusters are found.

    Output is buffered as it is for everybody, so that a line that others wait for has to be flushed.
    """
    dropped = ("HOLDFAST_", "PYTHONUNBUFFERED")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    home = os.environ.get("HOLDFAST_HOME")
    return kept if home is None else {**kept, "HOLDFAST_HOME": home}


def eventually(condition: Callable[[], bool], what: str, *, within_s: float = 30.0) -> None:
    """Wait until a condition holds; fail with `what` once the time is over."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not happen within {within_s:g} s")
        time.sleep(0.02)


@dataclass
class Up:
    """One `holdfast up`, its address, and what it printed."""

    data: Path
    arguments: Sequence[str] = ()
    address: str = ""
    stdout: list[str] = field(default_factory=list)
    stderr: list[str] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None
    readers: list[threading.Thread] = field(default_factory=list)

    def start(self, *, within_s: float = 40.0) -> Up:
        """Start it and wait for its one line on stdout."""
        process = self.process = subprocess.Popen(
            [*COMMAND, "up", "--data", str(self.data), "--port", "0", *self.arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        self.stdout.clear()
        self.stderr.clear()
        self.readers = [
            threading.Thread(target=lambda: self.stdout.extend(process.stdout or ()), daemon=True),
            threading.Thread(target=lambda: self.stderr.extend(process.stderr or ()), daemon=True),
        ]
        for reader in self.readers:
            reader.start()

        def spoke() -> bool:
            if process.poll() is not None:
                raise AssertionError(f"up ended with {process.returncode}: {''.join(self.stderr)[-3000:]}")
            return bool(self.stdout)

        eventually(spoke, "the ready line", within_s=within_s)
        line = self.stdout[0].strip()
        assert line.startswith("ready coordinator="), line
        self.address = line.removeprefix("ready coordinator=")
        return self

    def child(self, *words: str) -> psutil.Process:
        """The child whose command line holds all the words."""
        assert self.process is not None
        children = psutil.Process(self.process.pid).children(recursive=True)
        found = [c for c in children if all(any(w in part for part in c.cmdline()) for w in words)]
        assert found, f"no child with {words} among {[c.cmdline() for c in children]}"
        return found[0]

    def node(self, number: int) -> psutil.Process:
        """The process of storage node `number`, from 1."""
        return self.child("storagenode", f"node-{number}")

    def stop(self) -> int:
        """Send SIGTERM and return the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=40)
        for reader in self.readers:
            reader.join(timeout=10)
        return code

    def kill(self) -> None:
        """Kill it and all its children, as a power cut does."""
        assert self.process is not None
        everyone = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        for process in everyone:
            if process.is_running():
                process.kill()
        self.process.wait(timeout=20)
        psutil.wait_procs(everyone, timeout=20)

    def run(self, *arguments: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        """Run one command against the cluster."""
        return run(*arguments, coordinator=self.address, stdin=stdin)

    def ok(self, *arguments: str, stdin: bytes | None = None) -> str:
        """Run one command that must succeed; return its stdout, stripped."""
        done = self.run(*arguments, stdin=stdin)
        assert done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stderr.decode()}"
        return done.stdout.decode().strip()


def run(
    *arguments: str, coordinator: str | None = None, stdin: bytes | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run `holdfast` with arguments; the coordinator goes by the environment."""
    variables = environment()
    if coordinator is not None:
        variables["HOLDFAST_COORDINATOR"] = coordinator
    return COMMANDS.run(arguments, stdin=stdin, environment=variables, timeout_s=110)
