"""A real QEMU process with disks, driven by tests: emulated, without a network, its sockets in a folder of its own.

`Qemu` runs no guest: `write` goes through the emulator's block layer as a guest's write does, in no time at all. What
needs a kernel is in `tests.support.guest`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.support.waiting import wait_until

_FOLDERS: Final = ("/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/local/bin", "/usr/bin", "/bin")
_ANSWERS_WITHIN_S: Final = 60.0


def program(name: str) -> str:
    """Return the path of a program, in the system's folders too. Raises FileNotFoundError that says what to do."""
    found = shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", ""), *_FOLDERS)))
    if found is None:
        raise FileNotFoundError(f"no {name}; tools/system-packages names what the tests need")
    return found


def tool(*command: str | Path, **options: Any) -> str:
    """Run a program to its end and return what it printed. Raises AssertionError with its words if it fails."""
    done: subprocess.CompletedProcess[str] = subprocess.run(
        [program(str(command[0])), *map(str, command[1:])], capture_output=True, text=True, timeout=120, **options
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stderr or done.stdout}"
    return done.stdout


@dataclass(frozen=True, slots=True)
class Drive:
    """A disk of a machine.

    Attributes:
        name: what volumes and tests call it; its block node is called NAME-node.
        image: options of `-blockdev` without the node's name.
    """

    name: str
    image: Mapping[str, Any]

    @classmethod
    def raw(cls, name: str, path: Path) -> Drive:
        """A raw file."""
        return cls(name, {"driver": "raw", "file": {"driver": "file", "filename": str(path)}})

    @classmethod
    def qcow2(cls, name: str, path: Path) -> Drive:
        """A qcow2 image."""
        return cls(name, {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}})

    @classmethod
    def nbd_unix(cls, name: str, path: Path, export: str = "") -> Drive:
        """An export of an NBD server on a Unix socket."""
        server = {"type": "unix", "path": str(path)}
        return cls(name, {"driver": "raw", "file": {"driver": "nbd", "server": server, "export": export}})

    @classmethod
    def nbd_tcp(cls, name: str, host: str, port: int, export: str = "") -> Drive:
        """An export of an NBD server."""
        server = {"type": "inet", "host": host, "port": str(port)}
        return cls(name, {"driver": "raw", "file": {"driver": "nbd", "server": server, "export": export}})


class MonitorError(Exception):
    """QEMU refused a command."""


class Monitor:
    """A connection to a machine's QMP socket, of which each takes one."""

    def __init__(self, path: Path) -> None:
        """Connect and agree on capabilities."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_ANSWERS_WITHIN_S)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rb")
        assert "QMP" in json.loads(self._lines.readline())
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command and return its answer; `_` in an argument's name stands for `-`. Raises MonitorError."""
        message = {"execute": command, "arguments": {name.replace("_", "-"): at for name, at in arguments.items()}}
        self._socket.sendall(json.dumps(message).encode() + b"\n")
        while line := self._lines.readline():
            answer = json.loads(line)
            if "error" in answer:
                raise MonitorError(answer["error"]["desc"])
            if "return" in answer:
                return answer["return"]
        raise MonitorError("QEMU has gone")

    def close(self) -> None:
        """Close the connection."""
        self._lines.close()
        self._socket.close()


@dataclass
class Qemu:
    """A machine without a guest. Use as a context manager, or call `start` and, in any case, `kill`.

    Attributes:
        drives: its disks.
        arguments: further options.
        sockets: folder of its sockets and its log, made at the start.
        process: while it runs.
    """

    drives: Sequence[Drive]
    arguments: Sequence[str] = ()
    sockets: Path = field(default=Path(), init=False)
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _monitor: Monitor | None = field(default=None, init=False)

    def __enter__(self) -> Qemu:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def qmp_socket(self) -> Path:
        """A QMP socket that the tests leave to the product; QEMU serves one client at a time on each."""
        return self.sockets / "qmp"

    def uri(self, drive: str, **parameters: str | Path) -> str:
        """Return the volume URI of a disk."""
        further = "".join(f"&{name}={value}" for name, value in parameters.items())
        return f"qmp:{self.qmp_socket}?device={drive}{further}"

    def start(self) -> None:
        """Start it and wait until it answers. Raises AssertionError with its words if it does not."""
        assert self.process is None, "it runs already"
        # Short: the path of a socket has at most 107 characters.
        self.sockets = Path(tempfile.mkdtemp(prefix="holdfast-qemu-"))
        self._launch()
        try:
            wait_until(self._answers_or_gone, "QEMU's socket")
            assert self._running(), f"QEMU does not start: {self.log()}"
        except BaseException:
            self.kill()
            raise

    def _launch(self) -> None:
        with (self.sockets / "log").open("wb") as log:
            self.process = subprocess.Popen(
                self._command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, bufsize=0
            )

    def _command(self) -> list[str]:
        command = [
            program("qemu-system-x86_64"),
            *self._machine(),
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
        ]
        for name in ("qmp", "control"):
            command += ["-qmp", f"unix:{self.sockets / name},server=on,wait=off"]
        for drive in self.drives:
            command += self._disk(drive)
        return [*command, *self.arguments]

    def _machine(self) -> list[str]:
        return ["-machine", "none"]

    def _disk(self, drive: Drive) -> list[str]:
        # Without a device it takes this older form to have something above the node that writes come through.
        options = {"if": "none", "id": drive.name, "node-name": f"{drive.name}-node", **_flat(drive.image)}
        return ["-drive", ",".join(f"{name}={value.replace(',', ',,')}" for name, value in options.items())]

    def _target(self, drive: str) -> str:
        return drive

    def _running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def _answers_or_gone(self) -> bool:
        # The first connection is the one that stays: QEMU may lose the next one behind one that was closed at once.
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            self._monitor = Monitor(self.sockets / "control")
        return self._monitor is not None or not self._running()

    def log(self) -> str:
        """What it wrote on its standard error."""
        return (self.sockets / "log").read_text(errors="replace")

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command on the tests' own connection. Raises MonitorError."""
        assert self._monitor is not None, "it does not run"
        return self._monitor.execute(command, **arguments)

    def io(self, drive: str, command: str) -> str:
        """Run a command of `qemu-io` on a disk, and return what it printed."""
        line = f'qemu-io {self._target(drive)} "{command}"'
        printed = str(self.execute("human-monitor-command", command_line=line))
        assert not re.search("failed|error|not |cannot|conflict", printed, re.IGNORECASE), f"{line}: {printed}"
        return printed

    def write(self, drive: str, offset: int, length: int, pattern: int) -> None:
        """Write `length` bytes of one value, as a guest would."""
        self.io(drive, f"write -P {pattern} {offset} {length}")

    def bitmaps(self, drive: str) -> dict[str, dict[str, Any]]:
        """Return the dirty bitmaps of a disk's node by name."""
        nodes = {node["node-name"]: node for node in self.execute("query-named-block-nodes", flat=True)}
        return {bitmap.get("name", ""): bitmap for bitmap in nodes[f"{drive}-node"].get("dirty-bitmaps", ())}

    def nodes(self) -> set[str]:
        """Return the names of all nodes."""
        return {node["node-name"] for node in self.execute("query-named-block-nodes", flat=True)}

    def quit(self) -> None:
        """Let QEMU end in order, as an operator does: it closes its images."""
        assert self.process is not None
        assert self._monitor is not None
        # QEMU may close the connection before its answer is read.
        with contextlib.suppress(MonitorError, ConnectionError):
            self._monitor.execute("quit")
        self.process.wait(_ANSWERS_WITHIN_S)
        self.kill()

    def kill(self) -> None:
        """End it with SIGKILL if it still runs, and wait until it is gone."""
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    pipe.close()
            self.process = None
        if self.sockets != Path():
            shutil.rmtree(self.sockets, ignore_errors=True)


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested options with dotted names."""
    flat: dict[str, str] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = str(value)
    return flat
