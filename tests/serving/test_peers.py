"""Other people's NBD clients: nbdinfo, nbdcopy, qemu-img and qemu-nbd's own view, against every kind of export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from holdfast import StateManager
from tests.client.rig import BLOCK, allocated_bytes, digest
from tests.serving.conftest import DATA_BYTES, ROOT_BYTES, ServedVm
from tests.support.qemu import tool


@pytest.fixture(params=["socket", "tcp"])
def where(request: pytest.FixtureRequest, socket: Path) -> dict[str, str]:
    """Where to listen, for `serve_point`."""
    return {"socket": str(socket)} if request.param == "socket" else {"listen": "127.0.0.1:0"}


def test_nbdinfo_reads_it(manager: StateManager, served: ServedVm, where: dict[str, str]) -> None:
    with manager.serve_point(served.point, **where) as point:  # type: ignore[arg-type]
        listed = json.loads(tool("nbdinfo", "--list", "--json", point.uris["root"]))
        assert {export["export-name"]: export["export-size"] for export in listed["exports"]} == {
            "root": ROOT_BYTES,
            "data": DATA_BYTES,
        }
        assert all(export["is_read_only"] and export["can_multi_conn"] for export in listed["exports"])
        extents = json.loads(tool("nbdinfo", "--map", "--json", point.uris["root"]))
        zero = [(extent["offset"], extent["length"]) for extent in extents if extent["type"] == 3]
        assert zero == [(5 * BLOCK, 4 * BLOCK), (10 * BLOCK, 6 * BLOCK)]


def test_nbdcopy_gets_it_all(manager: StateManager, served: ServedVm, where: dict[str, str], tmp_path: Path) -> None:
    with manager.serve_point(served.point, **where) as point:  # type: ignore[arg-type]
        for name in ("root", "data"):
            copy = tmp_path / f"{name}.copy"
            tool("nbdcopy", point.uris[name], copy)
            assert digest(copy) == digest(served.vm.path(name))
            assert allocated_bytes(copy) <= allocated_bytes(served.vm.path(name)) + BLOCK


def test_qemu_img_compares_and_maps(manager: StateManager, served: ServedVm, where: dict[str, str]) -> None:
    with manager.serve_point(served.point, **where) as point:  # type: ignore[arg-type]
        uri = point.uris["root"]
        assert "identical" in tool("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, served.vm.path())
        extents = json.loads(tool("qemu-img", "map", "-f", "raw", "--output=json", uri))
        data = [(extent["start"], extent["length"]) for extent in extents if extent["data"]]
        # qemu rounds what it asks for to whole sectors.
        assert [(start // BLOCK, -(-length // BLOCK)) for start, length in data] == [(0, 5), (9, 1), (16, 9)]


def test_nbdcopy_and_qemu_write_to_it(
    manager: StateManager, served: ServedVm, where: dict[str, str], tmp_path: Path
) -> None:
    overlay = tmp_path / "overlay"
    with manager.serve_point(served.point, overlay=overlay, **where) as point:  # type: ignore[arg-type]
        other = tmp_path / "other.raw"
        other.write_bytes(bytes(BLOCK) + b"\x17" * (DATA_BYTES - BLOCK))
        tool("nbdcopy", "--flush", other, point.uris["data"])
        assert "identical" in tool("qemu-img", "compare", "-f", "raw", "-F", "raw", point.uris["data"], other)
        tool(
            "qemu-io",
            "-f",
            "raw",
            "-c",
            "write -P 0x55 4k 64k",
            "-c",
            "discard 128k 64k",
            "-c",
            "flush",
            point.uris["root"],
        )
        tool("qemu-io", "-f", "raw", "-c", "read -P 0x55 4k 64k", "-c", "read -P 0 128k 64k", point.uris["root"])
    with manager.serve_point(served.point, overlay=overlay, read_only=True, **where) as point:  # type: ignore[arg-type]
        assert "identical" in tool("qemu-img", "compare", "-f", "raw", "-F", "raw", point.uris["data"], other)
        printed = tool("qemu-io", "-r", "-f", "raw", "-c", "read -P 0x55 4k 64k", point.uris["root"])
        assert "verification failed" not in printed


@pytest.mark.slow
def test_a_served_volume_is_a_source_of_ours(manager: StateManager, served: ServedVm, where: dict[str, str]) -> None:
    with manager.serve_point(served.point, **where) as point:  # type: ignore[arg-type]
        manager.register_vm(f"copy-of-{served.vm.name}", {"disk": point.uris["root"]})
        copy = manager.create_snapshot(f"copy-of-{served.vm.name}")
    with manager.open_volume(copy, "disk") as file:
        assert file.readall() == served.content()
