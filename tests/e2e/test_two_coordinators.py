"""Two coordinators over three etcd members, killed again and again under load: no point is lost and none is doubled."""

from __future__ import annotations

import random
import secrets
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from holdfast import HoldfastError, StateManager
from tests.e2e.harness import eventually, run
from tests.e2e.images import MIB, change_image, digest, make_image
from tests.e2e.services import Service, Tokens
from tests.support.etcd import EtcdCluster

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]

ROUNDS = 10


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdCluster]:
    with EtcdCluster(3, tmp_path) as cluster:
        yield cluster


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    return Tokens.make(tmp_path)


@pytest.fixture
def coordinators(tmp_path: Path, etcd: EtcdCluster, tokens: Tokens) -> Iterator[list[Service]]:
    key = tmp_path / "master.key"
    key.write_bytes(secrets.token_bytes(32))
    key.chmod(0o600)
    with ExitStack() as stack:
        services = []
        for number in (1, 2):
            service = Service(
                f"coordinator {number}",
                (
                    "coordinator",
                    "--data", str(tmp_path / f"coordinator-{number}"),
                    "--etcd", ",".join(etcd.endpoints),
                    "--master-key", str(key),
                    "--nodes", "3",
                    "--replicas", "3",
                    *tokens.coordinator_options,
                ),
                tmp_path / f"coordinator-{number}.log",
            ).start()  # fmt: skip
            stack.callback(service.stop)
            services.append(service)
        both = ",".join(service.address for service in services)
        for number in (1, 2, 3):
            node = Service(
                f"node {number}",
                (
                    "storagenode",
                    "--data", str(tmp_path / f"node-{number}"),
                    "--coordinator", both,
                    "--node-id", f"node-{number}",
                    "--zone", f"zone-{number}",
                    *tokens.node_options,
                ),
                tmp_path / f"node-{number}.log",
            ).start()  # fmt: skip
            stack.callback(node.stop)
        status = ("status", "--coordinator", both, *tokens.client_options)
        eventually(lambda: b"ready" in run(*status).stdout, "the cluster is ready", within_s=40)
        yield services


def test_coordinators_killed_under_load_lose_and_double_nothing(
    tmp_path: Path, coordinators: list[Service], etcd: EtcdCluster, tokens: Tokens
) -> None:
    disk = tmp_path / "disk.raw"
    make_image(disk, size_bytes=16 * MIB, data_bytes=2 * MIB, seed=21)
    source = random.Random(22)
    both = ",".join(service.address for service in coordinators)
    acknowledged: dict[str, str] = {}
    struck_in_call: list[bool] = []
    refusals: list[HoldfastError] = []
    with StateManager(both, token_file=tokens.admin) as manager:
        manager.register_vm("vm", volumes={"root": str(disk)})
        snapshot = manager.create_snapshot("vm")
        acknowledged[snapshot] = digest(disk)
        for round_number in range(ROUNDS):
            change_image(disk, edits=5, seed=round_number)
            victim = coordinators[round_number % 2]
            over = threading.Event()

            def strike(victim: Service = victim, over: threading.Event = over) -> None:
                victim.kill()
                struck_in_call.append(not over.is_set())

            fuse = threading.Timer(source.uniform(0.0, 0.1), strike)
            fuse.start()
            try:
                backup = manager.incremental_backup("vm", snapshot)
                acknowledged[backup] = digest(disk)
            except HoldfastError as error:
                refusals.append(error)
            over.set()
            fuse.join()
            victim.start()
            if round_number == 2:
                etcd.kill(0)
            if round_number == 5:
                etcd.restart(0)

        assert any(struck_in_call), "some kill fell into a call"
        assert all(error.retryable for error in refusals), refusals
        points = manager.points("vm")
        ids = [point.point_id for point in points]
        assert set(acknowledged) <= set(ids), "every acknowledged point is listed"
        assert len(ids) == len(set(ids))
        assert [point.number for point in points] == list(range(1, len(points) + 1))
        assert len(ids) <= 1 + ROUNDS, "one call makes one point at the most"
        for number, (point_id, content) in enumerate(acknowledged.items()):
            backup_id = "" if point_id == snapshot else point_id
            restored = manager.restore_vm(snapshot, backup_id, target=tmp_path / f"restored-{number}")
            assert digest(Path(restored) / "root.raw") == content
        change_image(disk, edits=1, seed=99)
        last = manager.incremental_backup("vm", snapshot, takeover=True)
        assert last not in acknowledged, "no dead session holds the VM for good"
