"""Dirty bitmaps of a running QEMU pass the suite of all change trackers, through real backups."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from holdfast import StateManager
from holdfast.sources import GivenSource
from tests.client.tracking_suite import TrackingSuite
from tests.support.qemu import Drive, Qemu, tool

_names = (f"running-{number}" for number in itertools.count())


class QemuVolume:
    """A disk of a machine, as the suite drives it."""

    name = "root"
    size_bytes = 8 << 20
    sources: Mapping[str, GivenSource] | None = None

    def __init__(self, manager: StateManager, qemu: Qemu, folder: Path) -> None:
        """Register a VM whose volume is the machine's disk."""
        self.manager = manager
        self.vm_id = next(_names)
        self._qemu = qemu
        self._folder = folder
        manager.register_vm(self.vm_id, {self.name: qemu.uri("disk")})

    def write(self, offset: int, data: bytes) -> None:
        """Write through QEMU's block layer."""
        piece = self._folder / "piece"
        piece.write_bytes(data)
        self._qemu.io("disk", f"write -s {piece} {offset} {len(data)}")

    def content(self) -> bytes:
        """Return the bytes of the image."""
        self._qemu.io("disk", "flush")  # QEMU keeps tables of a qcow2 image to itself until then.
        copy = self._folder / "copy.raw"
        source = self._qemu.drives[0].image
        tool("qemu-img", "convert", "-U", "-f", source["driver"], "-O", "raw", source["file"]["filename"], copy)
        return copy.read_bytes()

    def lose(self) -> None:
        """Remove the bitmaps, as a crash of QEMU does."""
        for name in self._qemu.bitmaps("disk"):
            if name:
                self._qemu.execute("block-dirty-bitmap-remove", node="disk-node", name=name)


class TestTheBitmapsOfARunningQemu(TrackingSuite):
    """The suite, on a raw disk and on a qcow2 image."""

    @pytest.fixture(params=["raw", "qcow2"])
    def volume(self, request: pytest.FixtureRequest, manager: StateManager, tmp_path: Path) -> Iterator[QemuVolume]:
        """A running machine with an empty disk."""
        path = tmp_path / f"disk.{request.param}"
        tool("qemu-img", "create", "-q", "-f", request.param, path, str(QemuVolume.size_bytes))
        drive = Drive.raw("disk", path) if request.param == "raw" else Drive.qcow2("disk", path)
        with Qemu([drive]) as qemu:
            volume = QemuVolume(manager, qemu, tmp_path)
            yield volume
            # Whatever happened: no job, export or node is left, and one bitmap, that of the newest point, if any.
            assert qemu.execute("query-jobs") == []
            assert not [node for node in qemu.nodes() if node.startswith("holdfast-")]
            assert len([name for name in qemu.bitmaps("disk") if name]) <= 2
