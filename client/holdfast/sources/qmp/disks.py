"""Finding the disks that volumes name in what a QEMU tells of its block devices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.sources.qmp.bitmaps import Bitmap, bitmaps_of
from holdfast.sources.qmp.monitor import Monitor
from holdfast_core.model.errors import ErrorCode, HoldfastError


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk of a running QEMU.

    Attributes:
        node: name of the block node that the guest writes to.
        size_bytes: its size.
        persistent: whether bitmaps outlive QEMU: its format keeps them.
        folder: folder of the image where it is a plain file, else None.
    """

    node: str
    size_bytes: int
    persistent: bool
    folder: Path | None


def find_disks(monitor: Monitor, devices: Iterable[str]) -> dict[str, Disk]:
    """Return the disks by what names them: a device's id, a drive's name, or a node's name.

    Raises:
        HoldfastError: SOURCE_UNREADABLE if there is no such disk, or no medium in it; INVALID_ARGUMENT if two names
            mean the same disk.
    """
    drives = monitor.execute("query-block")
    nodes = {str(node["node-name"]): node for node in _named_nodes(monitor)}
    found: dict[str, Disk] = {}
    for device in devices:
        disk = _disk(_node_of(device, drives, nodes))
        twin = next((name for name, other in found.items() if other.node == disk.node), None)
        if twin is not None:
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT,
                f"two volumes name the same disk of QEMU, as {twin} and {device}; register it once",
            )
        found[device] = disk
    return found


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


def _disk(told: Mapping[str, Any]) -> Disk:
    image: Mapping[str, Any] = told["image"]
    details: Mapping[str, Any] = image.get("format-specific", {}).get("data", {})
    file = Path(str(told.get("file", "")))
    return Disk(
        node=str(told["node-name"]),
        size_bytes=int(image["virtual-size"]),
        # The first version of qcow2 has no place for bitmaps.
        persistent=told.get("drv") == "qcow2" and details.get("compat") != "0.10" and not told.get("ro"),
        folder=file.parent if file.is_absolute() and file.is_file() else None,
    )
