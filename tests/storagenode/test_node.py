"""A node's life: joining, restarting alone, refusing foreign clusters, its directory's lock, the command."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.clock import SystemClock
from holdfast_proto.v1 import blocks_pb2 as pb
from holdfast_storagenode.datadir import DataDirectory
from holdfast_storagenode.embedded import EmbeddedStorageNode
from holdfast_storagenode.home import MemoryHome
from holdfast_storagenode.node import NodeSettings, StorageNode
from tests.storagenode.blocks import make_blocks
from tests.storagenode.cluster import HeartbeatCoordinator, NodeClient, eventually, make_layout, mint, refusal
from tests.storagenode.remote import batch_of, unpack

ROOT = Path(__file__).parents[2]
BLOCKS = make_blocks(3)
GET = pb.GetBlocksRequest(block_ids=b"".join(block.id for block in BLOCKS))


def random_bytes(size: int) -> bytes:
    return b"\x07" * size


async def joined(coordinator: HeartbeatCoordinator) -> None:
    """Wait until a node says that it knows the layout."""
    await eventually(lambda: any(beat.status.layout_epoch for beat in coordinator.beats))


@pytest.mark.parametrize("on_disk", [True, False])
async def test_a_node_restarted_without_any_coordinator_still_serves(tmp_path: Path, on_disk: bool) -> None:
    coordinator = HeartbeatCoordinator(layout=make_layout())
    address = await coordinator.start()
    node = EmbeddedStorageNode("node-1", [address], data_dir=tmp_path if on_disk else None, heartbeat_s=0.05)
    client = NodeClient(await node.start(), mint(coordinator.signer))
    await joined(coordinator)
    await client.put([batch_of(BLOCKS)])
    await client.close()
    incarnation = coordinator.beats[-1].incarnation
    await node.stop()
    await coordinator.stop()
    client = NodeClient(await node.start(), mint(coordinator.signer))
    assert unpack(await client.stream("GetBlocks", GET), [block.id for block in BLOCKS]) == BLOCKS
    error = await refusal(client.put([batch_of(BLOCKS, layout_epoch=0)]))
    assert error.code is ErrorCode.WRONG_EPOCH, "it knows the layout that it knew"
    await client.close()
    await node.stop()
    again = HeartbeatCoordinator(layout=make_layout())
    node = EmbeddedStorageNode("node-1", [await again.start()], data_dir=tmp_path, heartbeat_s=0.05)
    await node.start()
    await eventually(lambda: bool(again.beats))
    assert (again.beats[0].incarnation == incarnation) is on_disk
    await node.stop()
    await again.stop()


async def test_before_a_layout_is_known_the_node_takes_no_blocks(tmp_path: Path) -> None:
    coordinator = HeartbeatCoordinator()
    node = EmbeddedStorageNode("node-1", [await coordinator.start()], data_dir=tmp_path, heartbeat_s=0.05)
    client = NodeClient(await node.start(), mint(coordinator.signer))
    await eventually(lambda: len(coordinator.beats) > 1)
    for work in (client.put([batch_of(BLOCKS)]), client.stream("GetBlocks", GET)):
        assert (await refusal(work)).code is ErrorCode.NOT_READY
    assert (await client.call("GetNodeStatus", pb.GetNodeStatusRequest())).status.capacity_bytes > 0
    coordinator.layout = make_layout()
    await joined(coordinator)
    assert len(await client.put([batch_of(BLOCKS)])) == 1
    assert coordinator.beats[-1].lease_id == 41, "the lease travels with the heartbeat"
    assert node.core.lapses == 0
    coordinator.lease_id = 42
    await eventually(lambda: coordinator.beats[-1].lease_id == 42)
    assert node.core.lapses == 1, "another lease says that the one before had ended"
    await client.close()
    await node.stop()
    await coordinator.stop()


async def test_a_node_that_no_coordinator_ever_told_anything_says_so(tmp_path: Path) -> None:
    node = EmbeddedStorageNode("node-1", ["127.0.0.1:1"], data_dir=tmp_path, heartbeat_s=0.05)
    client = NodeClient(await node.start(), "")
    assert (await refusal(client.stream("GetBlocks", GET))).code is ErrorCode.NOT_READY
    await client.close()
    await node.stop()


async def test_the_first_coordinator_of_another_cluster_ends_the_node() -> None:
    home = MemoryHome("node-1", random_bytes=random_bytes)
    right = HeartbeatCoordinator(layout=make_layout())
    node = StorageNode(home, NodeSettings(coordinators=(await right.start(),), heartbeat_s=0.05), clock=SystemClock())
    await node.start()
    await joined(right)
    await node.stop(0.1)
    await right.stop()
    for wrong in (
        HeartbeatCoordinator(layout=make_layout(), cluster_id="d" * 32),
        HeartbeatCoordinator(layout=make_layout(2, seed=8)),
        HeartbeatCoordinator(layout=make_layout(2, partitions=32)),
    ):
        settings = NodeSettings(coordinators=(await wrong.start(),), heartbeat_s=0.05)
        node = StorageNode(home, settings, clock=SystemClock())
        await node.start()
        error = await asyncio.wait_for(node.failed(), 10)
        assert error.code is ErrorCode.MISMATCH
        await node.stop(0.1)
        await wrong.stop()


async def test_a_foreign_answer_later_is_refused_and_the_node_serves_on() -> None:
    coordinator = HeartbeatCoordinator(layout=make_layout())
    node = EmbeddedStorageNode("node-1", [await coordinator.start()], heartbeat_s=0.05)
    client = NodeClient(await node.start(), mint(coordinator.signer))
    await joined(coordinator)
    coordinator.cluster_id, coordinator.layout = "d" * 32, make_layout(9, seed=3)
    count = len(coordinator.beats)
    await eventually(lambda: len(coordinator.beats) > count + 2)
    assert len(await client.put([batch_of(BLOCKS)])) == 1, "epoch 9 was not learnt"
    await client.close()
    await node.stop()
    await coordinator.stop()


async def test_an_older_layout_is_not_taken_back() -> None:
    coordinator = HeartbeatCoordinator(layout=make_layout(5))
    node = EmbeddedStorageNode("node-1", [await coordinator.start()], heartbeat_s=0.05)
    await node.start()
    await joined(coordinator)
    coordinator.layout = make_layout(4)
    count = len(coordinator.beats)
    await eventually(lambda: len(coordinator.beats) > count + 2)
    assert coordinator.beats[-1].status.layout_epoch == 5
    await node.stop()
    await coordinator.stop()


def test_a_directory_belongs_to_one_process_and_one_node(tmp_path: Path) -> None:
    first = DataDirectory.open(tmp_path, node_id="node-1", random_bytes=random_bytes)
    with pytest.raises(HoldfastError) as refused:
        DataDirectory.open(tmp_path, node_id="node-1", random_bytes=random_bytes)
    assert refused.value.code is ErrorCode.CONFLICT
    first.close()
    with pytest.raises(HoldfastError) as refused:
        DataDirectory.open(tmp_path, node_id="node-2", random_bytes=random_bytes)
    assert refused.value.code is ErrorCode.MISMATCH
    again = DataDirectory.open(tmp_path, node_id=None, random_bytes=os.urandom)
    assert again.identity == first.identity
    again.close()
    (tmp_path / "node.json").write_text("{}")
    with pytest.raises(HoldfastError) as refused:
        DataDirectory.open(tmp_path, node_id=None, random_bytes=random_bytes)
    assert refused.value.code is ErrorCode.CORRUPT
    (tmp_path / "node.json").unlink()
    (tmp_path / "segments").mkdir()
    with pytest.raises(HoldfastError) as refused:
        DataDirectory.open(tmp_path, node_id=None, random_bytes=random_bytes)
    assert refused.value.code is ErrorCode.CORRUPT, "blocks without an identity are not given a new one"
    with pytest.raises(HoldfastError) as refused:
        DataDirectory.open(tmp_path / "lock" / "x", node_id=None, random_bytes=random_bytes)
    assert refused.value.code is ErrorCode.INVALID_ARGUMENT


@pytest.mark.slow
async def test_the_command_serves_says_where_and_drains_on_sigterm(tmp_path: Path) -> None:
    coordinator = HeartbeatCoordinator(layout=make_layout())
    address = await coordinator.start()
    program = "import typer, sys; from holdfast_storagenode.main import command; typer.run(command)"
    process = await asyncio.to_thread(
        subprocess.Popen,
        [sys.executable, "-c", program, "--data", str(tmp_path), "--bind", "127.0.0.1:0", "--node-id", "node-7"],
        env=os.environ | {"HOLDFAST_COORDINATOR": address, "HOLDFAST_ZONE": "zone-b", "HOLDFAST_CAPACITY": "64MiB"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    try:
        line = await asyncio.to_thread(process.stdout.readline)
        word, where = line.split()
        assert word == "listening"
        await joined(coordinator)
        status = coordinator.beats[-1].status
        assert (status.node_id, status.zone, status.address, status.capacity_bytes) == (
            "node-7",
            "zone-b",
            where,
            64 << 20,
        )
        client = NodeClient(where, mint(coordinator.signer))
        await client.put([batch_of(BLOCKS)])
        await client.close()
    finally:
        process.send_signal(signal.SIGTERM)
        output, log = await asyncio.to_thread(process.communicate)
    assert process.returncode == 0, log
    assert output == "", "one line on stdout"
    events = [json.loads(entry)["event"] for entry in log.splitlines()]
    assert "joined" in events
    assert events[-1] == "stopped"
    await coordinator.stop()
