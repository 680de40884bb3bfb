"""A tenant that keeps its data key: what its file holds, what works with it and without, and who can open nothing."""

from __future__ import annotations

import itertools
import json
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast import HoldfastError, StateManager, VolumeSpec
from holdfast.key_file import make_data_key, make_master_key, read_key_file, rotate_data_key
from holdfast.testing import MemoryCluster
from holdfast_coordinator import keyspace
from holdfast_coordinator.master_key import read_master_key
from holdfast_coordinator.records import parse
from holdfast_core.model.errors import ErrorCode
from holdfast_core.model.key_file import DataKey, format_data_key, new_data_key, parse_data_key
from holdfast_core.model.keys import generate_secrets, master_fingerprint
from holdfast_core.runtime.metadata.store import Put
from holdfast_proto.v1 import keys_pb2, tenants_pb2
from holdfast_proto.v1.records_pb2 import PointRecord
from tests.client.keyed import ask_cluster, coordinator_of, metadata_of
from tests.client.rig import BLOCK, Vm, error_of, make_sparse, noise, write_at

_names = itertools.count(1)
SECRETS = st.binary(min_size=32, max_size=32)


@given(root=SECRETS, epochs=st.dictionaries(st.integers(1, 2**32 - 1), SECRETS, min_size=1, max_size=4))
def test_a_data_key_survives_its_file_and_is_never_shown(root: bytes, epochs: dict[int, bytes]) -> None:
    key = DataKey(root, epochs)
    assert parse_data_key(format_data_key(key), "x") == key
    assert key.newest == max(epochs)
    shown = repr(key)
    assert all(secret.hex() not in shown and repr(secret) not in shown for secret in (root, *epochs.values()))


def test_the_form_of_the_file_is_what_it_was() -> None:
    key = DataKey(bytes(range(32)), {2: bytes([2]) * 32, 1: bytes([1]) * 32})
    text = (
        '{\n  "format": "holdfast tenant data key 1",\n'
        f'  "root": "{bytes(range(32)).hex()}",\n'
        f'  "epochs": {{\n    "1": "{"01" * 32}",\n    "2": "{"02" * 32}"\n  }}\n}}\n'
    )
    assert format_data_key(key) == text
    assert parse_data_key(json.dumps(json.loads(text)), "x") == key
    assert key.fingerprint.hex() == "6bac85c81318cc9a"


WHOLE = json.loads(format_data_key(new_data_key(random.Random(1).randbytes)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "[" * 100_000,
        json.dumps(WHOLE | {"format": "holdfast tenant data key 2"}),
        json.dumps(WHOLE | {"more": 1}),
        json.dumps({name: value for name, value in WHOLE.items() if name != "root"}),
        json.dumps(WHOLE | {"root": "zz" * 32}),
        json.dumps(WHOLE | {"root": "00" * 31}),
        json.dumps(WHOLE | {"root": 7}),
        json.dumps(WHOLE | {"epochs": {}}),
        json.dumps(WHOLE | {"epochs": []}),
        *(json.dumps(WHOLE | {"epochs": {name: "00" * 32}}) for name in ("0", "01", "-1", "x", "1.0", "٣", str(2**32))),
        json.dumps(WHOLE | {"epochs": {"1": None}}),
        json.dumps(WHOLE)[:-1] + ', "root": "' + "00" * 32 + '"}',
    ],
)
def test_what_is_no_data_key(text: str) -> None:
    with pytest.raises(HoldfastError) as caught:
        parse_data_key(text, "the-file")
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert "the-file" in caught.value.message
    assert WHOLE["epochs"]["1"] not in f"{caught.value!r}{caught.value.__cause__!r}"


def test_files_of_keys_are_their_owners_alone_and_never_replaced(tmp_path: Path) -> None:
    data, master = tmp_path / "data.key", tmp_path / "master.key"
    made = make_data_key(data, random_bytes=os.urandom)
    fingerprint = make_master_key(master, random_bytes=os.urandom)
    assert read_key_file(data) == made
    assert master_fingerprint(read_master_key(master)) == fingerprint
    for make in (make_data_key, make_master_key):
        again: Callable[..., object] = make
        assert error_of(lambda: again(data, random_bytes=os.urandom)).code is ErrorCode.TARGET_EXISTS  # noqa: B023
    rotated = rotate_data_key(data, random_bytes=os.urandom)
    assert rotated == read_key_file(data)
    assert (rotated.root, rotated.epochs[1], rotated.newest) == (made.root, made.epochs[1], 2)
    assert rotated.fingerprint == made.fingerprint
    assert [stat.S_IMODE(path.stat().st_mode) for path in (data, master)] == [0o600, 0o600]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.key", "master.key"]
    missing = tmp_path / "none" / "data.key"
    assert error_of(lambda: make_data_key(missing, random_bytes=os.urandom)).code is ErrorCode.TARGET_UNWRITABLE
    assert error_of(lambda: read_key_file(missing)).code is ErrorCode.NOT_FOUND
    assert error_of(lambda: read_key_file(tmp_path)).code is ErrorCode.INVALID_ARGUMENT


def test_a_data_key_fits_no_grant_that_has_one() -> None:
    secrets = generate_secrets(7, random.Random(1).randbytes)
    assert secrets.data_root is not None
    key = DataKey(secrets.data_root, secrets.data_epochs)
    assert key.merged(secrets.without_data().to_message()) == secrets
    with pytest.raises(HoldfastError, match="--key-file") as caught:
        key.merged(secrets.to_message())
    assert caught.value.code is ErrorCode.KEY_MISMATCH


class Own:
    """A tenant of its own data key in the shared cluster, with a VM `vm`."""

    def __init__(self, cluster: MemoryCluster, folder: Path) -> None:
        self.cluster = cluster
        self.name = f"own-{next(_names)}"
        self.file = folder / f"{self.name}.key"
        make_data_key(self.file, random_bytes=os.urandom)
        request = tenants_pb2.CreateTenantRequest(name=self.name, own_data_key=True)
        self.number: int = ask_cluster(cluster, "tenants", "CreateTenant", request).tenant.tenant
        self.vm = Vm(self.manager(), "vm", folder)
        self.vm.volume(20 * BLOCK, [(0, noise(5 * BLOCK)), (9 * BLOCK, noise(BLOCK, seed=1))])
        self.vm.register()

    def manager(self, *, key: Path | None = None) -> StateManager:
        """A manager with the tenant's key, or another."""
        return self.cluster.state_manager(tenant=self.name, key_file=key or self.file)

    def without(self) -> StateManager:
        """A manager without any."""
        return self.cluster.state_manager(tenant=self.name)


@pytest.fixture
def own(shared_cluster: MemoryCluster, tmp_path: Path) -> Own:
    """A tenant that keeps its data key."""
    return Own(shared_cluster, tmp_path)


def test_with_its_key_a_tenant_does_all_and_the_coordinator_can_open_nothing(own: Own, tmp_path: Path) -> None:
    manager = own.vm.manager
    snapshot = own.vm.snapshot()
    write_at(own.vm.path(), 2 * BLOCK, noise(BLOCK, seed=7))
    backup = manager.incremental_backup("vm", snapshot)
    own.vm.assert_restores(snapshot, backup)
    stored = manager.persist_application_data("task", b"secret " * 10_000)
    assert manager.retrieve_application_data(stored) == b"secret " * 10_000
    assert manager.verify(backup).blocks > 0

    coordinator = coordinator_of(own.cluster)
    parts = coordinator._parts
    assert parts is not None
    tenant = own.cluster.run(parts.tenants.numbered(own.number))
    held = own.cluster.run(parts.chain.secrets(own.number))
    assert (tenant.ring.has_data, held.data_root, dict(held.data_epochs)) == (False, None, {})
    key = read_key_file(own.file)
    snapshot_of_all = own.cluster.run(metadata_of(own.cluster).snapshot([""]))
    values = b"".join(item.value for item in snapshot_of_all.items)
    assert all(secret not in values for secret in (key.root, *key.epochs.values()))


def test_without_its_key_nothing_is_written_or_opened_but_copies_are_still_checked(own: Own, tmp_path: Path) -> None:
    snapshot = own.vm.snapshot()
    stored = own.vm.manager.persist_application_data("task", b"secret")
    keyless = own.without()
    attempts: list[Callable[[], object]] = [
        lambda: keyless.create_snapshot("vm"),
        lambda: keyless.incremental_backup("vm", snapshot),
        lambda: keyless.persist_application_data("task", b"more"),
        lambda: keyless.restore_vm(snapshot, target=tmp_path / "target"),
        lambda: keyless.retrieve_application_data(stored),
    ]
    for attempt in attempts:
        error = error_of(attempt)
        assert error.code is ErrorCode.KEY_MISMATCH
        assert "--key-file" in error.message
    assert keyless.verify(snapshot, node_only=True).blocks > 0
    assert [point.point_id for point in keyless.points("vm")] == [snapshot]
    assert own.vm.snapshot(), "a session that had no key is aborted and does not stand in the way"

    other = tmp_path / "other.key"
    make_data_key(other, random_bytes=os.urandom)
    wrong = own.manager(key=other)
    assert error_of(lambda: wrong.restore_vm(snapshot, target=tmp_path / "target")).code is ErrorCode.CORRUPT
    assert error_of(lambda: wrong.incremental_backup("vm", snapshot)).code is ErrorCode.CORRUPT


def test_a_key_file_is_refused_where_the_cluster_keeps_the_key(own: Own, tmp_path: Path) -> None:
    manager = own.cluster.state_manager(key_file=own.file)
    name = f"plain-{own.name}"
    make_sparse(tmp_path / "plain.raw", BLOCK, [(0, noise(BLOCK))])
    manager.register_vm(name, {"root": VolumeSpec(tmp_path / "plain.raw")})
    error = error_of(lambda: manager.create_snapshot(name))
    assert error.code is ErrorCode.KEY_MISMATCH
    assert "--key-file" in error.message
    assert own.cluster.state_manager().create_snapshot(name), "the session is aborted and does not stand in the way"


def test_a_new_epoch_of_its_own_seals_and_the_older_ones_stay_readable(own: Own, tmp_path: Path) -> None:
    before = tmp_path / "before.key"
    before.write_bytes(own.file.read_bytes())
    snapshot = own.vm.snapshot()
    rotate_data_key(own.file, random_bytes=os.urandom)
    error = error_of(
        lambda: ask_cluster(
            own.cluster, "keys", "RotateTenantKeys", keys_pb2.RotateTenantKeysRequest(data=True), tenant=own.name
        )
    )
    assert error.code is ErrorCode.INVALID_ARGUMENT
    vm = Vm(own.manager(), "vm", tmp_path)
    unchanged = vm.manager.incremental_backup("vm", snapshot)
    assert vm.manager.point(unchanged).stats.stored_bytes == 0
    write_at(vm.path(), 3 * BLOCK, noise(BLOCK, seed=9))
    changed = vm.manager.incremental_backup("vm", snapshot)
    vm.assert_restores(snapshot, changed)
    old = own.manager(key=before)
    assert error_of(lambda: old.restore_vm(snapshot, changed, target=tmp_path / "a")).code is ErrorCode.KEY_MISMATCH
    old.restore_vm(snapshot, unchanged, target=tmp_path / "b")


@pytest.mark.parametrize("keeps", ["the cluster", "the tenant"])
def test_a_root_that_was_swapped_in_the_store_is_found_out(
    shared_cluster: MemoryCluster, tmp_path: Path, keeps: str
) -> None:
    """Who writes to the metadata store gives a point the root of another, older one: all of its blocks are good."""
    if keeps == "the tenant":
        own = Own(shared_cluster, tmp_path)
        vm, number = own.vm, own.number
    else:
        vm, number = Vm(shared_cluster.state_manager(), f"swap-{next(_names)}", tmp_path), 1
        vm.volume(20 * BLOCK, [(0, noise(5 * BLOCK))])
        vm.register()
    first = vm.snapshot()
    write_at(vm.path(), 0, noise(BLOCK, seed=3))
    second = vm.snapshot()
    space, store = keyspace.TenantKeyspace(number), metadata_of(shared_cluster)

    async def swap() -> None:
        records = {}
        for item in (await store.snapshot([space.points_of(vm.name)])).items:
            records[parse(item, PointRecord).message.point_id] = parse(item, PointRecord)
        victim = records[second]
        victim.message.volumes[0].root = records[first].message.volumes[0].root
        await store.txn([], [Put(victim.key, victim.message.SerializeToString())])

    shared_cluster.run(swap())
    assert error_of(lambda: vm.restored(second)).code is ErrorCode.CORRUPT
    assert error_of(lambda: vm.manager.verify(second)).code is ErrorCode.CORRUPT
    assert error_of(lambda: vm.manager.incremental_backup(vm.name, second)).code is ErrorCode.CORRUPT
    vm.restored(first)
