"""The command line as the README promises it to scripts: one cluster, each promise checked from outside."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Up, run
from tests.e2e.images import MIB, change_image, digest, make_image


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    cluster = Up(tmp_path_factory.mktemp("up") / "data").start()
    yield cluster
    assert cluster.stop() == 0


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "disk.raw"
    make_image(path, size_bytes=64 * MIB + 12345, data_bytes=6 * MIB, seed=1)
    return path


def test_up_lays_out_its_directory(up: Up) -> None:
    names = {entry.name for entry in up.data.iterdir() if entry.is_dir()}
    assert {"coordinator", "node-1", "node-2", "node-3"} <= names
    key = up.data / "master.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert any("master.key" in line for line in up.stderr)
    assert len(up.stdout) == 1


def test_the_life_of_a_vm(up: Up, image: Path, tmp_path: Path) -> None:
    up.ok("vm", "register", "web-1", "--volume", f"root={image}")
    up.ok("vm", "register", "web-1", "--volume", f"root={image}")  # identical: fine again
    first = digest(image)
    snapshot = up.ok("snapshot", "web-1")
    assert "\n" not in snapshot
    assert snapshot
    change_image(image, edits=20, seed=2)
    second = digest(image)
    backup = up.ok("backup", "web-1", snapshot)
    change_image(image, edits=20, seed=3)
    third = digest(image)
    from_parent = up.ok("backup", "web-1", snapshot, "--parent", backup)

    for name, arguments, expected in (
        ("a", (snapshot,), first),
        ("b", (snapshot, backup), second),
        ("c", (snapshot, from_parent), third),
    ):
        target = tmp_path / name
        printed = up.ok("restore", *arguments, "--to", str(target))
        assert Path(printed) == target
        restored = target / "root.raw"
        assert digest(restored) == expected
        assert restored.stat().st_size == image.stat().st_size
        assert restored.stat().st_blocks * 512 < 24 * MIB, "a sparse disk comes back sparse"

    points = json.loads(up.ok("points", "web-1", "--json"))
    text = json.dumps(points)
    assert all(point in text for point in (snapshot, backup, from_parent))
    assert snapshot in up.ok("points", "web-1")
    up.ok("verify", backup)
    shown = json.loads(up.ok("show", backup, "--json"))
    assert snapshot in json.dumps(shown), "a backup names its parent"

    up.ok("forget", backup)
    target = tmp_path / "d"
    up.ok("restore", snapshot, from_parent, "--to", str(target))
    assert digest(target / "root.raw") == third, "forgetting a parent harms no child"
    gone = up.run("restore", snapshot, backup, "--to", str(tmp_path / "e"))
    assert gone.returncode == 3
    assert not (tmp_path / "e").exists()


def test_application_data_round_trip(up: Up, tmp_path: Path) -> None:
    payload = tmp_path / "weights.bin"
    make_image(payload, size_bytes=3 * MIB + 7, data_bytes=4 * MIB, seed=5)
    by_file = up.ok("app", "put", "train-1", str(payload))
    by_pipe = up.ok("app", "put", "train-1", "-", stdin=payload.read_bytes())
    empty = up.ok("app", "put", "train-1", "-", stdin=b"")
    assert len({by_file, by_pipe, empty}) == 3

    out = tmp_path / "out.bin"
    up.ok("app", "get", by_file, "-o", str(out))
    assert out.read_bytes() == payload.read_bytes()
    assert up.run("app", "get", by_pipe).stdout == payload.read_bytes()
    assert up.run("app", "get", empty).stdout == b""
    listed = up.ok("app", "list", "train-1", "--json")
    json.loads(listed)
    assert all(one in listed for one in (by_file, by_pipe, empty))
    up.ok("app", "forget", empty)
    assert up.run("app", "get", empty).returncode == 3
    assert empty not in up.ok("app", "list", "train-1")


def test_queries_speak_json(up: Up) -> None:
    for arguments in (("vm", "list"), ("stats",), ("status",), ("nodes",), ("layout", "show")):
        json.loads(up.ok(*arguments, "--json"))
        assert up.ok(*arguments), arguments
    nodes = up.ok("nodes", "--json")
    assert all(f"node-{n}" in nodes for n in (1, 2, 3))


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("snapshot", "no-such-vm"), 3),
        (("points", "no-such-vm"), 3),
        (("show", "snap-aaaaaaaaaaaaaaaaaaaaaaaaaa"), 3),
        (("verify", "nothing"), 3),
        (("restore", "nothing", "--to", "TARGET"), 3),
        (("app", "get", "app-aaaaaaaaaaaaaaaaaaaaaaaaaa"), 3),
        (("app", "get", "../../etc/passwd"), 2),
        (("vm", "register", "a/b", "--volume", "root=/dev/zero"), 2),
        (("vm", "register", "x" * 500, "--volume", "root=/tmp/x"), 2),
        (("vm", "register", "", "--volume", "root=/tmp/x"), 2),
        (("vm", "register", "no-volumes"), 2),
        (("no-such-command",), 2),
        (("snapshot",), 2),
    ],
)
def test_bad_calls_end_with_their_code_and_one_plain_line(
    up: Up, tmp_path: Path, arguments: tuple[str, ...], code: int
) -> None:
    target = tmp_path / "target"
    done = up.run(*(str(target) if word == "TARGET" else word for word in arguments))
    message = done.stderr.decode()
    assert done.returncode == code, message
    assert done.stdout == b""
    assert message.strip()
    assert "Traceback" not in message
    assert not target.exists()


def test_refusals_on_a_real_vm(up: Up, tmp_path: Path) -> None:
    disks = {name: tmp_path / f"{name}.raw" for name in ("one", "two")}
    for seed, (name, path) in enumerate(disks.items()):
        make_image(path, size_bytes=2 * MIB, data_bytes=MIB, seed=seed)
        up.ok("vm", "register", name, "--volume", f"root={path}")
    one, two = up.ok("snapshot", "one"), up.ok("snapshot", "two")
    assert up.run("backup", "one", two).returncode == 4
    backup_two = up.ok("backup", "two", two)
    assert up.run("restore", one, backup_two, "--to", str(tmp_path / "mixed")).returncode == 4
    assert not (tmp_path / "mixed").exists()

    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "precious").write_text("keep me")
    refused = up.run("restore", one, "--to", str(occupied))
    assert refused.returncode == 4
    assert {p.name for p in occupied.iterdir()} == {"precious"}

    clash = up.run("vm", "register", "one", "--volume", f"root={disks['two']}")
    assert clash.returncode == 4

    before = up.ok("points", "one", "--json")
    disks["one"].unlink()
    missing = up.run("snapshot", "one")
    assert missing.returncode == 1
    assert str(disks["one"]) in missing.stderr.decode()
    assert up.ok("points", "one", "--json") == before, "a failed snapshot leaves nothing behind"
    up.ok("forget", one)
    assert up.run("backup", "one", one).returncode == 4, "no living parent"


def test_no_coordinator_is_unavailable() -> None:
    done = run("status", "--coordinator", "127.0.0.1:1")
    assert done.returncode == 5
    assert "Traceback" not in done.stderr.decode()
    assert "127.0.0.1:1" in done.stderr.decode()
