"""A client with some rights in a tenant: what equal blocks and lengths tell it, and what its lies can spoil.

What it may not do at all is in tests/coordinator/test_permissions.py and tests/coordinator/test_guard.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast import Codec, StateManager
from holdfast.testing import MemoryCluster
from holdfast_core.model.block import Kind
from holdfast_core.model.errors import ErrorCode
from holdfast_core.model.tree import VolumeLeaf, VolumeTreeBuilder
from holdfast_proto.v1.records_pb2 import CONSISTENCY_OFFLINE, VolumeRecord
from tests.client.rig import BLOCK, TENANT, Vm, data_ids, error_of, noise, store_of
from tests.coordinator.content import Sealed, put
from tests.coordinator.rig import Client, point_commit, ring_of

SECRET = b"password=correct-horse-battery-staple;"


@pytest.fixture(scope="module")
def cluster() -> Iterator[MemoryCluster]:
    with MemoryCluster() as made:
        yield made


@pytest.fixture(scope="module")
def agent(cluster: MemoryCluster) -> StateManager:
    """Somebody who may write and restore VMs of his own name alone."""

    async def made() -> str:
        admin = Client(cluster.coordinator_address, token=cluster.token)
        await admin.bind(("mallory", "backup-writer", "vm/mine-*"))
        token = await admin.new_token("mallory")
        await admin.close()
        return token

    return cluster.state_manager(token=asyncio.run(made()))


def test_who_may_write_can_confirm_content_of_the_tenant_that_it_guesses(
    cluster: MemoryCluster, agent: StateManager, tmp_path: Path
) -> None:
    victim = Vm(cluster.state_manager(), "theirs", tmp_path)
    secret = noise(BLOCK, seed=11)
    victim.volume(4 * BLOCK, [(BLOCK, secret)])
    victim.register()
    victim.snapshot()
    for guess, right in ((noise(BLOCK, seed=12), False), (secret[:-1] + b"!", False), (secret, True)):
        mine = Vm(agent, "mine-1", tmp_path)
        mine.volume(BLOCK, [(0, guess)])
        mine.register()
        mine.snapshot()
        assert agent.last_transfer is not None
        assert agent.last_transfer.stats.deduplicated_bytes == (BLOCK if right else 0)
    assert error_of(lambda: agent.points("theirs")).code is ErrorCode.DENIED


def sealed_length(cluster: MemoryCluster, folder: Path, codec: Codec, guess: bytes) -> int:
    """Length of the sealed block of a volume where somebody placed bytes beside a secret."""
    vm = Vm(cluster.state_manager(), "beside", folder)
    before = set(data_ids(cluster, 0))
    page = SECRET + noise(1000, seed=5) + guess + noise(1000, seed=6)
    vm.volume(BLOCK, [(0, page)])
    vm.register(codec=codec)
    vm.snapshot()
    (new,) = set(data_ids(cluster, 0)) - before
    (found,) = store_of(cluster, 0).get(TENANT, [new], bytes_max=1 << 30)
    return len(found.data)  # type: ignore[union-attr]


def test_lengths_tell_of_a_secret_beside_placed_bytes_unless_they_are_stored_as_they_are(
    cluster: MemoryCluster, tmp_path: Path
) -> None:
    right, wrong = SECRET, noise(len(SECRET), seed=7)
    compressed, stored = (
        [sealed_length(cluster, tmp_path, codec, guess) for guess in (right, wrong)]
        for codec in (Codec.DEFAULT, Codec.STORED)
    )
    assert compressed[0] < compressed[1]
    assert stored[0] == stored[1]


@pytest.mark.slow
def test_an_index_that_lies_is_found_out_at_a_restore_and_spoils_only_what_builds_on_it(
    cluster: MemoryCluster, tmp_path: Path
) -> None:
    """Who may write a VM may commit a point that names a block for content that it is not."""
    honest = Vm(cluster.state_manager(), "shared-vm", tmp_path)
    content, other = noise(BLOCK, seed=21), noise(BLOCK, seed=22)
    honest.volume(BLOCK, [(0, content)])
    honest.register()
    lie = asyncio.run(commit_a_lie(cluster, "shared-vm", content, other))
    backup = honest.manager.incremental_backup("shared-vm", lie)
    for point in (lie, backup):
        error = error_of(lambda: honest.manager.verify(point))  # noqa: B023
        assert (error.code, error.facts["ranges"]) == (ErrorCode.CORRUPT, f"root:0-{BLOCK}")
    honest.assert_restores(honest.snapshot())


async def commit_a_lie(cluster: MemoryCluster, vm_id: str, said: bytes, kept: bytes) -> str:
    """Commit a point whose index says that a block holds `said`, and whose block holds `kept`; return its id."""
    client = Client(cluster.coordinator_address, token=cluster.token)
    begun = await client.begin(vm_id)
    ring = ring_of(begun.grant.keys)
    sealed = Sealed(ring)
    builder = VolumeTreeBuilder(1, lambda plain: sealed.keep(Kind.INDEX, plain))
    builder.add_leaf(0, VolumeLeaf((0,), (ring.fingerprint(said),), (sealed.keep(Kind.VOLUME, kept),), (b"",)))
    volume = VolumeRecord(
        name="root",
        size_bytes=BLOCK,
        block_bytes=BLOCK,
        root=builder.finish(),
        consistency=CONSISTENCY_OFFLINE,
        block_count=1,
    )
    await put(begun.grant, sealed.everything)
    point = await client.commit(point_commit(begun, [volume]))
    await client.close()
    return str(point.point_id)
