"""The tokens of `holdfast up`: whoever started it is let in without a word, and nobody else."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast import ErrorCode, HoldfastError, StateManager
from holdfast_core.runtime.credentials import parse_token
from tests.e2e.harness import Up, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own."""
    folder = tmp_path / "home"
    monkeypatch.setenv("HOLDFAST_HOME", str(folder))
    return folder


@pytest.fixture
def up(tmp_path: Path, home: Path) -> Iterator[Up]:
    cluster = Up(tmp_path / "data", ["--nodes", "1"])
    yield cluster
    if cluster.process is not None and cluster.process.poll() is None:
        cluster.kill()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_its_user_finds_the_token_and_it_goes_with_the_cluster(up: Up, home: Path) -> None:
    up.start()
    kept = home / "tokens" / up.address
    token = (up.data / "admin.token").read_text()
    parse_token(token.strip())
    assert kept.read_text() == token
    assert [mode(path) for path in (kept, up.data / "admin.token", up.data / "node.token")] == [0o600] * 3
    assert (mode(home), mode(kept.parent)) == (0o700, 0o700)
    assert token.strip() not in "".join(up.stderr)

    assert up.ok("vm", "list", "--json") == "[]"
    assert run("vm", "list", "--coordinator", up.address.replace("127.0.0.1", "localhost")).returncode == 0
    with StateManager(up.address) as manager:
        assert manager.list_vms() == []

    assert up.stop() == 0
    assert not list(kept.parent.iterdir())
    up.start()
    assert (up.data / "admin.token").read_text() != token
    (up.data / "old").write_text(token)
    assert up.run("vm", "list").returncode == 0
    refused = up.run("vm", "list", "--token-file", str(up.data / "old"))
    assert (refused.returncode, b"not known" in refused.stderr) == (7, True)
    assert up.stop() == 0


def test_another_user_of_the_machine_is_not_let_in(up: Up, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    up.start()
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "stranger"))
    refused = up.run("vm", "list")
    assert (refused.returncode, refused.stdout) == (7, b"")
    assert b"--token-file" in refused.stderr
    with StateManager(up.address) as manager, pytest.raises(HoldfastError) as caught:
        manager.list_vms()
    assert caught.value.code is ErrorCode.UNAUTHENTICATED
    assert up.run("health", up.address).returncode == 0

    admin, node = up.data / "admin.token", up.data / "node.token"
    assert up.ok("vm", "list", "--token-file", str(admin), "--json") == "[]"
    assert up.run("--token-file", str(admin), "vm", "list").returncode == 0
    denied = up.run("vm", "list", "--token-file", str(node))
    assert (denied.returncode, denied.stdout) == (7, b"")
    monkeypatch.setenv("HOLDFAST_TOKEN_FILE", str(admin))
    with StateManager(up.address) as manager:
        assert manager.list_vms() == []


def test_a_home_that_cannot_be_written_is_told(up: Up, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path / "file"))
    up.start()
    admin = str(up.data / "admin.token")
    assert any(f"use: --token-file {admin}" in line for line in up.stderr)
    assert up.run("vm", "list").returncode == 7
    assert up.ok("vm", "list", "--token-file", admin, "--json") == "[]"
    assert up.stop() == 0


def test_a_token_that_another_cluster_put_there_stays(up: Up, home: Path) -> None:
    up.start()
    kept = home / "tokens" / up.address
    kept.write_text("another's")
    assert up.stop() == 0
    assert kept.read_text() == "another's"
    assert os.listdir(kept.parent) == [up.address]
