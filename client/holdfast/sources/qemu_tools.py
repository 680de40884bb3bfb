"""Running QEMU's own tools: `qemu-img` for what is in an image, and a private `qemu-nbd` that reads it.

Children run in a session of their own, so that an interrupt at the terminal does not end them in the middle of a
change, and with plain messages. Every one is waited for.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from holdfast.descriptors import unreadable
from holdfast.sources.nbd_connection import NbdEndpoint
from holdfast_core.model.errors import ErrorCode, HoldfastError

_RUN_TIMEOUT_S: Final = 120.0
_END_TIMEOUT_S: Final = 10.0
_MESSAGE_CHARS_MAX: Final = 400
_BACKLOG: Final = 16
_SOCKET_PATH_BYTES_MAX: Final = 107

# qemu-nbd takes a socket that listens already as systemd passes it: as descriptor 3, for the process of that id. The
# shell is there because the id is known only to the child itself, and what Python would do between fork and exec may
# not be done while there are other threads.
_WITH_SOCKET: Final = 'exec 3<&0 0</dev/null; exec env LISTEN_PID=$$ LISTEN_FDS=1 "$@"'


def image_name(path: str) -> str:
    """Return a qcow2 image as QEMU's tools take it, whatever characters its path has.

    Raises:
        HoldfastError: SOURCE_UNREADABLE if it is missing, or is neither file nor block device.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise unreadable(path, error) from error
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise _unreadable(path, "it is neither a file nor a block device")
    driver = "host_device" if stat.S_ISBLK(mode) else "file"
    return "json:" + json.dumps({"driver": "qcow2", "file": {"driver": driver, "filename": os.path.abspath(path)}})


def image_chain(path: str) -> list[dict[str, Any]]:
    """Return what `qemu-img info` says of an image and of each that it is backed by, the image first.

    Raises:
        HoldfastError: SOURCE_UNREADABLE.
    """
    said = _run(path, ["qemu-img", "info", "--output=json", "--backing-chain", image_name(path)])
    chain: list[dict[str, Any]] = json.loads(said)
    return chain


def change_bitmap(path: str, change: str, name: str) -> None:
    """Add or remove a persistent dirty bitmap; `change` is "--add" or "--remove".

    Raises:
        HoldfastError: SOURCE_UNREADABLE if the image is in use, may not be written, or cannot hold a bitmap.
    """
    _run(path, ["qemu-img", "bitmap", change, image_name(path), name])


class PrivateExport:
    """A `qemu-nbd` of our own that exports one image for reading, to us alone.

    It holds QEMU's lock on the image, so that no VM starts on it meanwhile. It ends by itself when our last connection
    does, and so even when this process is killed.
    """

    def __init__(self, path: str, *, bitmap: str = "") -> None:
        """Start it; `bitmap` is exported beside the data.

        Raises:
            HoldfastError: SOURCE_UNREADABLE.
        """
        self._path = path
        self._folder = Path(tempfile.mkdtemp(prefix="holdfast-nbd-"))
        self._said = self._folder / "messages"
        self._process: subprocess.Popen[bytes] | None = None
        self.endpoint = NbdEndpoint(socket_path=str(self._folder / "socket"))
        command = [_tool(path, "qemu-nbd"), "--read-only", f"--shared={_BACKLOG}"]
        if bitmap:
            command.append(f"--bitmap={bitmap}")
        try:
            if len(os.fsencode(self.endpoint.socket_path)) > _SOCKET_PATH_BYTES_MAX:
                raise _unreadable(path, f"{self._folder} is too long a path for a socket; set TMPDIR to a shorter one")
            with socket.socket(socket.AF_UNIX) as listening, self._said.open("wb") as messages:
                listening.bind(self.endpoint.socket_path)
                listening.listen(_BACKLOG)
                self._process = subprocess.Popen(
                    ["/bin/sh", "-c", _WITH_SOCKET, "sh", *command, image_name(path)],
                    stdin=listening.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=messages,
                    env=_environment(),
                    start_new_session=True,
                )
        except OSError as error:
            self.close()
            raise _unreadable(path, f"qemu-nbd cannot be started: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    def failed(self, error: HoldfastError) -> HoldfastError:
        """Return the error of a connection that failed, with what qemu-nbd said if it ended."""
        if self._process is None:
            return error
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return error
        return _unreadable(self._path, _plain(self._said.read_text(errors="replace"), "qemu-nbd"))

    def close(self) -> None:
        """End it and wait for it; the connections should be closed before. May be called more than once."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(_END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _run(path: str, command: Sequence[str]) -> str:
    tool = _tool(path, command[0])
    try:
        done = subprocess.run(
            [tool, *command[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_RUN_TIMEOUT_S,
            env=_environment(),
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as error:
        raise _unreadable(path, f"{command[0]} did not end within {_RUN_TIMEOUT_S:.0f} s") from error
    except OSError as error:
        raise _unreadable(path, f"{command[0]} cannot be started: {error.strerror}") from error
    if done.returncode:
        raise _unreadable(path, _plain(done.stderr, command[0]))
    return done.stdout


def _tool(path: str, name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise _unreadable(path, f"{name} is not installed (Debian's package qemu-utils has it)")
    return found


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LISTEN_")}
    return {**kept, "LC_ALL": "C.UTF-8"}


def _plain(said: str, tool: str) -> str:
    """Return what a tool said as one phrase, for the one trouble that everybody meets in our own words."""
    if '"write" lock' in said or '"consistent read" lock' in said:
        return "another process uses the image; stop the VM, or register its running QEMU as qmp:"
    # The image's name as we gave it, a JSON text, says nothing that the sentence around it does not say.
    lines = [line.partition("}': ")[2] or line for line in said.splitlines() if line.strip()]
    phrase = " ".join(line.removeprefix(f"{tool}: ").strip() for line in lines)
    shown = "".join(character if character.isprintable() else "?" for character in phrase)
    return f"{tool} says: {shown[:_MESSAGE_CHARS_MAX]}" if shown else f"{tool} failed and did not say why"


def _unreadable(path: str, why: str) -> HoldfastError:
    return HoldfastError(ErrorCode.SOURCE_UNREADABLE, f"the volume {path} cannot be read: {why}")
