"""Finding the disks that volumes name in what a QEMU tells of its block devices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from holdfast.sources.qmp.bitmaps import Bitmap, bitmaps_of
from holdfast.sources.qmp.monitor import Monitor, understanding
from holdfast_core.model.errors import ErrorCode, HoldfastError

_CLOSES_IN_MAIN_THREAD: Final = 9
_CONTROLLERS_MAX: Final = 8


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk of a running QEMU.

    Attributes:
        node: name of the block node that the guest writes to.
        size_bytes: its size.
        persistent: whether bitmaps outlive QEMU: its format keeps them.
        folder: folder of the image where it is a plain file, else None.
        device_path: the device that the guest sees, in QEMU's object tree; empty if there is none.
    """

    node: str
    size_bytes: int
    persistent: bool
    folder: Path | None
    device_path: str


@understanding("disks")
def find_disks(monitor: Monitor, devices: Iterable[str]) -> dict[str, Disk]:
    """Return the disks by what names them: a device's id, a drive's name, or a node's name.

    Raises:
        HoldfastError: SOURCE_UNREADABLE if there is no such disk, or no medium in it; INVALID_ARGUMENT if two names
            mean the same disk.
    """
    drives: list[dict[str, Any]] = monitor.execute("query-block")
    nodes = {str(node["node-name"]): node for node in _named_nodes(monitor)}
    found: dict[str, Disk] = {}
    for device in devices:
        disk = _disk(_node_of(device, drives, nodes), drives)
        twin = next((name for name, other in found.items() if other.node == disk.node), None)
        if twin is not None:
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT,
                f"two volumes name the same disk of QEMU, as {twin} and {device}; register it once",
            )
        found[device] = disk
    return found


@understanding("bitmaps")
def read_bitmaps(monitor: Monitor, node: str) -> dict[str, Bitmap]:
    """Return a node's bitmaps of ours as they are now.

    Raises:
        HoldfastError: SOURCE_UNREADABLE if the node has gone.
    """
    for told in _named_nodes(monitor):
        if told["node-name"] == node:
            return bitmaps_of(told.get("dirty-bitmaps", ()))
    raise HoldfastError(ErrorCode.SOURCE_UNREADABLE, f"QEMU has no block node {node} any more")


def _named_nodes(monitor: Monitor) -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = monitor.execute("query-named-block-nodes", {"flat": True})
    return nodes


def _node_of(
    device: str, drives: Iterable[Mapping[str, Any]], nodes: Mapping[str, Mapping[str, Any]]
) -> Mapping[str, Any]:
    """Return what QEMU tells of the node that a name means; a device's name comes before a node's."""
    known = []
    for drive in drives:
        # A device that carries an id is listed by its path, /machine/peripheral/ID and what is below it.
        names = {str(drive.get("device", "")), str(drive.get("qdev", "")), *str(drive.get("qdev", "")).split("/")}
        if device in names:
            inserted: Mapping[str, Any] | None = drive.get("inserted")
            if inserted is None:
                raise HoldfastError(ErrorCode.SOURCE_UNREADABLE, f"QEMU's disk {device} has no medium")
            return inserted
        inserted = drive.get("inserted")
        known.append(str(drive.get("device") or drive.get("qdev") or "") if inserted is None else inserted["node-name"])
    if device in nodes:
        return nodes[device]
    listed = ", ".join(sorted(filter(None, known))) or "none"
    raise HoldfastError(ErrorCode.SOURCE_UNREADABLE, f"QEMU has no disk {device}; it has: {listed}")


@understanding("threads")
def check_threads(monitor: Monitor, disks: Mapping[str, Disk]) -> None:
    """Refuse disks that have an I/O thread of their own, in releases of QEMU that abort when an NBD client leaves them.

    That takes the guest with it, and we cannot promise not to leave: a process may be killed. Debian's 7.2 does so
    since it took over the repair of CVE-2024-7409, which relies on 9.0's closing of clients in the main thread.

    Raises:
        HoldfastError: SOURCE_UNREADABLE.
    """
    version = monitor.execute("query-version")["qemu"]
    if int(version["major"]) >= _CLOSES_IN_MAIN_THREAD or not monitor.execute("query-iothreads"):
        return
    for device, disk in disks.items():
        if not disk.device_path or _iothread(monitor, disk.device_path):
            raise HoldfastError(
                ErrorCode.SOURCE_UNREADABLE,
                f"QEMU {version['major']}.{version['minor']} can abort when a backup leaves a disk that has an "
                f"iothread, as {device} has; attach it without one, or run QEMU {_CLOSES_IN_MAIN_THREAD} or later",
            )


def _iothread(monitor: Monitor, device_path: str) -> str:
    """Return the I/O thread of a device, or of the controller that it hangs on; empty if it has none."""
    for _ in range(_CONTROLLERS_MAX):
        there = {str(each["name"]) for each in monitor.execute("qom-list", {"path": device_path})}
        if "iothread" in there:
            return str(monitor.execute("qom-get", {"path": device_path, "property": "iothread"}))
        if "parent_bus" not in there:
            return ""
        # A bus is below the controller that it belongs to.
        bus = str(monitor.execute("qom-get", {"path": device_path, "property": "parent_bus"}))
        device_path = bus.rpartition("/")[0]
    return ""


def _disk(told: Mapping[str, Any], drives: Iterable[Mapping[str, Any]]) -> Disk:
    image: Mapping[str, Any] = told["image"]
    details: Mapping[str, Any] = image.get("format-specific", {}).get("data", {})
    file = Path(str(told.get("file", "")))
    return Disk(
        node=str(told["node-name"]),
        size_bytes=int(image["virtual-size"]),
        # The first version of qcow2 has no place for bitmaps.
        persistent=told.get("drv") == "qcow2" and details.get("compat") != "0.10" and not told.get("ro"),
        folder=file.parent if file.is_absolute() and file.is_file() else None,
        device_path=next(
            (
                str(drive.get("qdev", ""))
                for drive in drives
                if drive.get("inserted", {}).get("node-name") == told["node-name"]
            ),
            "",
        ),
    )
