"""A cluster of processes that faults are done to: coordinators over etcd, and storage nodes on directories."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from holdfast import ErrorCode, StateManager
from tests.e2e.harness import eventually
from tests.e2e.services import Service, Tokens
from tests.faults.load import Load, let_go
from tests.support.etcd import EtcdCluster

PARTITIONS = 64
REPLICAS = 3
# Writers do not wait for copies that a fault holds up, so that there is something to heal.
REPLICA_WAIT_S = 0.3
# What a short failure made a node miss is found soon.
_COMPARE_EVERY_S = 3.0


class Place(Protocol):
    """Where services run, and how they and clients show who they are."""

    etcd_host: str

    def options(self, name: str, kind: str) -> Sequence[str]:
        """Return what a service of this kind, "coordinator" or "node", is told."""
        ...

    def bind(self, name: str) -> str:
        """Return HOST:PORT for a service to serve on."""
        ...

    def within(self, name: str) -> Sequence[str]:
        """Return the command that a service runs under; nothing for none."""
        ...

    def manager(self, address: str) -> StateManager:
        """Return a manager of an administrator."""
        ...


class Loopback:
    """This machine, and tokens."""

    etcd_host = "127.0.0.1"

    def __init__(self, folder: Path) -> None:
        """Make the tokens in a folder."""
        self._tokens = Tokens.make(folder)

    def options(self, name: str, kind: str) -> Sequence[str]:
        """See `Place`."""
        return self._tokens.coordinator_options if kind == "coordinator" else self._tokens.node_options

    def bind(self, name: str) -> str:
        """See `Place`."""
        return "127.0.0.1:0"

    def within(self, name: str) -> Sequence[str]:
        """See `Place`."""
        return ()

    def manager(self, address: str) -> StateManager:
        """See `Place`."""
        return StateManager(address, token_file=self._tokens.admin, replica_wait_s=REPLICA_WAIT_S)


@dataclass(slots=True)
class FaultCluster:
    """Processes by name, and how to reach and replace them."""

    folder: Path
    etcd: EtcdCluster
    place: Place
    stack: ExitStack
    coordinators: list[Service] = field(default_factory=list)
    nodes: dict[str, Service] = field(default_factory=dict)
    loads: list[Load] = field(default_factory=list)

    @property
    def address(self) -> str:
        """HOST:PORT of every coordinator."""
        return ",".join(service.address for service in self.coordinators)

    def directory(self, name: str) -> Path:
        """Return where a service keeps its data."""
        return self.folder / name

    def manager(self) -> StateManager:
        """Return a manager of an administrator; whoever asks closes it."""
        return self.place.manager(self.address)

    def load(
        self, folder: Path, *, seed: int, forgets: bool = False, excused: frozenset[ErrorCode] = frozenset()
    ) -> Load:
        """Return a writer (see `Load`) to this cluster, whose content `clear` takes away."""
        load = Load(self.manager, folder, seed=seed, forgets=forgets, excused=excused)
        self.loads.append(load)
        return load

    def clear(self) -> None:
        """Start whatever does not run, and forget what writers left, so that the next test has less to check."""
        self.heal()
        with self.manager() as manager:
            while self.loads:
                let_go(manager, self.loads.pop())

    def add_coordinators(self, count: int, *, nodes: int) -> None:
        """Start coordinators side by side, which make the cluster if it is new."""
        key = self.folder / "master.key"
        key.write_bytes(secrets.token_bytes(32))
        key.chmod(0o600)
        made = [
            self._service(
                f"coordinator-{number}",
                "coordinator",
                (
                    "coordinator",
                    "--etcd", ",".join(self.etcd.endpoints),
                    *_etcd_tls(self.etcd),
                    "--master-key", str(key),
                    "--nodes", str(nodes),
                    "--replicas", str(REPLICAS),
                    "--partitions", str(PARTITIONS),
                    "--collect-every", "0",
                ),
            )
            for number in range(1, count + 1)
        ]  # fmt: skip
        self._start(made)
        self.coordinators = made

    def add_nodes(self, names: Sequence[str], *, options: Mapping[str, Sequence[str]] | None = None) -> None:
        """Start nodes side by side, each in a zone of its own; `options` are further ones by name."""
        made = [
            self._service(
                name,
                "node",
                (
                    "storagenode",
                    "--data", str(self.directory(name)),
                    "--coordinator", self.address,
                    "--node-id", name,
                    "--zone", f"zone-{name}",
                    "--compare-every", str(_COMPARE_EVERY_S),
                    "--repair-gentleness", "0",
                    *(options or {}).get(name, ()),
                ),
            )
            for name in names
        ]  # fmt: skip
        self._start(made)
        self.nodes |= {service.name: service for service in made}

    def lose_node(self, name: str) -> None:
        """Kill a node and take its directory away for good."""
        self.nodes.pop(name).kill()
        shutil.rmtree(self.directory(name))

    def restart_with(self, service: Service, **variables: str) -> None:
        """Kill a service and start it with these variables of its environment; an empty one is taken away."""
        service.kill()
        service.variables |= variables
        service.variables = {name: value for name, value in service.variables.items() if value}
        service.start()

    def heal(self) -> None:
        """Start whatever does not run."""
        self.etcd.restart_all()
        for service in (*self.coordinators, *self.nodes.values()):
            if service.runs:
                service.resume()
            else:
                service.start()

    def _service(self, name: str, kind: str, arguments: Sequence[str]) -> Service:
        place = self.place
        return Service(
            name,
            (*arguments, *place.options(name, kind)),
            self.folder / f"{name}.log",
            bind=place.bind(name),
            within=place.within(name),
        )

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
    members: int = 3,
    options: Mapping[str, Sequence[str]] | None = None,
    place: Place | None = None,
) -> Iterator[FaultCluster]:
    """Run a cluster until the end of the block; it takes writes from the start. `options` as in `add_nodes`."""
    place = place or Loopback(folder)
    with ExitStack() as stack:
        etcd = stack.enter_context(EtcdCluster(members, folder, tls=not _is_loopback(place), host=place.etcd_host))
        cluster = FaultCluster(folder, etcd, place, stack)
        cluster.add_coordinators(coordinators, nodes=nodes)
        cluster.add_nodes([f"node-{number}" for number in range(1, nodes + 1)], options=options)
        with cluster.manager() as manager:
            eventually(lambda: manager.cluster_status().writable, "the cluster takes writes")
        yield cluster


def _is_loopback(place: Place) -> bool:
    return place.etcd_host.startswith("127.")


def _etcd_tls(etcd: EtcdCluster) -> tuple[str, ...]:
    files = etcd.tls_files
    if files is None:
        return ()
    return ("--etcd-ca", str(files.ca), "--etcd-cert", str(files.cert), "--etcd-key", str(files.key))


def _end(service: Service) -> None:
    if service.runs:
        service.kill()
