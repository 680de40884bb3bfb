"""Making and opening clusters: one cluster whoever starts first, one master key, and no contradicting options."""

from __future__ import annotations

import asyncio
import random
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from holdfast_coordinator import keyspace
from holdfast_coordinator.bootstrap import Cluster, ClusterOptions, open_cluster
from holdfast_coordinator.embedded import EmbeddedCoordinator
from holdfast_coordinator.grants import check_keys_may_leave
from holdfast_coordinator.keys.chain import KeyChain, SigningKey, signing_purpose
from holdfast_coordinator.master_key import create_master_key, parse_master_key, read_master_key
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.keys import TenantSecrets, master_fingerprint
from holdfast_core.runtime.clock import ManualClock, SystemClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import Delete, Put
from holdfast_proto.v1.cluster_pb2 import VerifyingKey
from holdfast_proto.v1.records_pb2 import ClusterRecord, WrappedSecret
from tests.coordinator.faults import Crash, Fault, FaultyStore
from tests.coordinator.rig import ADMIN_TOKEN, MASTER_KEY, Client, coordinator, master_keys, refused

OTHER_KEY = bytes(32)
NOW_UNIX_MS = 1_700_000_000_000


@dataclass(frozen=True)
class Opened:
    """A cluster as a coordinator opens it, with its secrets."""

    cluster: Cluster
    signing: tuple[VerifyingKey, ...]
    audit: SigningKey
    secrets: tuple[TenantSecrets, ...]

    @property
    def record(self) -> ClusterRecord:
        """The cluster's record."""
        return self.cluster.record


async def opened(store: SqliteStore | FaultyStore, *, seed: int = 1, key: bytes = MASTER_KEY, **options: Any) -> Opened:
    """Open or make the cluster of a store."""
    cluster = await open_cluster(
        store,
        master=master_keys(key),
        options=ClusterOptions(**options),
        random_bytes=random.Random(seed).randbytes,
        now_unix_ms=NOW_UNIX_MS,
    )
    chain = KeyChain(store, master_keys(key), cluster.record.cluster_id, ManualClock())
    await chain.fresh()
    return Opened(cluster, chain.verifying_keys(), chain.audit_key(), (await chain.secrets(0), await chain.secrets(1)))


def same(one: Opened, other: Opened) -> bool:
    """Whether two coordinators hold the same secrets of the same cluster."""
    return (one.record, one.signing, one.audit, one.secrets) == (
        other.record,
        other.signing,
        other.audit,
        other.secrets,
    )


async def test_all_that_start_at_once_open_one_cluster(store: SqliteStore) -> None:
    clusters = await asyncio.gather(*(opened(store, seed=seed) for seed in range(5)))
    assert all(same(clusters[0], each) for each in clusters)
    assert same(clusters[0], await opened(store, seed=9))


@pytest.mark.parametrize("fault", list(Fault))
@pytest.mark.parametrize("at", range(4))
async def test_a_start_that_is_interrupted_anywhere_leaves_a_cluster_that_opens(
    store: SqliteStore, fault: Fault, at: int
) -> None:
    faults = FaultyStore(store)
    faults.arm(fault, at=at)
    results = await asyncio.gather(opened(faults), return_exceptions=True)
    assert isinstance(results[0], Opened | Crash | HoldfastError)
    first, second = await opened(store, seed=2), await opened(store, seed=3)
    assert same(first, second)


async def test_another_master_key_does_not_start_and_both_fingerprints_are_named(store: SqliteStore) -> None:
    await opened(store)
    error = await refused(ErrorCode.KEY_MISMATCH, opened(store, key=OTHER_KEY))
    for key in (MASTER_KEY, OTHER_KEY):
        assert master_fingerprint(key).hex() in error.message


async def test_no_secret_is_stored_or_shown_in_the_clear(store: SqliteStore) -> None:
    cluster = await opened(store)
    items = (await store.snapshot([""])).items
    held = b"".join(item.value for item in items)
    (signing,) = (item for item in items if item.key.startswith(keyspace.SIGNING_PREFIX))
    purpose = signing_purpose(signing.key.removeprefix(keyspace.SIGNING_PREFIX))
    for secret in (
        MASTER_KEY,
        await master_keys().unwrap(WrappedSecret.FromString(signing.value), purpose),
        cluster.audit.private_key,
        *(each.data_root or b"" for each in cluster.secrets),
        *(each.structure_root for each in cluster.secrets),
        *(secret for each in cluster.secrets for secret in each.data_epochs.values()),
        *(secret for each in cluster.secrets for secret in each.structure_epochs.values()),
    ):
        assert secret
        assert secret not in held
        assert secret.hex() not in repr(cluster)
        assert repr(secret) not in repr(cluster)


async def test_options_are_fixed_when_the_cluster_is_made(store: SqliteStore) -> None:
    made = await opened(store, replicas=2, partitions=64, nodes_expected=2)
    assert (made.record.replicas, made.record.partitions, made.cluster.nodes_needed) == (2, 64, 2)
    assert same(made, await opened(store))
    assert same(made, await opened(store, replicas=2, partitions=64, nodes_expected=5))
    assert "replicas=2" in (await refused(ErrorCode.INVALID_ARGUMENT, opened(store, replicas=3))).message
    assert "partitions=64" in (await refused(ErrorCode.INVALID_ARGUMENT, opened(store, partitions=128))).message


async def test_defaults_are_the_designs(store: SqliteStore) -> None:
    record = (await opened(store)).record
    assert (record.replicas, record.partitions, record.nodes_expected, record.version) == (3, 4096, 3, 1)


@pytest.mark.parametrize(
    ("code", "options"),
    [
        (ErrorCode.INVALID_ARGUMENT, {"replicas": 0}),
        (ErrorCode.INVALID_ARGUMENT, {"replicas": 17}),
        (ErrorCode.INVALID_ARGUMENT, {"nodes_expected": 0}),
        (ErrorCode.INVALID_ARGUMENT, {"partitions": 100}),
        (ErrorCode.INVALID_ARGUMENT, {"partitions": 1 << 17}),
        (ErrorCode.LIMIT_EXCEEDED, {"partitions": 1 << 16, "replicas": 16}),
    ],
)
async def test_what_no_cluster_is_made_of(store: SqliteStore, code: ErrorCode, options: dict[str, Any]) -> None:
    await refused(code, opened(store, **options))
    assert await store.get(keyspace.CLUSTER) is None


async def test_a_cluster_of_before_there_were_tenants_and_an_audit_log_is_completed(store: SqliteStore) -> None:
    """The first version wrote four keys, and its signing key had neither a time nor a public half beside it."""
    made = await opened(store)
    items = (await store.snapshot([""])).items
    kept = (keyspace.CLUSTER, keyspace.SIGNING_PREFIX, keyspace.tenant_name("default"), keyspace.TenantKeyspace(1).keys)
    await store.txn([], [Delete(item.key) for item in items if not item.key.startswith(kept)])
    (signing,) = (item for item in items if item.key.startswith(keyspace.SIGNING_PREFIX))
    wrapped = WrappedSecret.FromString(signing.value)
    wrapped.ClearField("public_key")
    await store.txn([], [Put(signing.key, wrapped.SerializeToString())])
    assert len((await store.snapshot([""])).items) == 4

    clusters = await asyncio.gather(*(opened(store, seed=seed) for seed in range(5, 8)))
    assert all(same(clusters[0], each) for each in clusters)
    assert (clusters[0].record, clusters[0].signing, clusters[0].secrets[1]) == (
        made.record,
        made.signing,
        made.secrets[1],
    )
    assert {item.key for item in (await store.snapshot([""])).items} >= {
        keyspace.tenant_record(0),
        keyspace.tenant_record(1),
        keyspace.TenantKeyspace(0).keys,
        keyspace.audit_key(clusters[0].audit.key_id),
    }
    async with coordinator(store, clock=ManualClock(), replicas=None, partitions=None) as client:
        await client.form_layout()
        await client.register_vm()
        await client.save()


async def test_metadata_of_a_later_version_is_left_alone(store: SqliteStore, clock: ManualClock) -> None:
    cluster = await opened(store)
    cluster.record.version = 2
    await store.txn([], [Put(keyspace.CLUSTER, cluster.record.SerializeToString())])
    assert "version 2" in (await refused(ErrorCode.INVALID_ARGUMENT, opened(store))).message


def test_the_master_key_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "master.key"
    made = create_master_key(path, random_bytes=random.Random(1).randbytes)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert create_master_key(path, random_bytes=random.Random(2).randbytes) == made == read_master_key(path)
    assert [each.name for each in tmp_path.iterdir()] == ["master.key"]


def test_the_master_key_is_raw_or_hexadecimal(tmp_path: Path) -> None:
    assert parse_master_key(MASTER_KEY, "x") == MASTER_KEY
    assert parse_master_key(MASTER_KEY.hex().encode() + b"\n", "x") == MASTER_KEY
    for wrong in (b"", b"z" * 64, bytes(31), bytes(33)):
        with pytest.raises(HoldfastError) as caught:
            parse_master_key(wrong, "x")
        assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    with pytest.raises(HoldfastError) as caught:
        read_master_key(tmp_path / "none")
    assert caught.value.code is ErrorCode.NOT_FOUND


@pytest.mark.parametrize(
    ("peer", "encrypted", "allowed"),
    [
        ("ipv4:127.0.0.1:5000", False, True),
        ("ipv6:%5B::1%5D:5000", False, True),
        ("ipv6:[::1]:5000", False, True),
        ("unix:", False, True),
        ("ipv4:10.0.0.1:5000", True, True),
        ("ipv4:10.0.0.1:5000", False, False),
        ("ipv4:1.127.0.0.1:5000", False, False),
        ("", False, False),
    ],
)
def test_keys_leave_over_tls_or_within_the_machine(peer: str, *, encrypted: bool, allowed: bool) -> None:
    if allowed:
        check_keys_may_leave(peer=peer, encrypted=encrypted)
        return
    with pytest.raises(HoldfastError) as caught:
        check_keys_may_leave(peer=peer, encrypted=encrypted)
    assert caught.value.code is ErrorCode.DENIED


async def test_an_embedded_coordinator_keeps_its_cluster_over_a_stop() -> None:
    service = EmbeddedCoordinator(nodes_expected=1, replicas=1, admin_token=ADMIN_TOKEN, clock=SystemClock())
    client = Client(await service.start())
    await client.register_vm()
    await client.beat(1)
    made = await client.save()
    await client.close()
    await service.stop()
    client = Client(await service.start())
    assert await client.points() == [made]
    await client.close()
    await service.close()


async def test_the_address_of_another_service_is_refused(store: SqliteStore, clock: ManualClock) -> None:
    async with coordinator(store, clock=clock) as running:
        service = EmbeddedCoordinator(nodes_expected=1, replicas=1, store=store, master_key=OTHER_KEY)
        await refused(ErrorCode.KEY_MISMATCH, service.start())
        await running.register_vm()
