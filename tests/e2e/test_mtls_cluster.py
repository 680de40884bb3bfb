"""A cluster of processes that know each other by the certificates of `holdfast pki` alone; no token anywhere."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509

from holdfast import StateManager
from holdfast_core.runtime.options import TlsFiles, parse_address
from tests.e2e.harness import eventually, run
from tests.e2e.images import MIB, change_image, digest, make_image
from tests.e2e.services import Service

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

NODES = ("node-1", "node-2")


def certificate(authority: Path, name: str, kind: str, *options: str) -> Path:
    """Issue one and return its folder."""
    done = run("pki", "issue", str(authority), name, "--kind", kind, "--json", *options)
    assert done.returncode == 0, done.stderr
    return Path(json.loads(done.stdout)["folder"])


def tls_options(folder: Path) -> tuple[str, ...]:
    return ("--tls-ca", f"{folder}/ca.pem", "--tls-cert", f"{folder}/cert.pem", "--tls-key", f"{folder}/key.pem")


def tls_files(folder: Path) -> TlsFiles:
    return TlsFiles(ca=folder / "ca.pem", cert=folder / "cert.pem", key=folder / "key.pem")


@dataclass
class Cluster:
    """One coordinator, two nodes, and the authority that they all have in common."""

    folder: Path
    authority: Path
    coordinator: Service
    nodes: dict[str, Service]

    def as_(self, who: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        """Run a command with somebody's certificate."""
        return run(*arguments, *tls_options(who), coordinator=self.coordinator.address)

    def up_nodes(self, who: Path) -> set[str]:
        listed = json.loads(self.as_(who, "nodes", "--json").stdout or b"[]")
        return {node["node_id"] for node in listed if node["up"]}


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    authority = folder / "pki"
    assert run("pki", "init", str(authority)).returncode == 0
    with ExitStack() as stack:

        def start(name: str, kind: str, *arguments: str) -> Service:
            files = tls_options(certificate(authority, name, kind))
            data = ("--data", str(folder / name))
            service = Service(name, (*arguments, *data, *files), folder / f"{name}.log").start()
            stack.callback(service.stop)
            return service

        replicas = ("--nodes", "2", "--replicas", "2", "--create-master-key")
        coordinator = start("coordinator-1", "coordinator", "coordinator", *replicas)
        joining = ("storagenode", "--coordinator", coordinator.address)
        nodes = {name: start(name, "node", *joining, "--node-id", name, "--zone", name) for name in NODES}
        yield Cluster(folder, authority, coordinator, nodes)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("mtls")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def admin(cluster: Cluster) -> Path:
    """The certificate of an administrator; returns once the cluster takes writes."""
    folder = certificate(cluster.authority, "ann", "admin")

    def writable() -> bool:
        return bool(json.loads(cluster.as_(folder, "status", "--json").stdout or b"{}").get("writable"))

    eventually(writable, "the cluster takes writes")
    return folder


def test_the_five_calls(cluster: Cluster, admin: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    make_image(disk, size_bytes=8 * MIB, data_bytes=MIB, seed=61)
    with StateManager(cluster.coordinator.address, tls=tls_files(admin)) as manager:
        manager.register_vm("vm", {"root": str(disk)})
        snapshot = manager.create_snapshot("vm")
        change_image(disk, edits=5, seed=62)
        backup = manager.incremental_backup("vm", snapshot)
        restored = manager.restore_vm(snapshot, backup, target=tmp_path / "restored")
        assert digest(restored / "root.raw") == digest(disk)
        stored = manager.persist_application_data("task", b"data")
        assert manager.retrieve_application_data(stored) == b"data"


def test_who_is_not_let_in(cluster: Cluster, admin: Path, tmp_path: Path) -> None:
    nobody = certificate(cluster.authority, "web-agent", "client")
    expected = {"unbound": (nobody, 7), "node": (cluster.authority / "node-1", 7)}
    assert run("pki", "init", str(tmp_path / "foreign")).returncode == 0
    expected["foreign"] = (certificate(tmp_path / "foreign", "ann", "admin"), 5)
    for what, (who, code) in expected.items():
        done = cluster.as_(who, "vm", "list")
        assert (done.returncode, done.stdout) == (code, b""), (what, done.stderr)
    assert run("vm", "list", coordinator=cluster.coordinator.address).returncode == 5

    lost = certificate(cluster.authority, "bob", "admin")
    assert cluster.as_(lost, "vm", "list").returncode == 0
    revoked = cluster.as_(admin, "access", "certificate", "revoke", str(lost / "cert.pem"))
    assert revoked.returncode == 0, revoked.stderr
    refused = cluster.as_(lost, "vm", "list")
    assert (refused.returncode, b"revoked" in refused.stderr) == (7, True), refused.stderr
    assert cluster.as_(admin, "vm", "list").returncode == 0


def test_a_node_joins_under_its_own_name_alone(cluster: Cluster, admin: Path, tmp_path: Path) -> None:
    options = ("--coordinator", cluster.coordinator.address, "--node-id", "node-9", "--data", str(tmp_path / "node"))
    stranger = certificate(cluster.authority, "node-8", "node")
    log = tmp_path / "log"
    node = Service("node-9", ("storagenode", *options, *tls_options(stranger)), log).start()
    try:
        eventually(lambda: '"code":"DENIED"' in log.read_text().replace(" ", ""), "the refusal")
    finally:
        node.stop()
    assert cluster.up_nodes(admin) == set(NODES)


def test_renewed_certificates_are_taken_over(cluster: Cluster, admin: Path) -> None:
    """Under running services; and the client that goes on with what it has is not disturbed."""
    address = cluster.coordinator.address
    with StateManager(address, tls=tls_files(admin)) as manager:
        before = manager.list_vms()
        for name, kind in (("coordinator-1", "coordinator"), ("node-1", "node"), ("node-2", "node")):
            folder = cluster.authority / name
            old = serial_in(folder)
            served = cluster.nodes[name].address if name in NODES else address
            assert serial_shown(served, admin) == old
            certificate(cluster.authority, name, kind, "--replace")
            assert serial_in(folder) != old
            assert serial_shown(served, admin) == serial_in(folder)
        assert manager.list_vms() == before
        stored = manager.persist_application_data("task", b"after")
        assert manager.retrieve_application_data(stored) == b"after"
    assert cluster.up_nodes(admin) == set(NODES)


def serial_in(folder: Path) -> int:
    return x509.load_pem_x509_certificate((folder / "cert.pem").read_bytes()).serial_number


def serial_shown(address: str, client: Path) -> int:
    """Serial number of the certificate that a service shows to a new connection."""
    context = ssl.create_default_context(cafile=str(client / "ca.pem"))
    context.load_cert_chain(client / "cert.pem", client / "key.pem")
    context.set_alpn_protocols(["h2"])
    host, port = parse_address(address)
    with (
        socket.create_connection((host, port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=host) as encrypted,
    ):
        shown = encrypted.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown).serial_number
