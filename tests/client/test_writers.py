"""Writers that may not read: a backup agent and an application that save, and get nothing back (ADR 0083)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from holdfast import MemoryDiffSource, Reading
from holdfast.testing import MemoryCluster
from holdfast_core.model.block import Kind
from holdfast_core.model.errors import ErrorCode
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_proto.v1.blocks_pb2 import VERDICT_DENIED, VERDICT_OK
from holdfast_proto.v1.common_pb2 import Grant
from tests.client.rig import BLOCK, Vm, data_ids, error_of, make_sparse, noise, write_at
from tests.coordinator.rig import Client

BINDINGS = [
    ("agent", "backup-writer", "vm/web-*"),
    ("robot", "restorer", "vm/web-*"),
    ("app", "app-writer", "task/train-*"),
    ("reader", "app-reader", "task/train-*"),
]


@pytest.fixture
def tokens(cluster: MemoryCluster) -> dict[str, str]:
    """Tokens by principal, and a policy that lets each do one thing."""

    async def made() -> dict[str, str]:
        admin = Client(cluster.coordinator_address, token=cluster.token)
        await admin.bind(*BINDINGS)
        found = {principal: await admin.new_token(principal) for principal, _, _ in BINDINGS}
        await admin.close()
        return found

    return asyncio.run(made())


def test_a_backup_agent_saves_what_only_others_restore(
    cluster: MemoryCluster, tokens: dict[str, str], tmp_path: Path
) -> None:
    agent, robot = (cluster.state_manager(token=tokens[name]) for name in ("agent", "robot"))
    vm = Vm(agent, "web-1", tmp_path)
    content = noise(40 * BLOCK)
    path = vm.volume(len(content), [(0, content)])
    vm.register()
    snapshot = vm.snapshot()
    write_at(path, 3 * BLOCK, noise(BLOCK, seed=2))
    write_at(path, 9 * BLOCK, content[:BLOCK])
    backup = agent.incremental_backup("web-1", snapshot)
    transfer = agent.last_transfer
    assert transfer is not None
    # It compares with its parent by the index alone, and knows again what was there.
    assert transfer.stats.changed_bytes == 2 * BLOCK
    assert transfer.stats.deduplicated_bytes == BLOCK
    for call in (
        lambda: vm.restored(snapshot, backup),
        lambda: agent.verify(backup),
        lambda: agent.forget(snapshot),
        lambda: agent.discard_vm("web-1"),
        lambda: agent.create_snapshot("db-1"),
    ):
        assert error_of(call).code is ErrorCode.DENIED
    Vm(robot, "web-1", tmp_path).assert_restores(snapshot, backup)
    assert error_of(lambda: robot.create_snapshot("web-1")).code is ErrorCode.DENIED


def test_a_backup_agent_follows_hints_and_lays_no_difference_over_what_it_may_not_read(
    cluster: MemoryCluster, tokens: dict[str, str], tmp_path: Path
) -> None:
    agent = cluster.state_manager(token=tokens["agent"])
    vm = Vm(agent, "web-1", tmp_path)
    path = vm.volume(40 * BLOCK, [(0, noise(40 * BLOCK))])
    vm.register()
    snapshot = vm.snapshot()
    write_at(path, 3 * BLOCK, noise(BLOCK, seed=2))
    backup = agent.incremental_backup("web-1", snapshot, changed=[(3 * BLOCK, 1)], since=snapshot, sample=1)
    assert agent.point(backup).volumes[0].reading is Reading.CHANGED
    assert agent.point(backup).stats.sampled_bytes == 39 * BLOCK
    diff = make_sparse(tmp_path / "diff", 40 * BLOCK, [(0, b"dirty")])
    error = error_of(
        lambda: agent.incremental_backup("web-1", snapshot, sources={"root": MemoryDiffSource(diff, since=backup)})
    )
    assert error.code is ErrorCode.DENIED


def test_a_backup_agent_makes_no_deltas_until_it_may_restore(
    cluster: MemoryCluster, tokens: dict[str, str], tmp_path: Path
) -> None:
    agent = Vm(cluster.state_manager(token=tokens["agent"]), "web-1", tmp_path)
    both = Vm(cluster.state_manager(), "web-1", tmp_path)
    path = agent.volume(8 * BLOCK, [(0, noise(8 * BLOCK))])
    agent.register()
    snapshot = agent.snapshot()
    for vm, deltas in ((agent, 0), (both, 1)):
        write_at(path, 3 * BLOCK, f"{deltas} bytes differ".encode())
        backup = vm.manager.incremental_backup("web-1", snapshot)
        stats = both.manager.point(backup).stats
        assert (stats.changed_blocks, stats.delta_blocks) == (1, deltas)
        both.assert_restores(snapshot, backup)


def test_an_application_saves_what_only_others_read(cluster: MemoryCluster, tokens: dict[str, str]) -> None:
    app, reader = (cluster.state_manager(token=tokens[name]) for name in ("app", "reader"))
    data = noise(BLOCK * 5 + 7)
    storage_id = app.persist_application_data("train-1", data)
    assert error_of(lambda: app.retrieve_application_data(storage_id)).code is ErrorCode.DENIED
    assert error_of(lambda: app.persist_application_data("other", data)).code is ErrorCode.DENIED
    assert reader.retrieve_application_data(storage_id) == data
    assert error_of(lambda: reader.forget_application_data(storage_id)).code is ErrorCode.DENIED


def test_nodes_give_a_writer_the_index_and_no_data(
    cluster: MemoryCluster, tokens: dict[str, str], tmp_path: Path
) -> None:
    vm = Vm(cluster.state_manager(token=tokens["agent"]), "web-1", tmp_path)
    vm.volume(8 * BLOCK, [(0, noise(8 * BLOCK))])
    vm.register()
    snapshot = vm.snapshot()
    data, index = (data_ids(cluster, 0, int(kind)) for kind in (Kind.VOLUME, Kind.INDEX))
    assert len(data) == 8

    async def verdicts(grant: Grant) -> tuple[set[int], set[int]]:
        async with NodePool() as pool:
            pool.update(grant.nodes)
            found = []
            for block_ids in (data, index):
                seen: set[int] = set()
                async for answer in pool.get_blocks("node-1", block_ids, grant.capability):
                    seen.update(answer.verdicts)
                    assert len(answer.blocks) == 0 or seen == {VERDICT_OK}
                found.append(seen)
            return found[0], found[1]

    async def asked() -> None:
        agent, admin = (Client(cluster.coordinator_address, token=token) for token in (tokens["agent"], cluster.token))
        begun = await agent.begin("web-1", incremental=True, snapshot_id=snapshot)
        assert await verdicts(begun.grant) == ({VERDICT_DENIED}, {VERDICT_OK})
        begun = await admin.begin("web-1", incremental=True, snapshot_id=snapshot, takeover=True)
        assert await verdicts(begun.grant) == ({VERDICT_OK}, {VERDICT_OK})
        await agent.close()
        await admin.close()

    asyncio.run(asked())
