"""`holdfast up` as a process: what it lays out, survives, tells, and leaves behind."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.harness import COMMAND, Up, eventually, run
from tests.e2e.images import MIB, digest, make_image

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    """A cluster of one's own; whatever a test did to it, nothing of it is left running."""
    cluster = Up(tmp_path / "data")
    yield cluster
    if cluster.process is not None and cluster.process.poll() is None:
        cluster.kill()


def children_of(cluster: Up) -> list[psutil.Process]:
    assert cluster.process is not None
    return psutil.Process(cluster.process.pid).children(recursive=True)


def saved_disk(cluster: Up, folder: Path, vm: str = "vm") -> tuple[str, str]:
    """Register and snapshot a small disk; return the snapshot and the disk's digest."""
    disk = folder / f"{vm}.raw"
    make_image(disk, size_bytes=8 * MIB, data_bytes=MIB, seed=3)
    cluster.ok("vm", "register", vm, "--volume", f"root={disk}")
    return cluster.ok("snapshot", vm), digest(disk)


def test_it_lays_out_its_directory_and_survives_restarts(up: Up, tmp_path: Path) -> None:
    up.start()
    assert {entry.name for entry in up.data.iterdir()} == {
        *("coordinator", "node-1", "node-2", "node-3", "master.key", "up.lock", "logs", "run"),
        *("admin.token", "node.token"),
    }
    key = up.data / "master.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(up.data.stat().st_mode) == 0o700
    assert len(key.read_bytes()) == 32
    assert any("losing it loses the data" in line and str(key) in line for line in up.stderr)
    assert up.stdout == [f"ready coordinator={up.address}\n"]
    snapshot, saved = saved_disk(up, tmp_path)
    before = key.read_bytes()
    family = children_of(up)
    assert len(family) == 4
    assert up.stop() == 0
    assert not any(child.is_running() for child in family)
    assert not list((up.data / "run").iterdir())

    up.start()  # the first address may differ: the port was left to the system
    assert key.read_bytes() == before
    assert len(children_of(up)) == 4, "as many nodes as the directory has"
    up.ok("restore", snapshot, "--to", str(tmp_path / "restored"))
    assert digest(tmp_path / "restored" / "root.raw") == saved
    assert up.stop() == 0


def test_ctrl_c_stops_it_as_cleanly(up: Up) -> None:
    up.arguments = ("--nodes", "1")
    up.start()
    family = children_of(up)
    assert up.process is not None
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(timeout=40) == 0
    assert not any(child.is_running() for child in family)


def test_it_can_be_stopped_while_it_starts(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "up", "--data", str(tmp_path / "data"), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    eventually(lambda: bool(psutil.Process(process.pid).children()), "the first child")
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    out, err = process.communicate(timeout=40)
    assert process.returncode == 0, err.decode()
    assert b"Traceback" not in err
    assert not out.startswith(b"ready") or not any(child.is_running() for child in family)
    assert not any(child.is_running() for child in family)


def test_a_killed_node_is_told_and_the_others_go_on(up: Up, tmp_path: Path) -> None:
    up.start()
    snapshot, saved = saved_disk(up, tmp_path)
    pid = int((up.data / "run" / "node-2.pid").read_text())
    assert pid == up.node(2).pid
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: any("node-2 was killed by SIGKILL" in line for line in up.stderr), "word of the death")
    up.ok("restore", snapshot, "--to", str(tmp_path / "restored"))
    assert digest(tmp_path / "restored" / "root.raw") == saved
    saved_disk(up, tmp_path, "other")
    assert up.stop() == 0
    assert len(up.stdout) == 1
    up.start()
    assert "down" not in up.ok("nodes"), "the next start has it back"
    assert up.stop() == 0


def test_without_its_coordinator_it_ends(up: Up) -> None:
    up.arguments = ("--nodes", "2")
    up.start()
    family = children_of(up)
    up.child("coordinator", "--master-key").kill()
    assert up.process is not None
    assert up.process.wait(timeout=40) == 1
    eventually(lambda: any("the coordinator was killed by SIGKILL" in line for line in up.stderr), "word of the death")
    assert not any(child.is_running() for child in family)


def test_a_killed_up_leaves_nothing_behind(up: Up, tmp_path: Path) -> None:
    up.start()
    snapshot, saved = saved_disk(up, tmp_path)
    family = children_of(up)
    assert up.process is not None
    up.process.kill()
    up.process.wait(timeout=20)
    eventually(lambda: not any(_alive(child) for child in family), "the end of its children")
    up.start()
    up.ok("restore", snapshot, "--to", str(tmp_path / "restored"))
    assert digest(tmp_path / "restored" / "root.raw") == saved
    assert up.stop() == 0


def _alive(process: psutil.Process) -> bool:
    """Whether it runs; one that nobody reaps yet does not."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_a_node_that_dies_before_all_is_ready_ends_the_start(tmp_path: Path) -> None:
    command = [*COMMAND, "up", "--data", str(tmp_path / "data"), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    listening = tmp_path / "data" / "run" / "node-1.pid"
    eventually(listening.exists, "the first node", within_s=60)
    os.kill(int(listening.read_text()), signal.SIGKILL)
    out, err = process.communicate(timeout=90)
    last = err.splitlines()[-1]
    assert process.returncode == 5, err
    assert out == ""
    assert "node-1" in last
    assert "Traceback" not in err


def test_fewer_nodes_than_copies_are_a_usage_error(tmp_path: Path) -> None:
    done = run("up", "--nodes", "2", "--replicas", "3", "--data", str(tmp_path / "data"))
    assert done.returncode == 2
    assert b"--replicas 3 needs as many nodes" in done.stderr
    assert not (tmp_path / "data" / "master.key").exists()


def test_one_node_keeps_one_copy(up: Up, tmp_path: Path) -> None:
    up.arguments = ("--nodes", "1")
    up.start()
    assert '"replicas": 1' in up.ok("status", "--json")
    saved_disk(up, tmp_path)
    second = run("up", "--data", str(up.data), "--port", "0")
    assert second.returncode == 4
    assert b"another `holdfast up` runs on" in second.stderr
    assert up.stop() == 0
    up.arguments = ("--nodes", "1", "--replicas", "1")
    up.start()
    assert up.stop() == 0


def test_a_directory_keeps_its_nodes_and_its_key(up: Up) -> None:
    up.arguments = ("--nodes", "2")
    up.start()
    assert up.stop() == 0
    fewer = run("up", "--nodes", "1", "--data", str(up.data), "--port", "0")
    assert fewer.returncode == 2
    assert b"holds 2 nodes" in fewer.stderr
    other = run("up", "--nodes", "3", "--replicas", "3", "--data", str(up.data), "--port", "0")
    assert other.returncode == 5
    assert b"replicas=2" in other.stderr
    key = up.data / "master.key"
    key.rename(up.data / "elsewhere")
    lost = run("up", "--data", str(up.data), "--port", "0")
    assert lost.returncode == 7
    assert b"put it back" in lost.stderr
    (up.data / "master.key").write_bytes(bytes(32))
    wrong = run("up", "--data", str(up.data), "--port", "0")
    assert wrong.returncode == 5
    assert b"coordinator did not start" in wrong.stderr


def test_a_node_more_joins_and_takes_its_part_by_an_explicit_plan(up: Up) -> None:
    up.arguments = ("--nodes", "3")
    up.start()
    assert up.stop() == 0
    up.arguments = ("--nodes", "4")
    up.start()
    assert '"node-4"' in up.ok("nodes", "--json")
    assert "node-4" not in up.ok("layout", "show")
    assert "node-4" in up.ok("layout", "plan")
    assert "node-4" in up.ok("layout", "apply")
    assert '"epoch": 2' in up.ok("layout", "show", "--json")
    assert up.stop() == 0


def test_a_taken_port_is_told(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("up", "--port", str(taken.getsockname()[1]), "--data", str(tmp_path / "data"))
    assert done.returncode == 5
    assert b"cannot be listened on" in done.stderr
    assert done.stdout == b""


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("up", "--data", str(tmp_path / "file" / "data"))
    assert done.returncode == 2
    assert b"cannot be used" in done.stderr


def test_settings_of_another_cluster_do_not_reach_its_services(
    up: Up, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [*COMMAND, "up", "--data", str(up.data), "--port", "0", "--nodes", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "HOLDFAST_COORDINATOR": "127.0.0.1:1", "HOLDFAST_ETCD": "127.0.0.1:1", "HOLDFAST_BIND": "x"},
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("ready coordinator=127.0.0.1:")
    process.terminate()
    assert process.wait(timeout=40) == 0


def test_with_etcd_its_metadata_is_there(up: Up, tmp_path: Path) -> None:
    from tests.support.etcd import EtcdCluster

    with EtcdCluster(members=1, tmp_path=tmp_path / "etcd") as etcd:
        up.arguments = ("--nodes", "1", "--etcd", etcd.endpoints[0])
        up.start()
        snapshot, saved = saved_disk(up, tmp_path)
        assert not (up.data / "coordinator" / "metadata.sqlite").exists()
        assert up.stop() == 0
        up.start()
        up.ok("restore", snapshot, "--to", str(tmp_path / "restored"))
        assert digest(tmp_path / "restored" / "root.raw") == saved
        assert up.stop() == 0
