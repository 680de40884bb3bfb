"""Holdfast with security off, on, and on with TLS: each service a process of its own, started as `holdfast up` does."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, get_args

from benchmarks.contenders.base import Saved
from benchmarks.measure import CommandFailed, Measured, run_measured, stored_bytes, tree_cpu_s
from holdfast.cli.parent import PARENT_VARIABLE
from holdfast.pki import Issued, Kind, init_authority, issue
from holdfast_core.runtime.clock import SystemClock
from holdfast_core.runtime.credentials import Credential, new_token, write_token
from holdfast_core.runtime.endpoints import Endpoints
from holdfast_proto.v1.cluster_pb2 import GetClusterStatusRequest
from holdfast_proto.v1.cluster_pb2_grpc import ClusterServiceStub

Setting = Literal["off", "on", "tls"]
SETTINGS: Final[tuple[Setting, ...]] = get_args(Setting)
COPIES: Final = 3

_SERVICE: Final = (sys.executable, "-m", "holdfast.cli.main")
_LISTENING: Final = "listening "
_START_S: Final = 60.0
_STOP_S: Final = 60.0
_POLL_S: Final = 0.05


class Secured:
    """A cluster of three nodes that keeps every block on each of them.

    Args:
        setting: `off`: a coordinator that asks nobody who he is and keeps no log, plain text. `on`: the product over
            plain text on this machine, tokens. `tls`: the product with mutual TLS on all connections; certificates
            say who is who.
    """

    def __init__(self, setting: Setting) -> None:
        self.name: str = setting
        self.copies = COPIES
        self._setting = setting

    def open(self, folder: Path, disk: Path) -> None:
        """Start the cluster and register the disk as a VM."""
        self._folder = folder
        self._cluster = folder / "cluster"
        self._services: list[subprocess.Popen[bytes]] = []
        self._points: list[str] = []
        self._cluster.mkdir()
        self._make_credentials()
        try:
            self._coordinator = self._start_coordinator()
            for number in range(1, COPIES + 1):
                self._start_node(f"node-{number}")
            asyncio.run(self._until_ready())
            self._client(["register", str(disk), "default"])
        except (CommandFailed, RuntimeError):
            self.close()
            raise

    def save(self) -> Saved:
        """Make a snapshot, then backups of its line."""
        took, server_cpu_s, said = self._client(["save", *self._points[:1]])
        self._points.append(said["result"])
        return Saved(
            done_s=said["done_at"] - took.started_s,
            client=took,
            server_cpu_s=server_cpu_s,
            replicated_s=said["replicated_at"] - took.started_s,
            facts={name: float(count) for name, count in said["stats"].items()},
        )

    def stored_bytes(self) -> int:
        """Bytes of the cluster's folder: segments, indexes, metadata, all copies."""
        return stored_bytes(self._cluster)

    def close(self) -> None:
        """Stop the services in order, the coordinator first; one that does not end is killed."""
        for service in self._services:
            service.send_signal(signal.SIGTERM)
            try:
                service.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                service.kill()
                service.wait()
            if service.stdout is not None:
                service.stdout.close()

    def _make_credentials(self) -> None:
        self._issued: dict[str, Issued] = {}
        self._tokens: dict[str, Path] = {}
        if self._setting == "on":
            for principal in ("admin", "node"):
                self._tokens[principal] = self._folder / f"{principal}.token"
                write_token(self._tokens[principal], new_token(os.urandom))
        elif self._setting == "tls":
            authority, clock = self._folder / "pki", SystemClock()
            init_authority(authority, clock=clock)
            kinds = {f"node-{number}": Kind.NODE for number in range(1, COPIES + 1)}
            for name, kind in {"coordinator": Kind.COORDINATOR, "admin": Kind.ADMIN, **kinds}.items():
                self._issued[name] = issue(authority, name, kind=kind, clock=clock)

    def _start_coordinator(self) -> str:
        folder = self._cluster / "coordinator"
        if self._setting == "off":
            return self._start(
                "coordinator", [sys.executable, "-m", "benchmarks.open_coordinator", str(folder), str(COPIES)]
            )
        command = [*_SERVICE, "coordinator", "--data", str(folder), "--bind", "127.0.0.1:0"]
        command += ["--master-key", str(self._folder / "master.key"), "--create-master-key"]
        command += ["--nodes", str(COPIES), "--replicas", str(COPIES), *self._tls_options("coordinator")]
        for principal, path in self._tokens.items():
            command += [f"--{principal}-token-file", str(path)]
        return self._start("coordinator", command)

    def _start_node(self, name: str) -> None:
        command = [*_SERVICE, "storagenode", "--node-id", name, "--zone", name, "--coordinator", self._coordinator]
        command += ["--data", str(self._cluster / name), "--bind", "127.0.0.1:0", *self._tls_options(name)]
        if "node" in self._tokens:
            command += ["--token-file", str(self._tokens["node"])]
        self._start(name, command)

    def _tls_options(self, name: str) -> list[str]:
        if name not in self._issued:
            return []
        files = self._issued[name].files
        return ["--tls-ca", str(files.ca), "--tls-cert", str(files.cert), "--tls-key", str(files.key)]

    def _start(self, name: str, command: Sequence[str]) -> str:
        """Start a service and return the address that it says it listens on.

        Raises:
            RuntimeError: it ended instead, or said nothing in time.
        """
        with open(self._folder / f"{name}.log", "wb") as log:
            service = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, env=_environment()
            )
        self._services.append(service)
        out = service.stdout
        line = out.readline().decode() if out is not None and select.select([out], [], [], _START_S)[0] else ""
        if not line.startswith(_LISTENING):
            said = (self._folder / f"{name}.log").read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{name} did not start: {line}{said}")
        return line.removeprefix(_LISTENING).strip()

    async def _until_ready(self) -> None:
        admin = self._issued.get("admin")
        endpoints = Endpoints(
            [self._coordinator],
            tls=admin.files if admin else None,
            credential=Credential(token_file=self._tokens.get("admin")),
        )
        deadline_s = time.monotonic() + _START_S
        try:
            while time.monotonic() < deadline_s:
                status = await endpoints.call(
                    lambda channel: ClusterServiceStub(channel).GetClusterStatus, GetClusterStatusRequest()
                )
                if status.writable and sum(node.up for node in status.nodes) == COPIES:
                    return
                await asyncio.sleep(_POLL_S)
            raise RuntimeError(f"the cluster did not become ready: {status.state}")
        finally:
            await endpoints.close()

    def _client(self, arguments: list[str]) -> tuple[Measured, float, dict[str, Any]]:
        before = self._cpu_s()
        command = [sys.executable, "-m", "benchmarks.client"]
        if "admin" in self._issued:
            command += ["--tls", str(self._issued["admin"].folder)]
        if "admin" in self._tokens:
            command += ["--token-file", str(self._tokens["admin"])]
        took = run_measured([*command, self._coordinator, *arguments], scratch=self._folder)
        lines = took.output.splitlines()
        return took, self._cpu_s() - before, json.loads(lines[-1]) if lines else {}

    def _cpu_s(self) -> float:
        return sum(tree_cpu_s(service.pid) for service in self._services)


def _environment() -> dict[str, str]:
    """The caller's environment without settings of Holdfast; the services end if this process does."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HOLDFAST_")}
    return {**kept, PARENT_VARIABLE: str(os.getpid())}
