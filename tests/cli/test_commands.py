"""Every command against one real cluster: what it prints, as text and as JSON, and how each class of error ends."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import COMMAND, Up, run
from tests.e2e.images import MIB, change_image, digest, make_image

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

ID = re.compile(r"(snap|bkp|app)-[a-z2-7]{26}\Z")
STATS = {
    *("logical_bytes", "read_bytes", "changed_bytes", "deduplicated_bytes", "stored_bytes", "sent_bytes"),
    *("stored_plain_bytes", "changed_blocks", "stored_blocks", "under_replicated_blocks", "index_bytes"),
    *("delta_blocks", "delta_plain_bytes", "delta_bytes", "sampled_bytes"),
}


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    cluster = Up(tmp_path_factory.mktemp("up") / "data").start()
    yield cluster
    assert cluster.stop() == 0


@pytest.fixture(scope="module")
def disk(up: Up, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The disk of the VM `web`, which every test may snapshot and none changes."""
    path = tmp_path_factory.mktemp("disk") / "disk.raw"
    make_image(path, size_bytes=16 * MIB, data_bytes=2 * MIB, seed=21)
    up.ok("vm", "register", "web", "--volume", f"root={path}")
    return path


@pytest.fixture(scope="module")
def snapshot(up: Up, disk: Path) -> str:
    return up.ok("snapshot", "web")


def answer(up: Up, *arguments: str) -> Any:
    return json.loads(up.ok(*arguments, "--json"))


def test_registering(up: Up, tmp_path: Path) -> None:
    root, data = tmp_path / "root.raw", tmp_path / "data.raw"
    for path in (root, data):
        make_image(path, size_bytes=MIB, data_bytes=100_000, seed=1)
    volumes = ("--volume", f"root={root}", "--volume", f"data=file:{data}")
    options = ("--block-size", "data=16KiB", "--codec", "data=lz4", "--live", "data")
    assert up.ok("vm", "register", "db", *volumes, *options) == "db"
    shown = answer(up, "vm", "register", "db", *volumes, *options)
    plain = {"uri": str(root), "block_bytes": 65536, "codec": "default", "live": False, "delta": True}
    assert shown["volumes"]["root"] == plain
    assert shown["volumes"]["data"] == {**plain, "uri": str(data), "block_bytes": 16384, "codec": "lz4", "live": True}
    differs = up.run("vm", "register", "db", "--volume", f"root={root}")
    assert differs.returncode == 4
    assert up.ok("vm", "register", "db", "--volume", f"root={root}", "--replace") == "db"
    listed = {vm["vm_id"]: vm for vm in answer(up, "vm", "list")}
    assert set(listed["db"]["volumes"]) == {"root"}
    assert listed["db"]["created_unix_ms"] > 1_700_000_000_000
    text = up.ok("vm", "list")
    assert text.splitlines()[0].split() == ["VM", "VOLUME", "SOURCE", "BLOCKS", "LIVE", "REGISTERED"]
    assert re.search(rf"^db +root +{re.escape(str(root))} +64 KiB +-", text, re.MULTILINE)


def test_snapshots_and_backups_print_their_id_alone(up: Up, tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    make_image(path, size_bytes=4 * MIB, data_bytes=MIB, seed=2)
    up.ok("vm", "register", "cache", "--volume", f"root={path}")
    done = up.run("snapshot", "cache")
    snapshot = done.stdout.decode().strip()
    assert ID.match(snapshot)
    assert snapshot.startswith("snap-")
    [told] = done.stderr.decode().splitlines()
    assert told.startswith(f"holdfast: {snapshot}: 4 MiB in size")
    change_image(path, edits=3, seed=3)
    backup = answer(up, "backup", "cache", snapshot, "--parent", snapshot)
    assert ID.match(backup["point_id"])
    assert set(backup) == {"point_id", "stats", "quorum_s", "committed_s", "replicated_s", "notices"}
    assert set(backup["stats"]) == STATS
    assert 0 < backup["stats"]["changed_bytes"] <= 6 * 65536
    assert backup["committed_s"] > 0
    based = answer(up, "snapshot", "cache", "--base", backup["point_id"], "--takeover")
    assert based["stats"]["stored_bytes"] < backup["stats"]["logical_bytes"] // 10


def test_points_and_show(up: Up, snapshot: str) -> None:
    [point] = [each for each in answer(up, "points", "web") if each["point_id"] == snapshot]
    assert (point["vm_id"], point["parent_id"], point["forgotten"]) == ("web", "", False)
    assert set(point["stats"]) == STATS
    [volume] = point["volumes"]
    assert (volume["name"], volume["size_bytes"], volume["consistency"]) == ("root", 16 * MIB, "offline")
    assert re.fullmatch(r"[0-9a-f]{64}", volume["root"])
    assert answer(up, "show", snapshot) == point
    text = up.ok("show", snapshot)
    assert re.search(rf"^point_id +{snapshot}$", text, re.MULTILINE)
    assert "volume root: 16 MiB in" in text
    assert up.ok("points", "web").splitlines()[0].split()[:4] == ["NO", "ID", "PARENT", "TIME"]


def test_a_backup_of_what_was_told(up: Up, disk: Path, tmp_path: Path) -> None:
    copy = tmp_path / "told.raw"
    copy.write_bytes(disk.read_bytes())
    up.ok("vm", "register", "told", "--volume", f"root={copy}")
    snapshot = up.ok("snapshot", "told")
    with copy.open("r+b") as stream:
        stream.seek(MIB)
        stream.write(b"changed")
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps({"root": [[MIB, 7]]}))
    told = answer(up, "backup", "told", snapshot, "--changed", str(changed), "--since", snapshot, "--sample", "0")
    assert (told["stats"]["read_bytes"], told["stats"]["sampled_bytes"], told["notices"]) == (65536, 0, [])
    assert answer(up, "show", told["point_id"])["volumes"][0]["reading"] == "changed"
    assert "offline, read: changed" in up.ok("show", told["point_id"])
    # The same once more: by now the parent is another point, which is said, and everything is read.
    done = up.run("backup", "told", snapshot, "--changed", str(changed), "--since", snapshot)
    assert done.returncode == 0
    assert b"all of it is read and compared" in done.stderr
    for text in ("[[0]]", "{", "5", "[[0, 1]"):
        changed.write_text(text)
        assert up.run("backup", "told", snapshot, "--changed", str(changed), "--since", snapshot).returncode == 2
    assert up.run("backup", "told", snapshot, "--changed", str(tmp_path / "none"), "--since", "x").returncode == 2
    assert up.run("backup", "told", snapshot, "--since", snapshot).returncode == 2


def test_restoring(up: Up, disk: Path, snapshot: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a"
    assert up.ok("restore", snapshot, "--to", str(target)) == str(target)
    assert digest(target / "root.raw") == digest(disk)
    told = answer(up, "restore", snapshot, "--to", str(tmp_path / "b"), "--durable")
    assert told == {
        "point_id": snapshot,
        "target": str(tmp_path / "b"),
        "files": [str(tmp_path / "b" / "root.raw"), str(tmp_path / "b" / "vm.json")],
        "fetched_bytes": told["fetched_bytes"],
        "kept_bytes": 0,
        "damage": [],
    }
    assert 0 < told["fetched_bytes"] <= disk.stat().st_size
    monkeypatch.chdir(tmp_path)
    assert up.ok("restore", snapshot, "--to", "c") == "c"
    assert digest(tmp_path / "c" / "root.raw") == digest(disk)


def test_restoring_as_qcow2_and_onto_an_older_copy(up: Up, disk: Path, snapshot: str, tmp_path: Path) -> None:
    target = tmp_path / "image"
    assert up.ok("restore", snapshot, "--to", str(target), "--format", "qcow2") == str(target)
    compared = subprocess.run(
        ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(disk), str(target / "root.qcow2")],
        capture_output=True,
        text=True,
    )
    assert compared.returncode == 0, compared.stdout + compared.stderr
    copy = tmp_path / "copy"
    copy.mkdir()
    content = disk.read_bytes()
    (copy / "root.raw").write_bytes(content)
    data_at = next(at for at in range(0, len(content), 64 * 1024) if any(content[at : at + 64 * 1024]))
    with (copy / "root.raw").open("r+b") as stream:
        stream.seek(data_at)
        stream.write(b"other bytes")
    told = answer(up, "restore", snapshot, "--onto", str(copy))
    assert digest(copy / "root.raw") == digest(disk)
    assert told["fetched_bytes"] == 64 * 1024
    assert told["kept_bytes"] > 0
    for wrong in (["--to", "x", "--onto", str(copy)], [], ["--to", "x", "--format", "vdi"]):
        assert up.run("restore", snapshot, *wrong).returncode == 2


def test_verifying(up: Up, snapshot: str) -> None:
    assert f"{snapshot} is whole" in up.ok("verify", snapshot)
    report = answer(up, "verify", snapshot)
    assert report["resource_id"] == snapshot
    assert report["blocks"] > 0
    assert report["plain_bytes"] > 0
    on_nodes = answer(up, "verify", snapshot, "--on-nodes")
    assert on_nodes["blocks"] >= report["blocks"]
    assert on_nodes["plain_bytes"] == 0, "nothing was opened here"


def test_forgetting(up: Up, disk: Path) -> None:
    point = up.ok("snapshot", "web")
    assert up.ok("forget", point) == ""
    assert point not in up.ok("points", "web")
    assert re.search(rf"{point}.*forgotten", up.ok("points", "web", "--all"))
    assert answer(up, "forget", up.ok("snapshot", "web"))["forgotten"].startswith("snap-")


def test_application_data(up: Up, tmp_path: Path) -> None:
    source = tmp_path / "model.bin"
    make_image(source, size_bytes=2 * MIB + 3, data_bytes=2 * MIB, seed=4)
    put = answer(up, "app", "put", "task-1", str(source))
    assert set(put) == {"storage_id", "task_id", "stats", "quorum_s", "committed_s", "replicated_s", "notices"}
    assert ID.match(put["storage_id"])
    piped = up.ok("app", "put", "task-1", "-", stdin=source.read_bytes())
    got = up.run("app", "get", piped)
    assert got.returncode == 0, got.stderr.decode()
    assert got.stdout == source.read_bytes()
    target = tmp_path / "out"
    assert up.ok("app", "get", put["storage_id"], "-o", str(target)) == ""
    assert target.read_bytes() == source.read_bytes()
    assert up.run("app", "get", piped, "--output", str(target)).returncode == 4
    listed = answer(up, "app", "list", "task-1")
    assert [each["storage_id"] for each in listed] == [put["storage_id"], piped]
    assert listed[0]["size_bytes"] == 2 * MIB + 3
    assert answer(up, "show", piped)["task_id"] == "task-1"
    assert piped in up.ok("app", "list", "task-1")
    up.ok("app", "forget", piped)
    assert answer(up, "app", "forget", put["storage_id"]) == {"forgotten": put["storage_id"]}
    assert answer(up, "app", "list", "task-1") == []


def test_the_cluster(up: Up, snapshot: str) -> None:
    status = answer(up, "status")
    assert (status["state"], status["writable"], status["replicas"], status["layout_epoch"]) == ("ready", True, 3, 1)
    assert re.search(r"^nodes +3 up of 3$", up.ok("status"), re.MULTILINE)
    nodes = answer(up, "nodes")
    assert [(node["node_id"], node["zone"], node["up"]) for node in nodes] == [
        ("node-1", "zone-1", True),
        ("node-2", "zone-2", True),
        ("node-3", "zone-3", True),
    ]
    assert len(up.ok("nodes").splitlines()) == 4
    for arguments in (("stats",), ("stats", "web")):
        stats = answer(up, *arguments)
        assert stats["logical_bytes"] >= 16 * MIB
        assert set(stats["transfer"]) == STATS
        assert "logical" in up.ok(*arguments)
    layout = answer(up, "layout", "show")
    assert layout["layouts"][0]["slots"] == dict.fromkeys(("node-1", "node-2", "node-3"), 4096)
    assert "layout 1: 4096 partitions, 3 copies" in up.ok("layout", "show")
    plan = answer(up, "layout", "plan")
    assert (plan["previous_epoch"], plan["slots_moved"], plan["slots_total"]) == (1, 0, 12288)
    assert "to do it: holdfast layout apply --epoch 1" in up.ok("layout", "plan")
    stale = up.run("layout", "apply", "--epoch", "7")
    assert stale.returncode == 4


def test_health_of_each_service(up: Up) -> None:
    addresses = [up.address, *(node["address"] for node in answer(up, "nodes"))]
    for address in addresses:
        done = run("health", address)
        assert (done.returncode, done.stdout) == (0, b"SERVING\n")
    assert run("health", up.address, "--service", "holdfast.v1.StateService").returncode == 0
    assert run("health", up.address, "--service", "holdfast.v1.Nothing").returncode == 3


def test_the_coordinator_may_be_named_before_or_after_or_outside(up: Up) -> None:
    for arguments in (("--coordinator", up.address, "status"), ("status", "--coordinator", up.address)):
        assert run(*arguments).returncode == 0
    nobody = "127.0.0.1:1"
    assert run("--coordinator", up.address, "status", coordinator=nobody).returncode == 0
    assert run("--coordinator", nobody, "status", "--coordinator", up.address).returncode == 0
    assert run("status", coordinator=nobody).returncode == 5
    assert run("status", coordinator=f"{nobody},{up.address}").returncode == 0
    assert json.loads(run("--json", "vm", "list", coordinator=up.address).stdout) is not None


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        (1, ("app", "put", "task", "/no/such/file")),
        (1, ("snapshot", "GONE")),
        (2, ("vm", "register", "web2", "--volume", "root=ftp://host/disk")),
        (2, ("vm", "register", "..", "--volume", "root=/dev/null")),
        (2, ("vm", "register", "web2", "--volume", "a/b=/dev/null")),
        (2, ("vm", "register", "web2", "--volume", "root=/tmp/x", "--block-size", "root=5000")),
        (2, ("points", "x" * 129)),
        (3, ("snapshot", "nobody")),
        (3, ("backup", "web", "snap-aaaaaaaaaaaaaaaaaaaaaaaaaa")),
        (3, ("forget", "bkp-aaaaaaaaaaaaaaaaaaaaaaaaaa")),
        (3, ("app", "forget", "app-aaaaaaaaaaaaaaaaaaaaaaaaaa")),
        (3, ("show", "app-aaaaaaaaaaaaaaaaaaaaaaaaaa")),
        (3, ("stats", "nobody")),
        (4, ("restore", "SNAPSHOT", "--to", "OCCUPIED")),
        (4, ("backup", "other", "SNAPSHOT")),
    ],
)
def test_errors_by_class(
    up: Up, disk: Path, snapshot: str, tmp_path: Path, code: int, arguments: tuple[str, ...]
) -> None:
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "file").write_text("x")
    for vm in ("other", "gone"):
        image = tmp_path / f"{vm}.raw"
        make_image(image, size_bytes=MIB, data_bytes=1000, seed=5)
        up.ok("vm", "register", vm, "--replace", "--volume", f"root={image}")
    (tmp_path / "gone.raw").unlink()
    words = {"SNAPSHOT": snapshot, "OCCUPIED": str(tmp_path / "occupied"), "GONE": "gone"}
    done = up.run(*(words.get(word, word) for word in arguments))
    told = done.stderr.decode()
    assert (done.returncode, done.stdout) == (code, b""), told
    assert told.startswith("holdfast: ")
    assert told.count("\n") == 1
    assert "Traceback" not in told
    assert (tmp_path / "occupied" / "file").read_text() == "x"


def test_a_terminal_gets_a_bar(up: Up, snapshot: str, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "HOLDFAST_COORDINATOR": up.address, "TERM": "xterm"}
    target = tmp_path / "restored"
    done = subprocess.run(
        [*COMMAND, "restore", snapshot, "--to", str(target)],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=environment,
        check=False,
    )
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert (done.returncode, done.stdout.decode().strip()) == (0, str(target))
    assert f"restore of {snapshot}" in shown
    assert "━" in shown
