"""A stolen credential of a backup agent: what it cannot do, and what it still can, so that nobody believes otherwise.

That nodes give it no data and the coordinator no restore is in tests/client/test_writers.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.testing import MemoryCluster
from holdfast_core.model.block import Kind, SealedBlock, verify
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.keys import KeyRing
from holdfast_proto.v1 import access_pb2, keys_pb2
from tests.client.keyed import ask_cluster
from tests.client.rig import BLOCK, TENANT, MemorySource, Vm, data_ids, error_of, noise, store_of
from tests.coordinator.rig import Client, ring_of


@pytest.fixture
def cluster() -> Iterator[MemoryCluster]:
    with MemoryCluster() as made:
        yield made


@pytest.fixture
def stolen(cluster: MemoryCluster) -> str:
    """The token of a backup agent for all VMs."""

    async def made() -> str:
        admin = Client(cluster.coordinator_address, token=cluster.token)
        await admin.bind(("agent", "backup-writer", "vm/*"))
        token = await admin.new_token("agent")
        await admin.close()
        return token

    return asyncio.run(made())


def begun_by(cluster: MemoryCluster, token: str, **fields: Any) -> Any:
    """Begin a point of web-1 past the SDK."""

    async def begin() -> Any:
        thief = Client(cluster.coordinator_address, token=token)
        begun = await thief.begin("web-1", takeover=True, **fields)
        await thief.close()
        return begun

    return asyncio.run(begin())


def blocks(cluster: MemoryCluster) -> dict[bytes, SealedBlock]:
    """The data blocks on a node's disk."""
    ids = data_ids(cluster, 0, int(Kind.VOLUME))
    found = store_of(cluster, 0).get(TENANT, ids, bytes_max=1 << 30)
    return {block.id: verify(block.id, bytes(block.data)) for block in found}  # type: ignore[union-attr]


def opens(ring: KeyRing, block: SealedBlock) -> bool:
    """Whether a block opens; if not, because the key of its epoch is not there."""
    try:
        ring.opener().open(block)
    except HoldfastError as error:
        if error.code is not ErrorCode.KEY_MISMATCH:
            raise
        return False
    return True


def test_beside_a_stolen_disk_its_key_opens_the_epoch_that_it_writes_in_and_no_other(
    cluster: MemoryCluster, stolen: str, tmp_path: Path
) -> None:
    vm = Vm(cluster.state_manager(), "web-1", tmp_path)
    vm.volume(8 * BLOCK, [(0, noise(8 * BLOCK))])
    vm.register()
    vm.snapshot()
    first = blocks(cluster)
    before = ring_of(begun_by(cluster, stolen).grant.keys)
    assert all(opens(before, block) for block in first.values())

    ask_cluster(cluster, "keys", "RotateTenantKeys", keys_pb2.RotateTenantKeysRequest(data=True))
    after = ring_of(begun_by(cluster, stolen).grant.keys)
    vm.volume(8 * BLOCK, [(0, noise(8 * BLOCK, seed=2))])
    vm.manager.create_snapshot("web-1", takeover=True)
    second = {block_id: block for block_id, block in blocks(cluster).items() if block_id not in first}
    assert len(second) == 8
    assert not any(opens(before, block) for block in second.values())
    assert not any(opens(after, block) for block in first.values())


def test_it_can_break_off_the_work_of_others_and_leaves_what_is_visible(
    cluster: MemoryCluster, stolen: str, tmp_path: Path
) -> None:
    vm = Vm(cluster.state_manager(), "web-1", tmp_path)
    vm.volume(8 * BLOCK, [(0, noise(8 * BLOCK))])
    vm.register()
    snapshot = vm.snapshot()
    source = MemorySource(noise(8 * BLOCK, seed=3), at_read=lambda _: begun_by(cluster, stolen))
    error = error_of(lambda: vm.manager.create_snapshot("web-1", sources={"root": source}))
    assert error.code is ErrorCode.SESSION_LAPSED
    vm.assert_restores(snapshot)
    assert [point.point_id for point in vm.manager.points("web-1")] == [snapshot]


def test_it_is_worth_nothing_from_the_moment_that_it_is_revoked(
    cluster: MemoryCluster, stolen: str, tmp_path: Path
) -> None:
    vm = Vm(cluster.state_manager(), "web-1", tmp_path)
    vm.volume(BLOCK, [(0, noise(BLOCK))])
    vm.register()
    thief = cluster.state_manager(token=stolen)
    request = access_pb2.RevokeTokenRequest(token_id=stolen.split("_")[1])

    async def revoke() -> None:
        admin = Client(cluster.coordinator_address, token=cluster.token)
        await admin.access("RevokeToken", request)
        await admin.close()

    source = MemorySource(noise(BLOCK), at_read=lambda _: asyncio.run(revoke()))
    error = error_of(lambda: thief.create_snapshot("web-1", sources={"root": source}))
    assert error.code is ErrorCode.UNAUTHENTICATED
    assert error_of(thief.list_vms).code is ErrorCode.UNAUTHENTICATED
    assert vm.manager.points("web-1") == []
