"""Storage nodes that lie: about bytes, about what they hold, about who may read; and what a node learns from calls."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from holdfast import StateManager
from holdfast.testing import MemoryCluster
from holdfast_core.model.block import Kind
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.capability import CAPABILITY_METADATA_KEY
from holdfast_proto.v1 import state_pb2
from holdfast_proto.v1.blocks_pb2 import VERDICT_OK, DeleteBlocksRequest, ScanBlocksRequest
from holdfast_proto.v1.blocks_pb2_grpc import BlockServiceStub
from holdfast_storagenode.memory import MemoryStore
from holdfast_storagenode.store import Sealed, Verdict, kind_of
from tests.client.rig import BLOCK, Vm, data_ids, error_of, noise, store_of
from tests.coordinator.rig import Client, refused

NODES = 3


@dataclass(frozen=True, slots=True)
class Told:
    """What a node says that a block is."""

    id: bytes
    data: bytes


Get = Callable[..., list[Any]]


def wrong_bytes(get: Get) -> Get:
    def lie(tenant: int, ids: Sequence[bytes], *, bytes_max: int) -> list[Any]:
        return [Told(block.id, os.urandom(len(block.data))) for block in get(tenant, ids, bytes_max=bytes_max)]

    return lie


def swapped_blocks(get: Get) -> Get:
    """Every block is a whole and valid one, but another than the one asked for."""

    def lie(tenant: int, ids: Sequence[bytes], *, bytes_max: int) -> list[Any]:
        found = get(tenant, ids, bytes_max=bytes_max)
        other = SPARE[0]
        return [Told(block.id, other) for block in found]

    return lie


def cut_short(get: Get) -> Get:
    def lie(tenant: int, ids: Sequence[bytes], *, bytes_max: int) -> list[Any]:
        return [Told(block.id, bytes(block.data)[:-1]) for block in get(tenant, ids, bytes_max=bytes_max)]

    return lie


def says(verdict: Verdict) -> Callable[[Get], Get]:
    return lambda get: lambda tenant, ids, *, bytes_max: [verdict] * len(ids)


LIES = {
    "wrong bytes": wrong_bytes,
    "swapped blocks": swapped_blocks,
    "bytes cut short": cut_short,
    "denies that it has them": says(Verdict.MISSING),
    "says that they are rotten": says(Verdict.CORRUPT),
    "refuses everybody": says(Verdict.DENIED),
}
SPARE: list[bytes] = []


@pytest.fixture(scope="module")
def shared() -> Iterator[MemoryCluster]:
    with MemoryCluster(nodes=NODES) as cluster:
        yield cluster


@pytest.fixture
def vm(shared: MemoryCluster, tmp_path: Path, request: pytest.FixtureRequest) -> Vm:
    made = Vm(shared.state_manager(), f"vm-{os.urandom(4).hex()}", tmp_path)
    made.volume(12 * BLOCK, [(0, noise(9 * BLOCK, seed=hash(made.name)))])
    made.register()
    return made


@pytest.mark.parametrize("how", LIES)
def test_what_one_node_says_is_read_around_and_what_all_say_is_refused(
    shared: MemoryCluster, vm: Vm, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    snapshot = vm.snapshot()
    stored = vm.manager.persist_application_data("task", noise(3 * BLOCK, seed=5))
    SPARE[:] = [bytes(store_of(shared, 0).get(1, data_ids(shared, 0)[:1], bytes_max=1 << 30)[0].data)]  # type: ignore[union-attr]
    for number in range(NODES):
        store = store_of(shared, number)
        monkeypatch.setattr(store, "get", LIES[how](store.get))
        if number < NODES - 1:
            with StateManager(shared.coordinator_address, token=shared.token) as fresh:
                Vm(fresh, vm.name, vm.folder).assert_restores(snapshot)
                assert fresh.retrieve_application_data(stored) == noise(3 * BLOCK, seed=5)
    with StateManager(shared.coordinator_address, token=shared.token) as fresh:
        for call in (
            lambda: Vm(fresh, vm.name, vm.folder).restored(snapshot),
            lambda: fresh.verify(snapshot),
            lambda: fresh.retrieve_application_data(stored),
        ):
            assert error_of(call).code in (ErrorCode.CORRUPT, ErrorCode.MISSING, ErrorCode.DENIED)
    assert len(list(vm.folder.glob("restored-*"))) == NODES - 1, "what failed has left nothing"


def keep_only(cluster: MemoryCluster, number: int, kinds: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a node take everything, keep some kinds of block, and say from then on that it has them all."""
    store = store_of(cluster, number)
    taken: set[bytes] = set()

    def put(tenant: int, blocks: Sequence[Sealed], *, stamp: int = 0) -> list[Verdict]:
        taken.update(block.id for block in blocks)
        MemoryStore.put(store, tenant, [block for block in blocks if kind_of(block.data) in kinds], stamp=stamp)
        return [Verdict.OK] * len(blocks)

    def has(tenant: int, ids: Sequence[bytes], *, verify: bool = False, stamp: int = 0) -> list[Verdict]:
        honest = MemoryStore.has(store, tenant, ids, verify=verify, stamp=stamp)
        return [Verdict.OK if block_id in taken else verdict for block_id, verdict in zip(ids, honest, strict=True)]

    monkeypatch.setattr(store, "put", put)
    monkeypatch.setattr(store, "has", has)


def test_a_node_that_keeps_nothing_of_what_it_took_loses_nothing_alone(
    shared: MemoryCluster, vm: Vm, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_only(shared, 1, set(), monkeypatch)
    snapshot = vm.snapshot()
    vm.assert_restores(snapshot)
    shared.stop_node(2)
    vm.assert_restores(snapshot)
    shared.start_node(2)


def test_nodes_that_keep_nothing_are_believed_about_data_until_somebody_reads_it(
    shared: MemoryCluster, vm: Vm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many liars as copies: the point is lost. To fetch is to know, which is what `verify` is for."""
    for number in range(NODES):
        keep_only(shared, number, set(), monkeypatch)
    # A coordinator reads the index before a commit, so who keeps none of that is found out at once.
    assert error_of(vm.snapshot).code in (ErrorCode.NOT_DURABLE, ErrorCode.MISSING)
    monkeypatch.undo()
    vm.volume(12 * BLOCK, [(0, noise(9 * BLOCK, seed=77))])
    for number in range(NODES):
        keep_only(shared, number, {int(Kind.INDEX)}, monkeypatch)
    snapshot = vm.snapshot()
    assert vm.manager.verify(snapshot, node_only=True).blocks > 0
    for call in (lambda: vm.manager.verify(snapshot), lambda: vm.restored(snapshot)):
        assert error_of(call).code is ErrorCode.MISSING


def test_a_node_that_refuses_to_check_its_copies_keeps_nobody_from_checking(
    shared: MemoryCluster, vm: Vm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does whose clock is hours off; only what all refuse is refused."""

    def refuse(*_: object, **__: object) -> list[Verdict]:
        raise HoldfastError(ErrorCode.DENIED, "the capability has expired")

    snapshot = vm.snapshot()
    for number in range(NODES):
        monkeypatch.setattr(store_of(shared, number), "has", refuse)
        if number < NODES - 1:
            report = vm.manager.survey(snapshot, node_only=True)
            assert report.thin_blocks >= report.blocks > 0
            assert not report.damage
    assert error_of(lambda: vm.manager.survey(snapshot, node_only=True)).code is ErrorCode.DENIED


@pytest.mark.slow
def test_a_capability_that_a_node_saw_gives_sealed_blocks_and_deletes_nothing(shared: MemoryCluster, vm: Vm) -> None:
    """A node may use what a reader shows it, while it lasts, at other nodes: it gets there what it is itself given."""
    snapshot = vm.snapshot()
    ids = data_ids(shared, 1, int(Kind.VOLUME))

    async def replay() -> None:
        reader = Client(shared.coordinator_address, token=shared.token)
        grant = (await reader.state("ResolvePoint", state_pb2.ResolvePointRequest(snapshot_id=snapshot))).grant
        metadata = ((CAPABILITY_METADATA_KEY, grant.capability),)
        async with NodePool() as pool:
            pool.update(grant.nodes)
            answers = [answer async for answer in pool.get_blocks("node-2", ids, grant.capability)]
            assert {verdict for answer in answers for verdict in answer.verdicts} == {VERDICT_OK}
            content = vm.path().read_bytes()
            assert not any(content[:64] in bytes(answer.blocks) for answer in answers)
            stub = BlockServiceStub(pool.channel("node-2"))
            await denied(stub.DeleteBlocks(DeleteBlocksRequest(block_ids=ids[0]), metadata=metadata))
            await denied(stub.ScanBlocks(ScanBlocksRequest(), metadata=metadata).read())
        # At the coordinator it is nothing: it is no token.
        stranger = Client(shared.coordinator_address, token=grant.capability)
        await refused(ErrorCode.UNAUTHENTICATED, stranger.points(vm.name))
        await stranger.close()
        await reader.close()

    asyncio.run(replay())


async def denied(call: Any) -> None:
    """Await a raw call to a node that must be refused."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
