"""A coordinator seen from outside: health, metrics, the store going away, and the command's refusals."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from holdfast_coordinator import keyspace
from holdfast_coordinator.bootstrap import ClusterOptions
from holdfast_coordinator.coordinator import Coordinator, CoordinatorSettings
from holdfast_coordinator.main import command
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.channels import open_channel
from holdfast_core.runtime.clock import ManualClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import Put
from holdfast_proto.v1 import state_pb2
from holdfast_proto.v1.common_pb2 import NodeHealing, NodeState
from holdfast_proto.v1.records_pb2 import READING_DISTRUSTED
from tests.coordinator.faults import Fault, FaultyStore
from tests.coordinator.lifecycle import discard
from tests.coordinator.rig import (
    MASTER_KEY,
    STATIC_TOKENS,
    Client,
    coordinator,
    eventually,
    master_keys,
    point_commit,
    refused,
    zero_commit,
    zero_volume,
)
from tests.support.etcd import issue_tls


async def test_health_names_both_services(client: Client) -> None:
    async with open_channel(client.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "holdfast.v1.StateService", "holdfast.v1.ClusterService"):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_metrics_tell_of_layouts_risks_and_the_steward(store: SqliteStore, clock: ManualClock) -> None:
    registry = CollectorRegistry()
    service = Coordinator(
        store,
        master=master_keys(),
        settings=CoordinatorSettings(options=ClusterOptions(partitions=16), static_tokens=STATIC_TOKENS),
        random_bytes=random.Random(1).randbytes,
        clock=clock,
        registry=registry,
    )
    client = Client(await service.start())
    await client.form_layout()
    await client.beat(2, healing=NodeHealing(partitions_at_risk=5))
    state = NodeState(out=True)
    await store.txn([], [Put(keyspace.node_state("node-1"), state.SerializeToString())])

    async def counted() -> bool:
        clock.advance(0.5)
        return (
            registry.get_sample_value("holdfast_layouts_living") == 1
            and registry.get_sample_value("holdfast_partitions_at_risk") == 5
            and registry.get_sample_value("holdfast_nodes", {"state": "out"}) == 1
            and registry.get_sample_value("holdfast_steward") == 1
        )

    await eventually(counted, "the gauges are fresh")
    await client.close()
    await service.stop(0.1)


async def test_metrics_tell_of_commits_sessions_and_nodes(store: SqliteStore, clock: ManualClock) -> None:
    registry = CollectorRegistry()
    service = Coordinator(
        store,
        master=master_keys(),
        settings=CoordinatorSettings(options=ClusterOptions(partitions=16), static_tokens=STATIC_TOKENS),
        random_bytes=random.Random(1).randbytes,
        clock=clock,
        registry=registry,
    )
    client = Client(await service.start())
    await client.form_layout()
    await client.register_vm()
    begun = await client.begin()
    await client.register_vm("vm-2")
    await client.save("vm-2")
    clock.advance(10)

    async def counted() -> bool:
        return (
            registry.get_sample_value("holdfast_sessions_open") == 1
            and registry.get_sample_value("holdfast_nodes", {"state": "down"}) == 3
            and registry.get_sample_value("holdfast_layout_epoch") == 1
        )

    await eventually(counted, "the gauges are fresh")
    await client.commit(zero_commit(begun))
    assert registry.get_sample_value("holdfast_commits_total", {"kind": "point"}) == 2
    # Who commits without saying how it read is of a version that did not say.
    assert registry.get_sample_value("holdfast_volumes_read_total", {"reading": "unspecified"}) == 2
    changed = zero_volume()
    changed.reading = READING_DISTRUSTED
    await client.commit(point_commit(await client.begin(), [changed]))
    assert registry.get_sample_value("holdfast_volumes_read_total", {"reading": "distrusted"}) == 1
    await discard(client, (await client.points("vm-2"))[-1].point_id, vm_id="vm-2")
    assert registry.get_sample_value("holdfast_vms_discarded_total") == 1
    assert registry.get_sample_value("holdfast_sessions_begun_total", {"kind": "point"}) == 3
    assert registry.get_sample_value("holdfast_barrier_seconds_count") == 3
    commits = {"method": "/holdfast.v1.StateService/CommitPoint", "status": "OK"}
    assert registry.get_sample_value("holdfast_calls_total", commits) == 3
    await client.close()
    await service.stop(0.2)


async def test_a_store_that_is_away_is_said_to_be_and_comes_back(store: SqliteStore, clock: ManualClock) -> None:
    faults = FaultyStore(store)
    async with coordinator(faults, clock=clock) as client:
        await client.form_layout()
        await client.register_vm()
        faults.arm(Fault.LOST_BEFORE, at=0)
        error = await refused(ErrorCode.UNREACHABLE, client.begin())
        assert error.retryable
        faults.arm(None)
        assert (await client.save()).number == 1


async def test_a_record_that_is_none_fails_the_calls_that_need_it(client: Client, store: SqliteStore) -> None:
    await store.txn([], [Put("holdfast/v1/t/0000000001/vms/vm-9", b"\xff\xff")])
    await refused(ErrorCode.INTERNAL, client.state("GetVm", state_pb2.GetVmRequest(vm_id="vm-9")))
    assert (await client.save()).number == 1


async def test_a_coordinator_that_cannot_follow_the_cluster_says_why_and_ends(
    store: SqliteStore, clock: ManualClock
) -> None:
    service = Coordinator(
        store,
        master=master_keys(),
        settings=CoordinatorSettings(),
        random_bytes=random.Random(1).randbytes,
        clock=clock,
    )
    await service.start()
    await store.txn([], [Put("holdfast/v1/node/records/node-9", b"\xff\xff")])
    failure = await service.failed()
    assert failure.code is ErrorCode.INTERNAL
    assert "node-9" in failure.message
    await refused(ErrorCode.INTERNAL, service.stop(0.2))


@pytest.fixture
def keyed(tmp_path: Path) -> Path:
    (tmp_path / "master.key").write_bytes(MASTER_KEY)
    return tmp_path


def run_command(**options: object) -> HoldfastError:
    """Run the command with options that it must refuse; return why."""
    with pytest.raises(HoldfastError) as caught:
        command(**options)  # type: ignore[arg-type]
    return caught.value


def test_what_the_command_refuses_before_it_serves(keyed: Path, tmp_path: Path) -> None:
    assert run_command().code is ErrorCode.INVALID_ARGUMENT
    assert run_command(data=tmp_path / "empty").code is ErrorCode.NOT_FOUND
    assert run_command(master_key=str(keyed / "master.key")).code is ErrorCode.INVALID_ARGUMENT
    assert run_command(data=keyed, bind="0.0.0.0:0").code is ErrorCode.INVALID_ARGUMENT
    assert run_command(data=keyed, bind="127.0.0.1:0", tls_ca=keyed / "ca").code is ErrorCode.INVALID_ARGUMENT
    assert run_command(data=keyed, bind="127.0.0.1:0", partitions=3).code is ErrorCode.INVALID_ARGUMENT


def test_a_lost_master_key_is_not_replaced_beside_its_metadata(tmp_path: Path) -> None:
    (tmp_path / "metadata.sqlite").write_bytes(b"")
    refused_with = run_command(data=tmp_path, create_master_key=True)
    assert refused_with.code is ErrorCode.NOT_FOUND
    assert not (tmp_path / "master.key").exists()


async def test_over_tls_keys_leave_to_those_with_a_certificate_alone(
    store: SqliteStore, clock: ManualClock, tmp_path: Path
) -> None:
    ours, strangers = issue_tls(tmp_path / "ours"), issue_tls(tmp_path / "strangers")
    service = Coordinator(
        store,
        master=master_keys(),
        settings=CoordinatorSettings(
            tls=ours,
            options=ClusterOptions(nodes_expected=1, replicas=1, partitions=16),
            static_tokens=STATIC_TOKENS,
        ),
        random_bytes=random.Random(1).randbytes,
        clock=clock,
    )
    address = await service.start()
    friend, stranger, plain = Client(address, tls=ours), Client(address, tls=strangers), Client(address)
    await friend.register_vm()
    await friend.beat(1)
    assert (await friend.begin()).grant.keys.data_root
    for client in (stranger, plain):
        await refused(ErrorCode.UNREACHABLE, client.begin())
        await client.close()
    await friend.close()
    await service.stop(0.2)
