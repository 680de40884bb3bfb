"""A real guest in an emulated machine: Debian's cloud kernel and busybox, at its login prompt in about two seconds.

    root = make_root(tmp_path / "root.img")
    with Guest([Drive.raw("root", root)]) as guest:
        guest.wait_for_login()
        guest.run("echo hello >/srv/file && sync")
        guest.shut_down()

The first disk is the root file system, whatever it is read from. A disk with a larger system on it boots as well: the
machine needs `memory_mib`, and `root` if the file system is in a partition.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.support.guest_parts import GuestParts, agent_program, guest_parts, make_root
from tests.support.qemu import Drive, Qemu

__all__ = ["Drive", "Guest", "GuestParts", "agent_program", "guest_parts", "make_root"]

BOOTS_WITHIN_S: Final = 120.0
RUNS_WITHIN_S: Final = 90.0
_AGENT_ANSWERS_WITHIN_S: Final = 10.0
_KERNEL_OPTIONS: Final = "console=ttyS0 quiet mitigations=off nokaslr no_timer_check cryptomgr.notests"


@dataclass
class Guest(Qemu):
    """A machine that boots a guest from its first disk. Use as a context manager, or call `start` and `kill`.

    Attributes:
        memory_mib: its memory.
        root: where the guest finds its root file system.
        agent: with a channel for QEMU's guest agent, which has to be in the guest (`make_root(agent=True)`).
    """

    memory_mib: int = 160
    root: str = "/dev/vda"
    agent: bool = False
    _console: bytearray = field(default_factory=bytearray, init=False)
    _came: threading.Condition = field(default_factory=threading.Condition, init=False)
    _reader: threading.Thread | None = field(default=None, init=False)
    _logged_in: bool = field(default=False, init=False)
    _commands: int = field(default=0, init=False)

    def __enter__(self) -> Guest:
        self.start()
        return self

    @property
    def agent_socket(self) -> Path:
        """Socket of the guest agent's channel."""
        return self.sockets / "agent"

    def _machine(self) -> list[str]:
        parts = guest_parts()
        options = f"{_KERNEL_OPTIONS} root={self.root}{' holdfast.agent' if self.agent else ''}"
        return [
            "-machine", "pc", "-accel", "tcg", "-m", str(self.memory_mib), "-serial", "stdio", "-no-reboot",
            "-kernel", str(parts.kernel), "-initrd", str(parts.first_root), "-append", options,
            *(self._agent_channel() if self.agent else ()),
        ]  # fmt: skip

    def _agent_channel(self) -> list[str]:
        return [
            "-chardev", f"socket,path={self.agent_socket},server=on,wait=off,id=agent",
            "-device", "virtio-serial",
            "-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0",
        ]  # fmt: skip

    def _disk(self, drive: Drive) -> list[str]:
        node = f"{drive.name}-node"
        image = json.dumps({"node-name": node, **drive.image})
        return ["-blockdev", image, "-device", f"virtio-blk-pci,drive={node},id={drive.name}"]

    def _target(self, drive: str) -> str:
        return f"-d /machine/peripheral/{drive}/virtio-backend"

    def _launch(self) -> None:
        self._console.clear()
        self._logged_in = False
        super()._launch()
        self._reader = threading.Thread(target=self._read_console, daemon=True)
        self._reader.start()

    def _read_console(self) -> None:
        assert self.process is not None
        console = self.process.stdout
        assert console is not None
        with contextlib.suppress(OSError, ValueError):  # It was closed: the machine is gone.
            while piece := console.read(65536):
                with self._came:
                    self._console += piece
                    self._came.notify_all()
        with self._came:
            self._reader = None
            self._came.notify_all()

    def console(self) -> str:
        """Everything that the guest wrote on its serial console."""
        with self._came:
            return self._console.decode(errors="replace")

    def _wait_for(self, pattern: bytes, *, within_s: float) -> re.Match[bytes]:
        """Wait until the console shows the pattern. Raises AssertionError with the console's end if it does not."""
        with self._came:
            found: list[re.Match[bytes]] = []

            def shown() -> bool:
                found[:] = [each for each in (re.search(pattern, self._console, re.DOTALL),) if each]
                return bool(found) or self._reader is None

            self._came.wait_for(shown, within_s)
            assert found, f"no {pattern!r} within {within_s} s; the console ends with {bytes(self._console[-2000:])!r}"
            return found[0]

    def wait_for_login(self, within_s: float = BOOTS_WITHIN_S) -> float:
        """Wait for the login prompt; returns the seconds that it took from the call. Raises AssertionError."""
        begun_s = time.monotonic()
        self._wait_for(rb"login: ", within_s=within_s)
        return time.monotonic() - begun_s

    def start_command(self, command: str) -> None:
        """Type a command and do not wait for its end; the next `run` follows it."""
        if not self._logged_in:
            self.wait_for_login()
            self._type("root\n")
            self._wait_for(rb"login: .*[#$] ", within_s=RUNS_WITHIN_S)
            # Without echo, what is typed never looks like an answer.
            self._type("stty -echo; export PATH=/bin:/sbin:/usr/sbin; PS1=; echo re''ady\n")
            self._wait_for(rb"ready\r?\n", within_s=RUNS_WITHIN_S)
            self._logged_in = True
        self._type(command + "\n")

    def run(self, command: str, *, within_s: float = RUNS_WITHIN_S) -> str:
        """Run a shell command as root in the guest and return what it printed.

        Raises:
            AssertionError: it failed, or did not end in time.
        """
        self._commands += 1
        begin, end = f"<{self._commands}:", f":{self._commands}>"
        self.start_command(f"echo '{begin}'; ( {command} ) 2>&1; echo \"=$?{end}\"")
        pattern = re.escape(begin.encode()) + rb"\r?\n(.*)=(\d+)" + re.escape(end.encode())
        found = self._wait_for(pattern, within_s=within_s)
        printed = found.group(1).decode(errors="replace").replace("\r\n", "\n")
        assert found.group(2) == b"0", f"{command!r} in the guest ended with {found.group(2).decode()}: {printed}"
        return printed

    def _type(self, text: str) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())

    def shut_down(self, within_s: float = RUNS_WITHIN_S) -> None:
        """Let the guest write everything out and power off, and wait until QEMU has ended."""
        self.start_command("sync; umount -a -r; poweroff -f")
        assert self.process is not None
        self.process.wait(within_s)
        self.kill()

    def agent_answers(self) -> bool:
        """Whether the guest agent answers; see `agent_socket`."""
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(_AGENT_ANSWERS_WITHIN_S)
            probe.connect(str(self.agent_socket))
            probe.sendall(b'{"execute":"guest-sync","arguments":{"id":7}}\n')
            with probe.makefile("rb") as lines, contextlib.suppress(TimeoutError):
                return bool(json.loads(lines.readline()) == {"return": 7})
        return False
