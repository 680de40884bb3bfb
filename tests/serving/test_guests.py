"""A real guest on a served point: it boots to its login, writes, is cut off or shut down; nothing flushed is lost."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from holdfast import StateManager
from holdfast.testing import MemoryCluster
from tests.client.rig import Vm
from tests.serving.rig import Client, Serve
from tests.support.guest import Drive, Guest, make_root
from tests.support.qemu import tool

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT_BYTES = 48 << 20


@dataclass(frozen=True)
class BootableVm:
    """A VM whose volume `root` boots, and its snapshot."""

    vm: Vm
    point: str


@pytest.fixture
def bootable(manager: StateManager, tmp_path: Path) -> BootableVm:
    """A VM of the shared cluster with a small Linux on it."""
    vm = Vm(manager, f"guest-{tmp_path.name}"[:60], tmp_path)
    make_root(vm.path(), size_bytes=ROOT_BYTES)
    vm.register()
    return BootableVm(vm, vm.snapshot())


def test_a_guest_boots_writes_and_its_overlay_is_saved(
    manager: StateManager, bootable: BootableVm, socket: Path, tmp_path: Path
) -> None:
    overlay = tmp_path / "overlay"
    with (
        manager.serve_point(bootable.point, socket=socket, overlay=overlay, hydrate=True),
        Guest([Drive.nbd_unix("root", socket, "root")]) as guest,
    ):
        guest.wait_for_login()
        wrote = guest.run("dd if=/dev/urandom of=/made bs=64k count=20 2>/dev/null; sync; md5sum /made")
        guest.shut_down()
    backup = manager.save_overlay(overlay)
    transfer = manager.last_transfer
    assert transfer is not None
    assert transfer.stats.changed_bytes < ROOT_BYTES // 4
    restored = bootable.vm.restored(bootable.point, backup) / "root.raw"
    with manager.serve_point(backup, socket=socket) as point:
        uri = point.uris["root"]
        assert "identical" in tool("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, restored)
    tool("e2fsck", "-fn", restored)
    with Guest([Drive.raw("root", restored)]) as again:
        again.wait_for_login()
        assert again.run("md5sum /made") == wrote
        again.shut_down()


@pytest.fixture
def command(shared_cluster: MemoryCluster, bootable: BootableVm, socket: Path, tmp_path: Path) -> Serve:
    """`holdfast serve` with an overlay that it saves at its end, not yet started."""
    arguments = [bootable.point, "--socket", str(socket), "--overlay", str(tmp_path / "overlay"), "--save"]
    return Serve(shared_cluster.coordinator_address, shared_cluster.token, arguments, tmp_path)


def test_what_a_guest_has_flushed_survives_the_server_s_death(
    command: Serve, manager: StateManager, bootable: BootableVm, socket: Path
) -> None:
    with command, Guest([Drive.nbd_unix("root", socket, "root")]) as guest:
        guest.wait_for_login()
        kept = guest.run("dd if=/dev/urandom of=/kept bs=64k count=10 2>/dev/null; sync; md5sum /kept")
        guest.start_command("while true; do dd if=/dev/urandom of=/more bs=4k count=50; done")
        with Client(socket) as client:
            client.flush()
        command.kill()
        guest.kill()
    with command:
        with Guest([Drive.nbd_unix("root", socket, "root")]) as again:
            again.wait_for_login()
            assert again.run("md5sum /kept") == kept
            again.shut_down()
        printed = command.stop()
    assert len(printed) == 1
    assert re.fullmatch("bkp-[a-z2-7]{26}", printed[0])
    restored = bootable.vm.restored(bootable.point, printed[0]) / "root.raw"
    tool("e2fsck", "-fn", restored)
    assert manager.point(printed[0]).parent_id == bootable.point
