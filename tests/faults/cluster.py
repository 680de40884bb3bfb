"""A cluster of processes that faults are done to: coordinators over etcd, and storage nodes on directories."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from holdfast import StateManager
from tests.e2e.harness import eventually
from tests.e2e.services import Service, Tokens
from tests.support.etcd import EtcdCluster

PARTITIONS = 64
REPLICAS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How quickly a cluster reacts; all of it is options that operators have too.

    Attributes:
        out_after_s: seconds until the steward leaves a node out that is down.
        compare_every_s: seconds between rounds in which nodes compare what they hold.
        scrub_days: days in which a node reads all that it has.
    """

    out_after_s: float = 600.0
    compare_every_s: float = 3.0
    scrub_days: float = 14.0


@dataclass(slots=True)
class FaultCluster:
    """Processes by name, and how to reach and replace them."""

    folder: Path
    etcd: EtcdCluster
    tokens: Tokens
    timing: Timing
    stack: ExitStack
    coordinators: list[Service] = field(default_factory=list)
    nodes: dict[str, Service] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """HOST:PORT of every coordinator."""
        return ",".join(service.address for service in self.coordinators)

    def directory(self, name: str) -> Path:
        """Return where a service keeps its data."""
        return self.folder / name

    def manager(self) -> StateManager:
        """Return a manager of an administrator; whoever asks closes it."""
        return StateManager(self.address, token_file=self.tokens.admin)

    def add_coordinators(self, count: int, *, nodes: int) -> None:
        """Start coordinators side by side, which make the cluster if it is new."""
        key = self.folder / "master.key"
        key.write_bytes(secrets.token_bytes(32))
        key.chmod(0o600)
        made = [
            Service(
                f"coordinator-{number}",
                (
                    "coordinator",
                    "--etcd", ",".join(self.etcd.endpoints),
                    "--master-key", str(key),
                    "--nodes", str(nodes),
                    "--replicas", str(REPLICAS),
                    "--partitions", str(PARTITIONS),
                    "--out-after", str(self.timing.out_after_s),
                    "--collect-every", "0",
                    *self.tokens.coordinator_options,
                ),
                self.folder / f"coordinator-{number}.log",
            )
            for number in range(1, count + 1)
        ]  # fmt: skip
        self._start(made)
        self.coordinators = made

    def add_nodes(self, names: Sequence[str], *, options: Mapping[str, Sequence[str]] | None = None) -> None:
        """Start nodes side by side, each in a zone of its own; `options` are further ones by name."""
        made = [
            Service(
                name,
                (
                    "storagenode",
                    "--data", str(self.directory(name)),
                    "--coordinator", self.address,
                    "--node-id", name,
                    "--zone", f"zone-{name}",
                    "--compare-every", str(self.timing.compare_every_s),
                    "--scrub-days", str(self.timing.scrub_days),
                    "--repair-gentleness", "0",
                    *self.tokens.node_options,
                    *(options or {}).get(name, ()),
                ),
                self.folder / f"{name}.log",
            )
            for name in names
        ]  # fmt: skip
        self._start(made)
        self.nodes |= {service.name: service for service in made}

    def lose_node(self, name: str) -> None:
        """Kill a node and take its directory away for good."""
        self.nodes.pop(name).kill()
        shutil.rmtree(self.directory(name))

    def heal(self) -> None:
        """Start whatever does not run."""
        self.etcd.restart_all()
        for service in (*self.coordinators, *self.nodes.values()):
            if service.runs:
                service.resume()
            else:
                service.start()

    def _start(self, services: Sequence[Service]) -> None:
        for service in services:
            self.stack.callback(_end, service)
        with ThreadPoolExecutor(len(services)) as threads:
            list(threads.map(Service.start, services))


@contextmanager
def running(
    folder: Path,
    *,
    nodes: int = 4,
    coordinators: int = 2,
    timing: Timing | None = None,
    members: int = 3,
    options: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[FaultCluster]:
    """Run a cluster until the end of the block; it takes writes from the start. `options` as in `add_nodes`."""
    with ExitStack() as stack:
        etcd = stack.enter_context(EtcdCluster(members, folder))
        cluster = FaultCluster(folder, etcd, Tokens.make(folder), timing or Timing(), stack)
        cluster.add_coordinators(coordinators, nodes=nodes)
        cluster.add_nodes([f"node-{number}" for number in range(1, nodes + 1)], options=options)
        with cluster.manager() as manager:
            eventually(lambda: manager.cluster_status().writable, "the cluster takes writes")
        yield cluster


def _end(service: Service) -> None:
    if service.runs:
        service.kill()
