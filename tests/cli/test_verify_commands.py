"""`holdfast verify` and `restore --partial`: what is printed of damage, and the exit codes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.cli.exits import DAMAGED, UNAVAILABLE, USAGE
from holdfast.testing import MemoryCluster
from tests.cli.test_retention_commands import Shell
from tests.client.rig import BLOCK, TENANT, data_ids, noise, store_of

MIB = 1 << 20


@pytest.fixture
def cluster() -> Iterator[MemoryCluster]:
    with MemoryCluster() as running:
        yield running


@pytest.fixture
def shell(cluster: MemoryCluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.setenv("HOLDFAST_COORDINATOR", cluster.coordinator_address)
    monkeypatch.setenv("HOLDFAST_TOKEN", cluster.token)
    return Shell(capsys)


@pytest.fixture
def point(shell: Shell, tmp_path: Path) -> str:
    """A snapshot of a disk of 1 MiB."""
    disk = tmp_path / "web.raw"
    disk.write_bytes(noise(MIB, 1))
    shell("vm", "register", "web", "--volume", f"root={disk}")
    return shell("snapshot", "web")


def test_what_is_whole_says_so(shell: Shell, point: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.write_bytes(noise(MIB, 2))
    stored = shell("app", "put", "task", str(data))
    assert shell("verify", point) == f"{point} is whole: 16 blocks checked"
    assert shell("verify", stored).startswith(f"{stored} is whole: ")
    assert shell("verify", "--all").startswith("1 points and 1 pieces of application data checked: ")
    assert shell.json("verify", "--all", "--on-nodes")["damaged"] == []
    assert shell("verify", code=USAGE)
    assert shell("verify", point, "--all", code=USAGE)


@pytest.mark.slow
def test_damage_is_a_table_a_sentence_and_an_exit_code(
    shell: Shell, cluster: MemoryCluster, point: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = data_ids(cluster, 0)[4]
    for number in range(3):
        store_of(cluster, number).delete(TENANT, [lost])
    assert shell("verify", point, code=DAMAGED).endswith("64 KiB in 1 range lost")
    (told,) = shell.json_of_failure("verify", point, code=DAMAGED)["damage"]
    assert (told["volume"], told["length"], told["reason"], told["block_ids"]) == (
        *("root", BLOCK, "missing"),
        [lost.hex()],
    )
    everything = shell.json_of_failure("verify", "--all", code=DAMAGED)
    assert (everything["damaged_points"], everything["damaged"][0]["resource_id"]) == (1, point)
    plain, partial = tmp_path / "plain", tmp_path / "partial"
    shell("restore", point, "--to", str(plain), code=DAMAGED)
    assert not plain.exists()
    out, err = shell.both("restore", point, "--to", str(partial), "--partial", code=DAMAGED)
    assert out == str(partial)
    assert "64 KiB in 1 range lost are not there and left as zeros" in err
    assert str(partial / "damage.json") in err
    content = bytearray((tmp_path / "web.raw").read_bytes())
    content[told["offset"] : told["offset"] + BLOCK] = bytes(BLOCK)
    assert (partial / "root.raw").read_bytes() == bytes(content)
    assert json.loads((partial / "damage.json").read_text())["volumes"][0]["damaged"][0]["offset"] == told["offset"]
    assert "damaged bytes: " in shell("restore", point, "--to", str(plain), code=DAMAGED)


def test_what_may_come_back_is_unavailable_and_not_damaged(shell: Shell, cluster: MemoryCluster, point: str) -> None:
    away = data_ids(cluster, 0)[4]
    for number in range(2):
        store_of(cluster, number).delete(TENANT, [away])
    cluster.stop_node(2)
    assert shell("verify", point, code=UNAVAILABLE).endswith("64 KiB in 1 range not reachable now")
    (told,) = shell.json_of_failure("verify", point, code=UNAVAILABLE)["damage"]
    assert told["reason"] == "unreachable"
