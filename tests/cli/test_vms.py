"""`holdfast vm`: what a VM carries, and its end."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast import KeepRule
from holdfast.cli.vms import parse_keep
from holdfast_core.model.errors import ErrorCode, HoldfastError
from tests.client.files.images import make_image as make_ext4
from tests.e2e.harness import Up
from tests.e2e.images import MIB, make_image


def test_patterns_of_one_task_are_one_rule() -> None:
    rules = parse_keep(
        ["train=**/*.safetensors", "logs=/var/log/**", "train=/out/a=b/**"],
        exclude=["train=**/optimizer*"],
        places=["train=data/2", "logs=root"],
        exclude_secrets=True,
    )
    train = KeepRule(
        name="train",
        task_id="train",
        include=["**/*.safetensors", "/out/a=b/**"],
        exclude=["**/optimizer*"],
        exclude_secrets=True,
        volume="data",
        partition=2,
    )
    logs = KeepRule(name="logs", task_id="logs", include=["/var/log/**"], exclude_secrets=True, volume="root")
    assert rules == [train, logs]


@pytest.mark.parametrize(
    ("keep", "exclude", "places", "secrets", "says"),
    [
        (["train"], [], [], False, "--keep 'train' is incomplete; write TASK=PATTERN"),
        (["train=x"], ["logs=y"], [], False, "--keep-exclude names the task 'logs', which no --keep names"),
        (["train=x"], [], ["logs=root"], False, "--keep-from names the task 'logs'"),
        (["train=x"], [], ["train=root/"], False, "--keep-from names the partition ''"),
        (["train=x"], [], ["train=root/one"], False, "--keep-from names the partition 'one'"),
        (["train=x"], [], ["train=a", "train=b"], False, "--keep-from is given twice for 'train'"),
        ([], [], [], True, "--keep-no-secrets is about what --keep names"),
    ],
)
def test_mistakes(keep: list[str], exclude: list[str], places: list[str], secrets: bool, says: str) -> None:
    with pytest.raises(HoldfastError) as caught:
        parse_keep(keep, exclude=exclude, places=places, exclude_secrets=secrets)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert says in caught.value.message


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    cluster = Up(tmp_path_factory.mktemp("up") / "data").start()
    yield cluster
    assert cluster.stop() == 0


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_vm_is_shown_with_what_it_carries_and_discarded_with_a_receipt(up: Up, tmp_path: Path) -> None:
    disk, definition = tmp_path / "disk.raw", tmp_path / "web.xml"
    make_image(disk, size_bytes=4 * MIB, data_bytes=MIB, seed=9)
    definition.write_bytes(b"<domain/>\n")
    options = ("--volume", f"root={disk}", "--label", "owner=team 7", "--label", "empty=")
    up.ok("vm", "register", "golden", "--volume", f"root={disk}")
    template = up.ok("snapshot", "golden")
    carried = ("--definition", str(definition), "--template", template)
    up.ok("vm", "register", "web", *options, *carried, "--keep", "train=/out/**", "--keep-from", "train=root/1")
    shown = up.ok("vm", "show", "web")
    for line in (
        "labels +empty= owner=team 7",
        r"definition +web\.xml \(10 B\)",
        f"template +{template}",
        "state +alive",
        f"volume root: {re.escape(str(disk))} in blocks of 64 KiB",
        "keep train for the task train: /out/\\*\\* of root/1",
    ):
        assert re.search(f"^{line}$", shown, re.MULTILINE), line
    facts = json.loads(up.ok("vm", "show", "web", "--json"))
    assert facts["labels"] == {"empty": "", "owner": "team 7"}
    assert bytes.fromhex(facts["definition"]) == b"<domain/>\n"
    snapshot = up.ok("snapshot", "web")
    assert re.search("^labels +empty= owner=team 7$", up.ok("show", snapshot), re.MULTILINE)
    target = tmp_path / "restored"
    up.ok("restore", snapshot, "--to", str(target))
    assert (target / "web.xml").read_bytes() == b"<domain/>\n"
    # What must be kept is not there: nothing goes.
    refused = up.run("vm", "discard", "web")
    assert refused.returncode != 0
    assert up.ok("points", "web").count(snapshot) == 1
    up.ok("vm", "register", "web", *options, "--replace")
    receipt = up.ok("vm", "discard", "web")
    assert re.search("^discarded +web$", receipt, re.MULTILINE)
    assert re.search(f"^newest +{snapshot}$", receipt, re.MULTILINE)
    again = json.loads(up.ok("vm", "discard", "web", "--json"))
    assert (again["vm_id"], again["point_count"], again["newest_point_id"]) == ("web", 1, snapshot)
    assert up.run("vm", "show", "web").returncode == 3
    assert up.run("vm", "discard", "nobody").returncode == 3


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_what_a_task_made_outlives_its_vm(up: Up, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name, data in (("out/weights.bin", b"w" * 100_000), ("out/scratch.tmp", b"s"), ("etc/hostname", b"web")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    disk = make_ext4(tmp_path / "disk.raw", source, size=16 * MIB)
    up.ok(
        "vm", "register", "job", "--volume", f"root={disk}", "--keep", "train=/out/**", "--keep-exclude", "train=*.tmp"
    )
    snapshot = up.ok("snapshot", "job")
    assert "keep train for the task train: /out/** of root, without *.tmp" in up.ok("vm", "show", "job")
    receipt = up.ok("vm", "discard", "job")
    told = re.search(
        r"^kept (app-\S+) for the task train: 2 entries, [^,]+, \d+ blocks durable$", receipt, re.MULTILINE
    )
    assert told, receipt
    facts = json.loads(up.ok("show", told[1], "--json"))
    assert (facts["form"], facts["origin"]["point_id"], facts["origin"]["keep_rule"]) == ("files", snapshot, "train")
    assert told[1] in up.ok("app", "list", "train")
    target = tmp_path / "retrieved"
    up.ok("files", "get", told[1], "--to", str(target))
    assert (target / "out" / "weights.bin").read_bytes() == b"w" * 100_000
    assert not (target / "out" / "scratch.tmp").exists()
    assert up.run("vm", "show", "job").returncode == 3
    assert up.run("show", snapshot).returncode == 3


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_definition_that_cannot_be_read(up: Up, tmp_path: Path) -> None:
    done = up.run("vm", "register", "x", "--volume", f"root={tmp_path}/d", "--definition", str(tmp_path / "none"))
    assert done.returncode == 1
    assert b"cannot be read" in done.stderr
