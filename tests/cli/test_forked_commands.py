"""Commands that are forked from a loaded process do what commands that are started afresh do."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.e2e.harness import COMMAND, environment, eventually
from tests.support.commands import COMMANDS


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["status"], ["restore"], ["nonsense"], ["pki", "init", "--help"], ["app", "put", "-"]],
    ids=" ".join,
)
def test_output_and_exit_code_are_the_same(arguments: list[str], tmp_path: Path) -> None:
    ours = {**environment(), "COLUMNS": "80"}
    afresh = subprocess.run([*COMMAND, *arguments], input=b"x", capture_output=True, env=ours, timeout=60, check=False)
    forked = COMMANDS.run(arguments, stdin=b"x", environment=ours, timeout_s=60)
    assert (forked.returncode, forked.stdout, forked.stderr) == (afresh.returncode, afresh.stdout, afresh.stderr)


@pytest.mark.slow
def test_each_has_its_own_environment_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = COMMANDS
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        done = server.run(["pki", "init", "authority"], stdin=None, environment=environment(), timeout_s=60)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / name / "authority").is_dir()
    missing = server.run(["status"], stdin=None, environment=environment(), timeout_s=60)
    assert b"which cluster" in missing.stderr
    away = {**environment(), "HOLDFAST_COORDINATOR": "127.0.0.1:1"}
    assert b"127.0.0.1:1" in server.run(["status"], stdin=None, environment=away, timeout_s=60).stderr


@pytest.mark.slow
def test_one_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    waiting = ["storagenode", "--coordinator", "127.0.0.1:1", "--data", "data", "--bind", "127.0.0.1:0"]
    with pytest.raises(subprocess.TimeoutExpired):
        COMMANDS.run(waiting, stdin=None, environment=environment(), timeout_s=3)
    eventually(lambda: not _processes_in(tmp_path), "the end of the command")


def _processes_in(folder: Path) -> list[int]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and Path(process.cwd()) == folder:
                found.append(process.pid)
    return found
