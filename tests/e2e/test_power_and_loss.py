"""Power cuts and lost nodes against real processes: what was acknowledged is there, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.harness import Up, eventually
from tests.e2e.images import MIB, change_image, digest, make_image

pytestmark = pytest.mark.timeout(240)


def test_everything_killed_at_once_keeps_every_acknowledged_point(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    make_image(disk, size_bytes=48 * MIB, data_bytes=8 * MIB, seed=11)
    cluster = Up(tmp_path / "data").start()
    cluster.ok("vm", "register", "vm", "--volume", f"root={disk}")
    snapshot = cluster.ok("snapshot", "vm")
    expected: dict[tuple[str, ...], str] = {(snapshot,): digest(disk)}
    for round_number in range(2):
        change_image(disk, edits=10, seed=100 + round_number)
        backup = cluster.ok("backup", "vm", snapshot)
        expected[snapshot, backup] = digest(disk)
        cluster.kill()
        cluster.start()
    for number, (ids, content) in enumerate(expected.items()):
        target = tmp_path / f"restored-{number}"
        cluster.ok("restore", *ids, "--to", str(target))
        assert digest(target / "root.raw") == content
    assert cluster.stop() == 0


def test_one_node_lost_writes_and_reads_go_on(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    make_image(disk, size_bytes=48 * MIB, data_bytes=8 * MIB, seed=12)
    cluster = Up(tmp_path / "data").start()
    cluster.ok("vm", "register", "vm", "--volume", f"root={disk}")
    snapshot = cluster.ok("snapshot", "vm")
    first = digest(disk)
    cluster.node(2).kill()
    change_image(disk, edits=30, seed=13)
    backup = cluster.ok("backup", "vm", snapshot)
    cluster.ok("restore", snapshot, "--to", str(tmp_path / "a"))
    cluster.ok("restore", snapshot, backup, "--to", str(tmp_path / "b"))
    assert digest(tmp_path / "a" / "root.raw") == first
    assert digest(tmp_path / "b" / "root.raw") == digest(disk)
    eventually(lambda: "down" in cluster.ok("nodes"), "the lost node is shown down", within_s=25)

    cluster.node(1).kill()
    change_image(disk, edits=5, seed=14)
    refused = cluster.run("backup", "vm", snapshot)
    assert refused.returncode == 5, refused.stderr.decode()
    assert backup in cluster.ok("points", "vm")
    points = json.loads(cluster.ok("points", "vm", "--json"))
    assert len(points) == 2, "a refused backup leaves nothing behind"
    cluster.stop()


def test_rot_on_one_node_is_read_around_and_on_all_is_told(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    make_image(disk, size_bytes=8 * MIB, data_bytes=4 * MIB, seed=15)
    cluster = Up(tmp_path / "data").start()
    cluster.ok("vm", "register", "vm", "--volume", f"root={disk}")
    snapshot = cluster.ok("snapshot", "vm")
    segments = sorted((tmp_path / "data").glob("node-*/**/*.seg*"))
    by_node = {n: [s for s in segments if f"node-{n}" in s.parts] for n in (1, 2, 3)}
    assert all(by_node.values()), f"each node keeps segments: {segments}"

    def rot(paths: list[Path], *, begin: int, end: int | None = None) -> None:
        for path in paths:
            content = bytearray(path.read_bytes())
            for at in range(begin, min(end or len(content), len(content)), 4096):
                content[at] ^= 0x40
            with path.open("r+b") as segment:
                segment.write(content)

    rot(by_node[1], begin=100_000, end=400_000)
    cluster.ok("restore", snapshot, "--to", str(tmp_path / "a"))
    assert digest(tmp_path / "a" / "root.raw") == digest(disk)
    # Every block of every copy: batches lie in another order on each node, so a range would not hit the same ones.
    for number in (1, 2, 3):
        rot(by_node[number], begin=4096 + number)
    damaged = cluster.run("restore", snapshot, "--to", str(tmp_path / "b"))
    assert damaged.returncode == 6, damaged.stderr.decode()
    assert not (tmp_path / "b" / "root.raw").exists()
    assert cluster.run("verify", snapshot).returncode == 6
    cluster.stop()
