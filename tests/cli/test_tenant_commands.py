"""`holdfast tenant` and what `holdfast stats` says of nodes, against a cluster in memory."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.cli import main
from holdfast.testing import MemoryCluster
from holdfast_core.runtime.credentials import write_token

NO_BOUND = {"bytes": 0, "objects": 0, "vms": 0}


@pytest.fixture(scope="module")
def cluster() -> Iterator[MemoryCluster]:
    """A cluster of four nodes that keeps two copies."""
    with MemoryCluster(nodes=4, replicas=2) as cluster:
        yield cluster


class Command:
    """Runs `holdfast` in this process as the cluster's administrator."""

    def __init__(self, cluster: MemoryCluster, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        token = folder / "token"
        write_token(token, cluster.token)
        self._shared = ["--coordinator", cluster.coordinator_address, "--token-file", str(token)]
        self._capsys = capsys

    def __call__(self, *arguments: str, code: int = 0) -> str:
        """Return what a command prints: on stdout, or on stderr where it is to fail."""
        assert main.run([*self._shared, *arguments]) == code
        captured = self._capsys.readouterr()
        return captured.err if code else captured.out

    def json(self, *arguments: str) -> Any:
        """Return what a command prints for programs."""
        return json.loads(self(*arguments, "--json"))


@pytest.fixture
def command(cluster: MemoryCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command, with the administrator's token."""
    return Command(cluster, tmp_path, capsys)


def test_tenants_are_made_bounded_and_listed(command: Command, tmp_path: Path) -> None:
    bounds = ("--bytes", "2GiB", "--objects", "1", "--vms", "1")
    for _ in range(2):
        assert command("tenant", "create", "acme", *bounds) == "acme\n"
    assert "another quota" in command("tenant", "create", "acme", "--bytes", "3GiB", code=4)
    data = tmp_path / "data"
    data.write_bytes(b"x" * 2048)
    stored = command("--tenant", "acme", "app", "put", "task", str(data)).strip()
    refused = command("--tenant", "acme", "app", "put", "task", str(data), code=4)
    assert "quota" in refused
    assert "1 objects" in refused
    facts = {tenant["name"]: tenant for tenant in command.json("tenant", "list")}
    number = facts["acme"]["number"]
    assert facts["acme"] == {
        "name": "acme",
        "number": number,
        "quota": {"bytes": 2 << 30, "objects": 1, "vms": 1},
        "own_data_key": False,
        "usage": {"bytes": 2048, "objects": 1, "vms": 0},
    }
    lines = command("tenant", "list").splitlines()
    assert lines[0].split() == ["NAME", "NUMBER", "BYTES", "OBJECTS", "VMS", "DATA", "KEY"]
    row = next(line for line in lines if line.startswith("acme"))
    assert row.split() == f"acme {number} 2 KiB of 2 GiB 1 of 1 0 of 1 with the cluster".split()
    assert command("tenant", "quota", "acme", "--objects", "2") == "acme\n"
    # All three bounds at once: those that are not named are gone.
    changed = command.json("tenant", "quota", "acme", "--objects", "2")
    assert changed["quota"] == {**NO_BOUND, "objects": 2}
    command("--tenant", "acme", "app", "put", "task", str(data))
    # What is in one tenant is not in another.
    assert stored in command("--tenant", "acme", "app", "list", "task")
    assert stored not in command("app", "list", "task")
    assert command("app", "get", stored, "-o", str(tmp_path / "out"), code=3)
    command("--tenant", "acme", "app", "get", stored, "-o", str(tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == data.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["tenant", "quota", "nobody"], 3),
        (["tenant", "create", "a/b"], 2),
        (["tenant", "create", "x", "--bytes", "much"], 2),
        (["tenant", "create", "x", "--vms", "-1"], 2),
        (["--tenant", "nobody", "vm", "list"], 3),
    ],
)
def test_what_cannot_be_done_says_so_and_makes_nothing(command: Command, arguments: list[str], code: int) -> None:
    before = command.json("tenant", "list")
    assert command(*arguments, code=code)
    assert command.json("tenant", "list") == before


def test_a_tenant_may_keep_its_data_key(command: Command) -> None:
    command("tenant", "create", "sealed", "--own-data-key")
    row = next(line for line in command("tenant", "list").splitlines() if line.startswith("sealed"))
    assert row.endswith("its own")


def test_stats_say_that_no_node_holds_all(command: Command, tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(random.Random(1).randbytes(4 << 20))
    command("vm", "register", "web", "--volume", f"root={disk}")
    assert "NODE" not in command("stats", "web")  # nothing is kept yet
    command("snapshot", "web")
    facts = command.json("stats", "web")
    shares = facts["shares"]
    assert [share["node_id"] for share in shares] == ["node-1", "node-2", "node-3", "node-4"]
    assert sum(share["blocks"] for share in shares) == 2 * facts["share_blocks"]
    assert sum(share["bytes"] for share in shares) == 2 * facts["exclusive_bytes"]
    lines = command("stats", "web").splitlines()
    header = next(at for at, line in enumerate(lines) if line.startswith("NODE"))
    assert lines[header].split() == ["NODE", "ZONE", "BLOCKS", "BYTES", "SHARE"]
    for share, line in zip(shares, lines[header + 1 : -1], strict=True):
        percent = share["blocks"] * 100 // facts["share_blocks"]
        assert line.split()[:3] == [share["node_id"], share["zone"], str(share["blocks"])]
        assert line.split()[-1] == f"{percent}%"
        assert percent < 100
    assert lines[-1] == "no node holds all of it"


def test_stats_of_as_many_replicas_as_nodes_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MemoryCluster(nodes=1, replicas=1) as cluster:
        command = Command(cluster, tmp_path, capsys)
        (tmp_path / "data").write_bytes(b"x" * 1000)
        command("app", "put", "task", str(tmp_path / "data"))
        assert command("stats").splitlines()[-1] == "node-1 holds all of it: as many replicas as nodes"
