"""The cluster of compose.yaml as plain processes: its commands, its variables, its certificates, on loopback.

No container engine is needed to see whether what the file says makes a working cluster. Host names and folders of
containers are replaced by ports and folders of this machine; everything else is taken as it stands.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.e2e.harness import COMMAND, eventually
from tests.e2e.images import MIB, change_image, digest, make_image
from tests.meta.tree import ROOT
from tests.support.etcd import find_program, free_ports

pytestmark = pytest.mark.slow

SERVICES: Final = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text(encoding="utf-8"))["services"]
PROGRAMS: Final = {"etcd": [], "coordinator": [*COMMAND, "coordinator"], "node": [*COMMAND, "storagenode"]}
PORTS: Final = {"etcd": (2379, 2380), "coordinator": (7400, 9400), "node": (7410, 9500)}


class Composed:
    """The processes of the composed cluster, and where each of its ports is on this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.names = [name for name in SERVICES if name.rpartition("-")[0] in PORTS]
        places = [(name, port) for name in self.names for port in PORTS[name.rpartition("-")[0]]]
        self.ports = dict(zip(places, free_ports(len(places)), strict=True))

    def here(self, text: str, service: str) -> str:
        """A text of compose.yaml with this machine's ports and folders in it."""

        def port(match: re.Match[str]) -> str:
            host = service if match.group(1) in {"0.0.0.0", "localhost"} else match.group(1)
            shown = "localhost" if match.group(1) == "localhost" else "127.0.0.1"
            return f"{shown}:{self.ports[host, int(match.group(2))]}"

        text = re.sub(r"\b(0\.0\.0\.0|localhost|(?:etcd|coordinator|node)-\d):(\d+)", port, text)
        text = text.replace("/run/tls", str(self._folder / "secrets/tls" / service))
        text = text.replace("/run/secrets/master_key", str(self._folder / "secrets/master.key"))
        return re.sub(r"/var/lib/(etcd|holdfast)", str(self._folder / service), text)

    def environment(self, service: str) -> dict[str, str]:
        """The variables of a service, and nothing of the caller's Holdfast."""
        own = {name: self.here(value, service) for name, value in SERVICES[service]["environment"].items()}
        return {**{name: value for name, value in os.environ.items() if not name.startswith("HOLDFAST_")}, **own}

    def start(self) -> None:
        """Start everything in the order of `depends_on`, each service once what it waits for is healthy."""
        for name in self.names:
            waits_for: dict[str, Any] = SERVICES[name].get("depends_on", {})
            for other in waits_for:
                eventually(lambda other=other: self.is_healthy(other), f"{other} is healthy", within_s=60)  # type: ignore[misc]
            kind = name.rpartition("-")[0]
            arguments = [self.here(word, name) for word in SERVICES[name].get("command", ())]
            with (self._folder / f"{name}.log").open("wb") as log:
                self._processes[name] = subprocess.Popen(
                    [*(PROGRAMS[kind] or [find_program("etcd")]), *arguments],
                    env=self.environment(name),
                    stdout=log,
                    stderr=log,
                )

    def is_healthy(self, name: str) -> bool:
        """What the service's health check says; a process that has ended is an error at once."""
        ended = self._processes[name].poll()
        assert ended is None, f"{name} ended with {ended}: {self.log_of(name)}"
        program, *arguments = (self.here(word, name) for word in SERVICES[name]["healthcheck"]["test"][1:])
        command = [*COMMAND] if program == "holdfast" else [find_program(program)]
        checked = subprocess.run(
            [*command, *arguments], env=self.environment(name), capture_output=True, check=False, timeout=30
        )
        return checked.returncode == 0

    def log_of(self, name: str) -> str:
        """The end of what a service wrote."""
        return (self._folder / f"{name}.log").read_text(errors="replace")[-2000:]

    def client(self, *arguments: str) -> str:
        """What the composed client prints for a command that has to succeed."""
        done = subprocess.run(
            [*COMMAND, *arguments],
            env=self.environment("client"),
            capture_output=True,
            text=True,
            check=False,
            timeout=90,
        )
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        return done.stdout.strip()

    def stop(self, name: str) -> int:
        """End a service as the engine does, and return its exit code."""
        self._processes[name].terminate()
        return self._processes.pop(name).wait(timeout=40)

    def close(self) -> None:
        """Kill what is left."""
        for process in self._processes.values():
            process.kill()
            process.wait(timeout=20)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Composed]:
    subprocess.run([ROOT / "deploy/make-secrets", tmp_path / "secrets"], check=True, capture_output=True, timeout=60)
    composed = Composed(tmp_path)
    try:
        composed.start()
        yield composed
    finally:
        composed.close()


@pytest.mark.timeout(180)
def test_what_compose_says_makes_a_cluster_that_works(cluster: Composed, tmp_path: Path) -> None:
    for name in cluster.names:
        eventually(lambda name=name: cluster.is_healthy(name), f"{name} is healthy", within_s=60)  # type: ignore[misc]
    eventually(lambda: json.loads(cluster.client("status", "--json"))["writable"], "the cluster is writable")
    nodes = cluster.client("nodes", "--json")
    assert all(f'"{zone}"' in nodes for zone in ("zone-a", "zone-b", "zone-c"))

    disk = tmp_path / "disk.raw"
    make_image(disk, size_bytes=8 * MIB + 100, data_bytes=2 * MIB, seed=3)
    cluster.client("vm", "register", "web-1", "--volume", f"root={disk}")
    snapshot = cluster.client("snapshot", "web-1")
    change_image(disk, edits=10, seed=4)
    backup = cluster.client("backup", "web-1", snapshot)

    # One of each kind is taken away, in good order; the others carry on.
    for name in ("etcd-1", "coordinator-1", "node-2"):
        code = cluster.stop(name)
        assert code == 0 or name.startswith("etcd"), cluster.log_of(name)
    cluster.client("restore", snapshot, backup, "--to", str(tmp_path / "again"))
    assert digest(tmp_path / "again/root.raw") == digest(disk)
    for name in ("coordinator-2", "node-1", "node-3", "node-4"):
        assert cluster.stop(name) == 0
