"""Keys that change under a cluster in use: nothing is refused, nothing is lost, and no backup grows for it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from holdfast import Codec, StateManager
from holdfast.background import LoopThread
from holdfast.results import TransferStats
from holdfast.testing import MemoryCluster
from holdfast_coordinator.embedded import EmbeddedCoordinator
from holdfast_coordinator.keys.chain import RETIREMENT_MS
from holdfast_coordinator.keys.master import FileMasterKey, MasterKeys
from holdfast_coordinator.keys.rewrap import Rewrapping
from holdfast_core.model.block import parse_header
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import SIGNING_KEY_SPREAD_S
from holdfast_core.runtime.capability import Capability, CapabilityVerifier
from holdfast_core.runtime.clock import SystemClock
from holdfast_core.runtime.credentials import new_token
from holdfast_proto.v1 import keys_pb2
from holdfast_storagenode.embedded import EmbeddedStorageNode
from holdfast_storagenode.store import Found, Verdict
from tests.client.keyed import ask, ask_cluster, coordinator_of, metadata_of
from tests.client.rig import BLOCK, TENANT, Vm, data_ids, error_of, noise, store_of, write_at
from tests.coordinator.key_rig import make_entry
from tests.support.waiting import wait_until

TOKEN = new_token(os.urandom)
SIZE = 300 * BLOCK


def wait_until_writable(manager: StateManager) -> None:
    wait_until(lambda: manager.cluster_status().writable, "a cluster that takes writes")


def verifier_of(cluster: MemoryCluster, number: int) -> CapabilityVerifier:
    verifier = cluster.node(number)._node.core.cluster.verifier  # type: ignore[attr-defined]
    assert isinstance(verifier, CapabilityVerifier)
    return verifier


def epochs_of(cluster: MemoryCluster, *, kind: int) -> set[int]:
    """Key epochs in the headers of the blocks of a kind that the first node holds."""
    ids = data_ids(cluster, 0, kind)
    found = store_of(cluster, 0).get(TENANT, ids, bytes_max=1 << 30)
    return {parse_header(block.data).key_epoch for block in found if not isinstance(block, Verdict)}


class PutForward(SystemClock):
    """The machine's clock, whose wall time a test puts forward; everybody in the test goes by it."""

    def __init__(self) -> None:
        self.ahead_ms = 0

    def now_unix_ms(self) -> int:
        """Return the wall clock, put forward."""
        return super().now_unix_ms() + self.ahead_ms


class Load:
    """Writes and reads data over and over in a thread, until it is left."""

    def __init__(self, manager: StateManager) -> None:
        self.rounds = 0
        self.errors: list[HoldfastError] = []
        self._manager = manager
        self._ended = threading.Event()
        self._round = threading.Condition()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def go_on(self, rounds: int = 3) -> None:
        """Wait until so many more rounds are over, or one has failed."""
        with self._round:
            wanted = self.rounds + rounds
            assert self._round.wait_for(lambda: self.rounds >= wanted or self.errors, 30)

    def _run(self) -> None:
        while not self._ended.is_set() and not self.errors:
            data = noise(3 * BLOCK, seed=self.rounds)
            try:
                stored = self._manager.persist_application_data("load", data)
                assert self._manager.retrieve_application_data(stored) == data
            except HoldfastError as error:
                self.errors.append(error)
            with self._round:
                self.rounds += 1
                self._round.notify_all()


@contextmanager
def clocked_cluster(clock: PutForward) -> Iterator[tuple[str, Callable[[], None]]]:
    """Three nodes and a coordinator that go by `clock`; yields its address, and what makes it remove ended keys."""
    loop = LoopThread()
    coordinator = EmbeddedCoordinator(nodes_expected=3, replicas=3, admin_token=TOKEN, clock=clock)
    address = loop.run(coordinator.start())
    nodes = [
        EmbeddedStorageNode(f"node-{n}", [address], zone=f"z{n}", heartbeat_s=0.1, clock=clock, token=TOKEN)
        for n in (1, 2, 3)
    ]

    async def stop() -> None:
        for node in nodes:
            await node.stop()
        await coordinator.close()

    try:
        for node in nodes:
            loop.run(node.start())
        parts = coordinator._coordinator._parts  # type: ignore[union-attr]
        yield address, lambda: loop.run(parts.chain.sweep())  # type: ignore[union-attr]
    finally:
        loop.close(stop())


@contextmanager
def refusals_counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Yield the reasons for which nodes refuse capabilities, whether or not a client notices."""
    refusals: list[str] = []
    verify: Callable[..., Capability] = CapabilityVerifier.verify

    def watched(self: CapabilityVerifier, token: str, *, now_unix_ms: int) -> Capability:
        try:
            return verify(self, token, now_unix_ms=now_unix_ms)
        except HoldfastError as error:
            refusals.append(error.message)
            raise

    with monkeypatch.context() as patched:
        patched.setattr(CapabilityVerifier, "verify", watched)
        yield refusals


@pytest.mark.slow
def test_signing_keys_change_under_load_without_one_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = PutForward()
    with (
        clocked_cluster(clock) as (address, sweep),
        StateManager(address, token=TOKEN, clock=clock) as manager,
        refusals_counted(monkeypatch) as refusals,
    ):
        wait_until_writable(manager)
        made = []
        with Load(manager) as load:
            load.go_on()
            for _ in range(2):
                request = keys_pb2.RotateSigningKeyRequest(purpose="capability")
                made.append(ask(address, TOKEN, "keys", "RotateSigningKey", request).key_id)
                load.go_on()
                # Nodes beat ten times a second, so they have heard of it when the rounds so far are over.
                for _ in range(4):
                    clock.ahead_ms += int(SIGNING_KEY_SPREAD_S * 300)
                    load.go_on()
            for _ in range(13):
                clock.ahead_ms += RETIREMENT_MS // 12
                sweep()
                load.go_on(2)
            listed = ask(address, TOKEN, "keys", "ListKeys", keys_pb2.ListKeysRequest()).signing_keys
        assert load.errors == []
    assert refusals == []
    assert [(key.key_id, key.signing) for key in listed if key.purpose == "capability"] == [(made[1], True)]


def test_after_a_theft_the_old_key_opens_nothing_and_work_goes_on(cluster: MemoryCluster) -> None:
    manager = cluster.state_manager()
    stored = manager.persist_application_data("task", noise(2 * BLOCK))
    request = keys_pb2.RotateSigningKeyRequest(purpose="capability", retire_now=True)
    made = ask_cluster(cluster, "keys", "RotateSigningKey", request)

    def known() -> bool:
        return all(list(verifier_of(cluster, number)._keys) == [made.key_id] for number in range(3))

    wait_until(known, "a node that knows the key")
    assert manager.retrieve_application_data(stored) == noise(2 * BLOCK)
    manager.persist_application_data("task", noise(BLOCK, seed=2))


def backed_up(vm: Vm, snapshot: str) -> tuple[str, TransferStats]:
    backup = vm.manager.incremental_backup(vm.name, snapshot)
    return backup, vm.manager.point(backup).stats


@pytest.mark.slow
def test_a_rotation_makes_no_later_backup_larger(cluster: MemoryCluster, tmp_path: Path) -> None:
    vms = [Vm(cluster.state_manager(), f"vm-{number}", tmp_path) for number in (1, 2)]
    snapshots = []
    for number, vm in enumerate(vms):
        vm.volume(SIZE, [(0, noise(200 * BLOCK, seed=number)), (250 * BLOCK, noise(BLOCK, seed=10 + number))])
        vm.register(codec=Codec.STORED)
        snapshots.append(vm.snapshot())

    def change(number: int) -> None:
        for at in (3, 4, 150, 299):
            write_at(vms[number].path(), at * BLOCK, noise(BLOCK, seed=1000 + at + number))

    change(0)
    _, without = backed_up(vms[0], snapshots[0])
    answer = ask_cluster(
        cluster, "keys", "RotateTenantKeys", keys_pb2.RotateTenantKeysRequest(data=True, after_data_epoch=1)
    )
    assert (answer.data_epoch, answer.structure_epoch) == (2, 1)

    unchanged, nothing = backed_up(vms[0], snapshots[0])
    assert (nothing.stored_bytes, nothing.sent_bytes, nothing.changed_blocks) == (0, 0, 0)
    change(1)
    changed, after = backed_up(vms[1], snapshots[1])
    assert (after.stored_blocks, after.stored_plain_bytes) == (without.stored_blocks, without.stored_plain_bytes)
    assert after.stored_bytes - after.index_bytes == without.stored_bytes - without.index_bytes
    # As many nodes; ids and fingerprints are random, so they compress alike, but not to the byte.
    assert abs(after.index_bytes - without.index_bytes) < without.index_bytes / 50
    vms[0].assert_restores(snapshots[0], unchanged)
    vms[1].assert_restores(snapshots[1], changed)
    assert epochs_of(cluster, kind=0) == {1, 2}
    assert epochs_of(cluster, kind=2) == {1}

    # The structure's rotation costs the path from each root to its leaves once, and no data.
    ask_cluster(cluster, "keys", "RotateTenantKeys", keys_pb2.RotateTenantKeysRequest(structure=True))
    _, once = backed_up(vms[1], snapshots[1])
    assert once.stored_bytes == once.index_bytes > 0
    again, nothing = backed_up(vms[1], snapshots[1])
    assert nothing.stored_bytes == 0
    vms[1].assert_restores(snapshots[1], again)


@pytest.mark.slow
def test_another_master_key_takes_over_and_no_node_notices(cluster: MemoryCluster, tmp_path: Path) -> None:
    vm = Vm(cluster.state_manager(), "vm-1", tmp_path)
    vm.volume(SIZE, [(0, noise(20 * BLOCK))])
    vm.register()
    snapshot = vm.snapshot()
    parts, store = coordinator_of(cluster)._parts, metadata_of(cluster)
    assert parts is not None
    old: bytes = cluster._coordinator._master_key  # type: ignore[union-attr]
    new = os.urandom(32)

    def held() -> list[list[Found]]:
        return [
            store_of(cluster, number).get(TENANT, sorted(data_ids(cluster, number, kind)), bytes_max=1 << 30)
            for number in range(3)
            for kind in (0, 2)
        ]

    before = held()
    master = MasterKeys(FileMasterKey(new, os.urandom), [FileMasterKey(old, os.urandom)])
    assert cluster.run(Rewrapping(store, master, parts.ledger).run(make_entry("keys.admin"))) == 4
    assert held() == before

    again = EmbeddedCoordinator(nodes_expected=3, replicas=3, store=store, master_key=old)
    assert error_of(lambda: cluster.run(again.start())).code is ErrorCode.KEY_MISMATCH
    successor = EmbeddedCoordinator(
        nodes_expected=3, replicas=3, store=store, master_key=new, admin_token=cluster.token
    )
    address = cluster.run(successor.start())
    with StateManager(address, token=cluster.token) as manager:
        Vm(manager, "vm-1", tmp_path).assert_restores(snapshot)
    vm.assert_restores(snapshot)
    cluster.run(successor.stop())
