"""How disks are held still while the guest writes on ("fleecing", QEMU's documentation, `live-block-operations`).

A scratch image stands before each disk: a backup job of mode `none` copies to it whatever the guest is about to
overwrite, and everything else is read through it. So it shows the disk as at the moment at which the job began, and is
exported over NBD on a Unix socket beside the monitor's.

Every job, export and node is named `holdfast-…`, so that what a dead process left behind is found and taken away.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from holdfast.sources.qmp.bitmaps import Action
from holdfast.sources.qmp.disks import Disk
from holdfast.sources.qmp.monitor import Monitor, understanding
from holdfast_core.model.errors import ErrorCode, HoldfastError

_OURS: Final = "holdfast-"
_SCRATCH_PREFIX: Final = ".holdfast-"
_FILE_NODE: Final = "f"
_SOCKET_PATH_BYTES_MAX: Final = 107


@dataclass(frozen=True, slots=True)
class Fleece:
    """The names of what holds one disk still.

    Attributes:
        node: the scratch image; also the name of the export and of its id.
        scratch: its file, which has no name any more soon after it was made.
    """

    node: str
    scratch: Path

    @property
    def file_node(self) -> str:
        """Name of the node below the scratch image."""
        return self.node + _FILE_NODE

    @property
    def job(self) -> str:
        """Name of the backup job."""
        return f"{self.node}j"


def plan_fleece(disk: Disk, *, at: int, point_id: str, scratch: Path | None, beside: Path) -> Fleece:
    """Choose the names for a disk; `beside` is the folder for the scratch image of a disk that is no file."""
    # A node's name has 31 characters at most, and none of ours may begin with another one.
    token = hashlib.sha256(point_id.encode()).hexdigest()[:12]
    node = f"{_OURS}{token}-{at:03}"
    folder = scratch or disk.folder or beside
    return Fleece(node, folder / f"{_SCRATCH_PREFIX}{token}-{at:03}.scratch")


@understanding("jobs")
def make_scratch(monitor: Monitor, fleece: Fleece, disk: Disk) -> None:
    """Let QEMU make the scratch image over the disk, and take its name away: it ends with QEMU, however that ends.

    Raises:
        HoldfastError: SOURCE_UNREADABLE if QEMU cannot write in that folder.
    """
    file = {"driver": "file", "filename": str(fleece.scratch)}
    try:
        _make_private(fleece.scratch, monitor.path)
        _create(monitor, fleece, {**file, "size": 0})
        monitor.execute("blockdev-add", {"node-name": fleece.file_node, **file})
        _create(monitor, fleece, {"driver": "qcow2", "file": fleece.file_node, "size": disk.size_bytes})
        image = {"driver": "qcow2", "file": fleece.file_node, "backing": disk.node}
        monitor.execute("blockdev-add", {"node-name": fleece.node, **image})
    finally:
        _forget_name(fleece.scratch)


def _make_private(scratch: Path, monitor_socket: Path) -> None:
    """Make the file for whom QEMU runs as alone: QEMU itself would let everybody read the guest's old blocks."""
    with contextlib.suppress(OSError):  # We may not write there; then it is QEMU's to make, or to refuse.
        owner = monitor_socket.stat()
        descriptor = os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
        except OSError:
            scratch.unlink()
            raise
        finally:
            os.close(descriptor)


def _forget_name(scratch: Path) -> None:
    with contextlib.suppress(OSError):  # Where QEMU sees other folders than we do, it stays there as an empty image.
        scratch.unlink(missing_ok=True)


def _create(monitor: Monitor, fleece: Fleece, options: dict[str, Any]) -> None:
    monitor.execute("blockdev-create", {"job-id": fleece.job, "options": options})

    def concluded() -> bool:
        return str(_jobs(monitor)[fleece.job]["status"]) == "concluded"

    monitor.wait(concluded, "making a scratch image")
    failed = _jobs(monitor)[fleece.job].get("error", "")
    monitor.execute("job-dismiss", {"id": fleece.job})
    if failed:
        raise HoldfastError(
            ErrorCode.SOURCE_UNREADABLE,
            f"QEMU cannot make the scratch image {fleece.scratch}: {failed}; name a folder where it may write with "
            "scratch= in the volume's URI",
        )


def hold(fleece: Fleece, disk: Disk) -> Action:
    """Return the action that holds the disk still: the moment of the point."""
    data = {"job-id": fleece.job, "device": disk.node, "target": fleece.node, "sync": "none"}
    return {"type": "blockdev-backup", "data": data}


@understanding("jobs")
def is_holding(monitor: Monitor, fleece: Fleece) -> bool:
    """Whether the disk was held all the time: the job ends when somebody cancels it, and then the export moves on."""
    return _jobs(monitor).get(fleece.job, {}).get("status") == "running"


def export(monitor: Monitor, fleece: Fleece, bitmap: str) -> None:
    """Export a held disk, with a bitmap that has stopped recording unless it is empty.

    Raises:
        HoldfastError: SOURCE_UNREADABLE.
    """
    options = {"type": "nbd", "id": fleece.node, "node-name": fleece.node, "name": fleece.node, "writable": False}
    monitor.execute("block-export-add", options | ({"bitmaps": [bitmap]} if bitmap else {}))


def release(monitor: Monitor, fleece: Fleece) -> None:
    """Take away export, job and scratch image of one disk; what is not there is no error.

    Raises:
        HoldfastError: SOURCE_UNREADABLE.
    """
    _release(monitor, fleece.node)


def clear_leftovers(monitor: Monitor) -> None:
    """Take away every export, job and scratch image of ours: those that a process left when it died.

    Raises:
        HoldfastError: SOURCE_UNREADABLE.
    """
    _release(monitor, _OURS)


@understanding("jobs, exports and nodes")
def _release(monitor: Monitor, prefix: str) -> None:
    """Take away exports, jobs and nodes by the beginning of their names, in the order in which they hold each other."""

    def exports() -> list[str]:
        return [name for name in _exports(monitor) if name.startswith(prefix)]

    def jobs() -> dict[str, str]:
        return {name: str(job["status"]) for name, job in _jobs(monitor).items() if name.startswith(prefix)}

    for name in exports():
        # Hard: a client that is still connected, such as one that died, does not keep it.
        monitor.execute("block-export-del", {"id": name, "mode": "hard"})
    monitor.wait(lambda: not exports(), "closing an export")
    for name, status in jobs().items():
        with contextlib.suppress(HoldfastError):  # It may have ended this moment; whether it did is asked next.
            monitor.execute("job-dismiss" if status == "concluded" else "job-cancel", {"id": name})
    monitor.wait(lambda: _dismissed(monitor, jobs()), "ending a job")
    nodes = monitor.execute("query-named-block-nodes", {"flat": True})
    files = {each["node-name"]: Path(each["file"]) for each in nodes if each["node-name"].startswith(prefix)}
    for name in sorted(files, key=lambda name: name.endswith(_FILE_NODE)):
        # A file's node is in use by that of its format, so it comes last.
        monitor.execute("blockdev-del", {"node-name": name})
        if name.endswith(_FILE_NODE) and files[name].name.startswith(_SCRATCH_PREFIX):
            _forget_name(files[name])


def _dismissed(monitor: Monitor, jobs: dict[str, str]) -> bool:
    """Dismiss what has concluded, and return whether nothing is left."""
    for name, status in jobs.items():
        if status == "concluded":
            monitor.execute("job-dismiss", {"id": name})
    return not jobs


def server_socket(monitor_socket: Path) -> Path:
    """Return where a QEMU's exports of ours are served: beside the monitor, always in the same place."""
    beside = monitor_socket.with_name(monitor_socket.name + ".nbd")
    if len(os.fsencode(beside)) <= _SOCKET_PATH_BYTES_MAX:
        return beside
    token = hashlib.sha256(os.fsencode(monitor_socket)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"{_OURS}{token}.nbd"


@understanding("exports")
def start_server(monitor: Monitor, path: Path) -> None:
    """Start QEMU's NBD server, of which it has one.

    Raises:
        HoldfastError: SOURCE_UNREADABLE if it serves somebody else.
    """
    address = {"addr": {"type": "unix", "data": {"path": str(path)}}}
    if foreign := _exports(monitor):
        raise HoldfastError(
            ErrorCode.SOURCE_UNREADABLE,
            f"QEMU's NBD server is in use for the export {foreign[0]}; a backup needs it for itself, try again when "
            "that one is closed",
        )
    if _is_served(path):
        monitor.execute("nbd-server-stop")  # Ours: a process died between starting it and exporting anything.
    monitor.execute("nbd-server-start", address)


def stop_server(monitor: Monitor) -> None:
    """Stop QEMU's NBD server.

    Raises:
        HoldfastError: SOURCE_UNREADABLE.
    """
    monitor.execute("nbd-server-stop")


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def _jobs(monitor: Monitor) -> dict[str, dict[str, Any]]:
    return {str(job["id"]): job for job in monitor.execute("query-jobs")}


def _exports(monitor: Monitor) -> list[str]:
    return [str(each["id"]) for each in monitor.execute("query-block-exports")]
