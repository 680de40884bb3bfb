"""`holdfast agent` as a process: over its socket, over TLS, by reflection, and how it ends."""

from __future__ import annotations

import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from holdfast import ErrorCode
from holdfast.agent.client import HostAgent
from holdfast_core.runtime.options import TlsFiles
from tests.client.rig import error_of
from tests.e2e.harness import COMMAND, Up, environment, run
from tests.e2e.images import MIB, digest, make_image
from tests.e2e.test_mtls_cluster import certificate, tls_files

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    cluster = Up(tmp_path_factory.mktemp("up") / "data", ["--nodes", "1"]).start()
    yield cluster
    assert cluster.stop() == 0


Start = Callable[..., str]


@pytest.fixture
def start(up: Up) -> Iterator[Start]:
    """Start an agent; returns its address. All are ended by SIGTERM, and have to end well."""
    running: list[subprocess.Popen[str]] = []

    def begin(*options: str) -> str:
        process = subprocess.Popen(
            [*COMMAND, "agent", "--coordinator", up.address, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment(),
        )
        running.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready agent="), f"it ended with {process.poll()}"
        return line.removeprefix("ready agent=").strip()

    yield begin
    codes = []
    for process in running:
        process.send_signal(signal.SIGTERM)
        codes.append(process.wait(timeout=30))
    assert set(codes) <= {0}


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    make_image(path, size_bytes=16 * MIB, data_bytes=2 * MIB, seed=71)
    return path


def test_another_language_without_a_stub(start: Start, disk: Path, tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    address = start("--listen", f"unix:{path}")
    assert address == f"unix:{path}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600, "nobody but its owner may call"
    example = ROOT / "examples" / "reflection_client.py"
    done = subprocess.run(
        [sys.executable, str(example), address, str(disk), str(tmp_path / "restored")],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "holds b'what the task made'" in done.stdout.splitlines()[-1]
    assert any("send:" in line for line in done.stdout.splitlines()), "progress is streamed"
    assert digest(tmp_path / "restored" / "root.raw") == digest(disk)
    assert run("health", address, "--service", "holdfast.agent.v1.StateManager").stdout == b"SERVING\n"
    second = run("agent", "--listen", address, "--coordinator", "127.0.0.1:1")
    assert second.returncode == 4
    assert b"another program listens" in second.stderr


def test_over_tls_whom_it_was_told_of(start: Start, disk: Path, tmp_path: Path) -> None:
    authority = tmp_path / "pki"
    assert run("pki", "init", str(authority)).returncode == 0
    server = certificate(authority, "host-1", "agent")
    files: dict[str, TlsFiles] = {name: tls_files(certificate(authority, name, "client")) for name in ("loop", "other")}
    address = start(
        *("--listen", "127.0.0.1:0", "--below", str(tmp_path), "--allow", "spiffe://holdfast/client/loop"),
        *("--agent-tls-ca", f"{server}/ca.pem", "--agent-tls-cert", f"{server}/cert.pem"),
        *("--agent-tls-key", f"{server}/key.pem"),
    )
    with HostAgent(address, tls=files["loop"]) as agent:
        agent.register_vm("by-tls", {"root": str(disk)})
        assert agent.create_snapshot("by-tls").startswith("snap-")
        assert error_of(lambda: agent.register_vm("x", {"root": "/etc/passwd"})).code is ErrorCode.DENIED
    with HostAgent(address, tls=files["other"]) as agent:
        error = error_of(lambda: agent.create_snapshot("by-tls"))
        assert error.code is ErrorCode.DENIED
        assert "does not serve spiffe://holdfast/client/other" in error.message
    with HostAgent(address) as agent:
        assert error_of(lambda: agent.create_snapshot("by-tls")).code is ErrorCode.UNREACHABLE


def test_an_orchestrators_loop(up: Up) -> None:
    variables = {**environment(), "HOLDFAST_COORDINATOR": up.address}
    example = ROOT / "examples" / "orchestrator.py"
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, timeout=100, env=variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "all kept"


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "0.0.0.0:0"])
def test_plain_text_over_tcp_is_refused(listen: str) -> None:
    done = run("agent", "--listen", listen, "--coordinator", "127.0.0.1:1")
    assert done.returncode == 2
    assert b"reached by other users" in done.stderr
