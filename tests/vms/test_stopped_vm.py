"""A VM on a qcow2 image that runs, stops, is backed up and runs again: by the command, and what QEMU tracked itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast import StateManager
from holdfast.results import Reading
from holdfast.testing import MemoryCluster
from tests.e2e.harness import Up
from tests.support.nbd import bitmap_names, make_qcow2, plain_bytes
from tests.support.qemu import Drive, Qemu

MIB = 1 << 20
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """A cluster as `holdfast up` starts it."""
    cluster = Up(tmp_path_factory.mktemp("up") / "data").start()
    yield cluster
    assert cluster.stop() == 0


def test_its_life_by_the_command(up: Up, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = make_qcow2(tmp_path / "disk.qcow2", 256 * MIB, "write -P 1 0 8M")
    monkeypatch.chdir(tmp_path)
    up.ok("vm", "register", "stopped", "--volume", "root=qcow2:disk.qcow2")
    snapshot = up.ok("snapshot", "stopped")
    assert bitmap_names(image) == {f"holdfast-{snapshot}"}

    # The machine has loaded the bitmap from the image, records into it, and stores it when it ends.
    with Qemu([Drive.qcow2("root", image)]) as machine:
        machine.write("root", 100 * MIB, 70_000, 2)
        refused = up.run("backup", "stopped", snapshot)
        assert refused.returncode == 1
        assert b"another process uses the image; stop the VM" in refused.stderr
        machine.quit()
    first = up.ok("backup", "stopped", snapshot)
    point = json.loads(up.ok("show", first, "--json"))
    assert point["volumes"][0]["reading"] == "changed"
    assert point["stats"]["read_bytes"] <= 3 * 65536

    # A machine that is killed leaves its bitmaps inconsistent: read all, say so, and track from here on.
    with Qemu([Drive.qcow2("root", image)]) as machine:
        machine.write("root", 200 * MIB, 4096, 3)
        machine.io("root", "flush")
        machine.kill()
    done = up.run("backup", "stopped", snapshot)
    assert done.returncode == 0
    assert b"inconsistent: QEMU ended without closing the image" in done.stderr
    backup = done.stdout.decode().strip()
    assert bitmap_names(image) == {f"holdfast-{backup}"}
    up.ok("restore", snapshot, backup, "--to", "restored")
    assert (tmp_path / "restored" / "root.raw").read_bytes() == plain_bytes(image, tmp_path)


@pytest.fixture
def manager() -> Iterator[StateManager]:
    """A manager of a cluster in memory."""
    with MemoryCluster() as cluster, cluster.state_manager() as manager:
        yield manager


def test_running_and_stopped_backups_hand_their_bitmaps_to_each_other(manager: StateManager, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "disk.qcow2", 64 * MIB, "write -P 1 0 8M")

    def read_as(uri: str) -> Reading:
        manager.register_vm("both", {"root": uri}, replace=True)
        point = manager.point(manager.incremental_backup("both", snapshot))
        assert point.stats.read_bytes <= 2 * 65536
        return point.volumes[0].reading

    with Qemu([Drive.qcow2("root", image)]) as machine:
        manager.register_vm("both", {"root": machine.uri("root")})
        snapshot = manager.create_snapshot("both")
        machine.write("root", 20 * MIB, 4096, 2)
        machine.quit()
    assert read_as(f"qcow2:{image}") is Reading.CHANGED
    with Qemu([Drive.qcow2("root", image)]) as machine:
        machine.write("root", 30 * MIB, 4096, 3)
        assert read_as(machine.uri("root")) is Reading.CHANGED
        machine.write("root", 40 * MIB, 4096, 4)
        machine.quit()
    assert read_as(f"qcow2:{image}") is Reading.CHANGED
    newest = manager.points("both")[-1].point_id
    restored = manager.restore_vm(snapshot, newest, target=tmp_path / "restored")
    assert (restored / "root.raw").read_bytes() == plain_bytes(image, tmp_path)
