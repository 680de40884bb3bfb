"""`holdfast keys` against a cluster in memory: what it prints, what it changes, and what it makes without a cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.cli import main
from holdfast.key_file import read_key_file
from holdfast.testing import MemoryCluster
from holdfast_coordinator.master_key import read_master_key
from holdfast_core.model.keys import master_fingerprint
from holdfast_core.runtime.credentials import write_token


@pytest.fixture(scope="module")
def cluster() -> Iterator[MemoryCluster]:
    """A cluster of one node."""
    with MemoryCluster(nodes=1, replicas=1) as cluster:
        yield cluster


class Command:
    """Runs `holdfast` in this process against a cluster."""

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


@pytest.fixture
def command(cluster: MemoryCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command, with the administrator's token."""
    return Command(cluster, tmp_path, capsys)


def test_keys_are_listed_and_rotated(command: Command) -> None:
    before = json.loads(command("keys", "list", "--json"))
    newest = before["data_epochs"][-1]
    assert command("keys", "rotate") == f"data epoch {newest + 1}\n"
    assert command("keys", "rotate", "--structure").splitlines() == [f"data epoch {newest + 2}", "structure epoch 2"]
    signing, audit = command("keys", "rotate", "--signing").strip(), command("keys", "rotate", "--audit").strip()
    after = json.loads(command("keys", "list", "--json"))
    assert after["data_epochs"] == [*before["data_epochs"], newest + 1, newest + 2]
    keys = {key["key_id"]: key for key in after["signing_keys"]}
    assert (keys[signing]["purpose"], keys[signing]["signing"]) == ("capability", False)
    assert (keys[audit]["purpose"], keys[audit]["signing"]) == ("audit", True)
    stolen = json.loads(command("keys", "rotate", "--signing", "--retire-now", "--json"))
    text = command("keys", "list")
    assert stolen["key_id"] in text
    assert signing not in text
    assert audit in text
    assert before["master_fingerprint"] in text
    done = command("keys", "rewrap")
    assert done == f"0 secrets rewrapped by master key {before['master_fingerprint']}\n"


def test_who_trusts_the_first_key_of_the_log_comes_to_trust_the_next(command: Command, tmp_path: Path) -> None:
    keys = json.loads(command("keys", "list", "--json"))["signing_keys"]
    first = next(key["public_key"] for key in keys if key["purpose"] == "audit")
    command("keys", "rotate", "--audit")
    command("keys", "rotate", "--audit")
    command("vm", "list")
    export = tmp_path / "log.jsonl"
    command("audit", "export", "-o", str(export))
    assert "is right" in command("audit", "verify", str(export), "--key", first)
    heads = [json.loads(line) for line in export.read_text().splitlines() if '"type":"head"' in line]
    assert len({head["key_id"] for head in heads}) >= 3


def test_a_tenants_own_key_is_made_and_rotated_in_its_file(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "data.key"
    made = command("keys", "make-data", str(file)).strip()
    assert read_key_file(file).fingerprint.hex() == made
    command("tenant", "create", "own", "--own-data-key")
    shown = command("--tenant", "own", "keys", "list")
    assert "kept by the tenant itself" in shown
    refused = command("--tenant", "own", "keys", "rotate", code=2)
    assert "--key-file" in refused
    assert command("--tenant", "own", "--key-file", str(file), "keys", "rotate") == "data epoch 2\n"
    assert list(read_key_file(file).epochs) == [1, 2]
    both = json.loads(command("--tenant", "own", "--key-file", str(file), "keys", "rotate", "--structure", "--json"))
    assert both == {"data_epoch": 3, "structure_epoch": 2}
    missing = command("--key-file", str(tmp_path / "none"), "keys", "rotate", code=3)
    assert "there is no data key" in missing


def test_a_master_key_is_made_without_a_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "master.key"
    assert main.run(["keys", "make", str(file)]) == 0
    fingerprint = master_fingerprint(read_master_key(file)).hex()
    assert capsys.readouterr().out == f"{fingerprint}\n"
    assert main.run(["keys", "make", str(file)]) == 4
    assert "exists" in capsys.readouterr().err
    assert main.run(["keys", "make-data", str(tmp_path / "data.key"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fingerprint"]


@pytest.mark.parametrize(
    "options", [["--retire-now"], ["--signing", "--audit"], ["--audit", "--retire-now"], ["--signing", "--structure"]]
)
def test_options_that_contradict_one_another_change_nothing(command: Command, options: list[str]) -> None:
    before = command("keys", "list", "--json")
    command("keys", "rotate", *options, code=2)
    assert command("keys", "list", "--json") == before
