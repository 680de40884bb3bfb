"""How the command ends: exit codes by kind of error, one plain line, never a traceback."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from holdfast.cli import main, vms
from holdfast.cli.exits import EXIT_BY_CODE, exit_code, say
from holdfast_core.model.errors import ErrorCode, HoldfastError
from tests.e2e.harness import COMMAND, run

PROMISED = {
    1: "SOURCE_UNREADABLE TARGET_UNWRITABLE CANCELLED INTERNAL",
    2: "INVALID_ARGUMENT LIMIT_EXCEEDED",
    3: "NOT_FOUND",
    4: "ALREADY_EXISTS MISMATCH NO_PARENT BUSY SESSION_LAPSED CONFLICT TARGET_EXISTS VOLUME_CHANGED WRONG_EPOCH"
    " QUOTA_EXCEEDED",
    5: "UNREACHABLE NO_QUORUM NOT_READY DISK_FULL",
    6: "CORRUPT MISSING NOT_DURABLE",
    7: "UNAUTHENTICATED DENIED KEY_MISMATCH",
}


def test_every_code_has_the_exit_code_that_is_promised() -> None:
    promised = {ErrorCode[name]: code for code, names in PROMISED.items() for name in names.split()}
    assert dict(EXIT_BY_CODE) == promised
    assert set(promised) == set(ErrorCode)
    assert exit_code(HoldfastError(ErrorCode.DENIED, "no")) == 7


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    say("first\nsecond   third\n")
    assert capsys.readouterr().err == "holdfast: first second third\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["snapshot"], "Missing argument 'VM'"),
        (["vm"], "Missing command"),
        (["vm", "register", "web"], "Missing option '--volume'"),
        (["nothing"], "No such command 'nothing'"),
        (["status", "--nothing"], "No such option: --nothing"),
        (["up", "--nodes", "0"], "--nodes"),
        (["up", "--nodes", "x"], "--nodes"),
        (["status"], "give --coordinator HOST:PORT or set HOLDFAST_COORDINATOR"),
        (["status", "--coordinator", "nowhere"], "is not an address"),
        (["status", "--coordinator", "192.0.2.1:7400"], "give the TLS files"),
        (["status", "--coordinator", "127.0.0.1:1", "--tls-ca", "x"], "TLS takes three files"),
        (["layout", "apply", "--epoch", "-1"], "--epoch"),
    ],
)
def test_usage_errors_end_with_2(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    assert main.run(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("holdfast: ")
    assert printed.err.count("\n") == 1
    assert says in printed.err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"], ["vm", "register", "--help"], ["up", "--help"], ["demo", "--help"]):
        assert main.run(arguments) == 0
        assert "Usage: holdfast" in capsys.readouterr().out
    assert main.run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("holdfast ")


def test_a_fault_is_one_line_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("what nobody expected")

    monkeypatch.setattr(vms, "parse_volumes", broken)
    register = ["vm", "register", "web", "--volume", "root=x"]
    assert main.run(register) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("holdfast: a fault of Holdfast: ZeroDivisionError: what nobody expected")
    monkeypatch.setenv("HOLDFAST_TRACEBACK", "1")
    assert main.run(register) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(vms, "parse_volumes", interrupted)
    assert main.run(["vm", "register", "web", "--volume", "root=x"]) == 130
    assert capsys.readouterr().err == "holdfast: interrupted\n"


@pytest.mark.slow
def test_services_have_help_of_their_own() -> None:
    for name, option in (("coordinator", "--etcd"), ("storagenode", "--coordinator")):
        done = run(name, "--help")
        assert done.returncode == 0
        assert option in done.stdout.decode()
        wrong = run(name, "--no-such-option")
        assert wrong.returncode == 2
        assert b"Traceback" not in wrong.stderr


def test_health_of_nobody_is_unavailable() -> None:
    done = run("health", "127.0.0.1:1")
    assert done.returncode == 5
    assert "127.0.0.1:1 cannot be reached" in done.stderr.decode()


def test_starting_is_quick_because_nothing_heavy_is_loaded() -> None:
    """What `--help` needs not: gRPC, codecs and rich would triple the time of every mistyped command."""
    probe = "import sys; from holdfast.cli import main; main.run(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert not {"grpc", "rich", "zstandard", "cryptography", "structlog"} & set(done.stderr.split())


@pytest.mark.parametrize("service", ["coordinator", "storagenode"])
def test_a_service_starts_without_the_other_commands_and_looks_for_garbage_in_what_it_makes(service: str) -> None:
    probe = (
        "import gc, sys; from holdfast.cli import main\n"
        f"assert main.run([{service!r}, '--help']) == 0\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 10_000, *sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    collecting, frozen, *loaded = done.stderr.split()
    assert (collecting, frozen) == ("True", "True")
    assert not {"holdfast.cli.app", "holdfast.cli.points"} & set(loaded)
    assert f"holdfast_{service}.main" in loaded


def test_who_saves_does_not_wait_for_what_others_need() -> None:
    """An incremental backup takes little longer than the SDK takes to load: each of these is some hundredths of it."""
    probe = "import sys; from holdfast import StateManager; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    others = {"cluster", "collection", "content", "findings", "lifecycle", "objects", "reading", "retention", "serving"}
    loaded = set(done.stdout.split())
    assert "holdfast.writing" in loaded
    assert not {f"holdfast.{name}" for name in others} & loaded
    assert not {"holdfast_core.model.layout.plan", "holdfast_proto.v1.collection_pb2", "rich"} & loaded


def test_a_reader_that_goes_away_is_no_fault() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*COMMAND, "--help"], stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert b"Traceback" not in done.stderr
    assert b"fault" not in done.stderr


@pytest.mark.slow
def test_help_fits_a_terminal() -> None:
    ours, theirs = pty.openpty()
    done = subprocess.run([*COMMAND, "--help"], stdout=theirs, stderr=subprocess.PIPE, check=False)
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert done.returncode == 0
    assert max(map(len, shown.splitlines())) <= 100
