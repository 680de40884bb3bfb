"""What one coordinator, a process of its own over SQLite, takes for ever more points, nodes and tenants."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.collection.services import Processes
from benchmarks.measure import stored_bytes
from holdfast.manager import StateManager
from holdfast_core.model.keys import KeyRing, TenantSecrets
from holdfast_core.model.records import point_mac
from holdfast_core.runtime.channels import open_channel
from holdfast_core.runtime.credentials import Credential
from holdfast_proto.v1 import cluster_pb2, state_pb2, tenants_pb2
from holdfast_proto.v1.cluster_pb2_grpc import ClusterServiceStub
from holdfast_proto.v1.common_pb2 import NodeStatus
from holdfast_proto.v1.records_pb2 import CONSISTENCY_OFFLINE, VmRecord, VolumeRecord, VolumeSpec
from holdfast_proto.v1.state_pb2_grpc import StateServiceStub
from holdfast_proto.v1.tenants_pb2_grpc import TenantServiceStub

_ASKED: Final = 50
_VOLUME: Final = VolumeRecord(name="disk", size_bytes=1 << 20, block_bytes=1 << 16, consistency=CONSISTENCY_OFFLINE)


def measure_nodes(folder: Path, sizes: Sequence[int], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Register ever more nodes, each cluster with a layout over all of them, and measure heartbeats there."""
    rows = []
    for count in sizes:
        processes = Processes(_made(folder / f"nodes-{count}"), nodes=count)
        try:
            processes.start_coordinator()
            row = asyncio.run(_beats(processes, count))
        finally:
            processes.stop()
        rows.append(row)
        say(f"nodes: {row}")
    return rows


async def _beats(processes: Processes, count: int) -> dict[str, Any]:
    metadata = Credential(token_file=processes.folder / "node.token").metadata()
    async with open_channel(processes.address) as channel:
        cluster = ClusterServiceStub(channel)

        async def beat(number: int, lease_id: int, revision: int) -> cluster_pb2.HeartbeatResponse:
            status = NodeStatus(
                node_id=f"node-{number:05}",
                address=f"10.0.{number >> 8}.{number & 255}:7410",
                zone=f"zone-{number % 10}",
                capacity_bytes=1 << 40,
            )
            request = cluster_pb2.HeartbeatRequest(
                status=status, lease_id=lease_id, incarnation=number.to_bytes(16, "big"), layout_revision=revision
            )
            answer: cluster_pb2.HeartbeatResponse = await cluster.Heartbeat(request, metadata=metadata, timeout=60)
            return answer

        answers = [await beat(number, 0, 0) for number in range(count)]
        row: dict[str, Any] = {"nodes": count}
        for kind, revision in (("steady", (await beat(0, answers[0].lease_id, 0)).layout_revision), ("changed", 0)):
            cpu_s, start_s, size = processes.cpu_s("coordinator"), time.monotonic(), 0
            for turn in range(_ASKED):
                number = turn % count
                answers[number] = await beat(number, answers[number].lease_id, revision)
                size = answers[number].ByteSize()
            row[f"{kind}_cpu_ms"] = 1000 * (processes.cpu_s("coordinator") - cpu_s) / _ASKED
            row[f"{kind}_ms"] = 1000 * (time.monotonic() - start_s) / _ASKED
            row[f"{kind}_answer_bytes"] = size
        row["rss_mb"] = processes.rss_bytes("coordinator") / 1e6
        return row


def measure_points(folder: Path, sizes: Sequence[int], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Make ever more points of one VM, of one volume of zeros each, and measure the calls there."""
    processes = Processes(_made(folder / "points"))
    try:
        processes.start_coordinator()
        processes.start_nodes()
        with StateManager(processes.address, token_file=processes.token_file) as manager:
            _wait(lambda: manager.cluster_status().writable)
        return asyncio.run(_points(processes, sizes, say))
    finally:
        processes.stop()


async def _points(processes: Processes, sizes: Sequence[int], say: Callable[[str], None]) -> list[dict[str, Any]]:
    metadata = Credential(token_file=processes.token_file).metadata()
    rows: list[dict[str, Any]] = []
    async with open_channel(processes.address) as channel:
        state = StateServiceStub(channel)
        vm = VmRecord(vm_id="vm", volumes=[VolumeSpec(name="disk", uri="/dev/null")])
        await state.RegisterVm(state_pb2.RegisterVmRequest(vm=vm), metadata=metadata)
        count = 0
        for size in sizes:
            begin_s, commit_s, made = 0.0, 0.0, 0
            cpu_s = processes.cpu_s("coordinator")
            while count < size:
                started_s = time.monotonic()
                request = state_pb2.BeginPointRequest(vm_id="vm", nonce=os.urandom(16))
                begun = await state.BeginPoint(request, metadata=metadata)
                begun_s = time.monotonic()
                await state.CommitPoint(_commit(begun), metadata=metadata)
                if size - count <= _ASKED:
                    begin_s, commit_s = begin_s + begun_s - started_s, commit_s + time.monotonic() - begun_s
                    made += 1
                count += 1
            made_cpu_s = processes.cpu_s("coordinator") - cpu_s
            started_s = time.monotonic()
            listed = await state.ListPoints(state_pb2.ListPointsRequest(vm_id="vm"), metadata=metadata)
            row = {
                "points": size,
                "begin_ms": 1000 * begin_s / max(1, made),
                "commit_ms": 1000 * commit_s / max(1, made),
                "point_cpu_ms": 1000 * made_cpu_s / max(1, size - (rows[-1]["points"] if rows else 0)),
                "list_s": time.monotonic() - started_s,
                "list_bytes": listed.ByteSize(),
                "metadata_bytes": stored_bytes(processes.folder / "coordinator"),
                "rss_mb": processes.rss_bytes("coordinator") / 1e6,
            }
            rows.append(row)
            say(f"points: {row}")
    return rows


def _commit(begun: state_pb2.BeginPointResponse) -> state_pb2.CommitPointRequest:
    ring = KeyRing(TenantSecrets.from_message(begun.grant.keys))
    parent_id = begun.parent.point_id if begun.HasField("parent") else ""
    mac = point_mac(
        ring, tenant=ring.tenant, point_id=begun.session_id, vm_id="vm", parent_id=parent_id, volumes=[_VOLUME]
    )
    return state_pb2.CommitPointRequest(session_id=begun.session_id, volumes=[_VOLUME], mac=mac, parent_id=parent_id)


def measure_tenants(folder: Path, sizes: Sequence[int], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Make ever more tenants that keep nothing, and collect the cluster there."""
    processes = Processes(_made(folder / "tenants"))
    rows: list[dict[str, Any]] = []
    try:
        processes.start_coordinator()
        processes.start_nodes()
        with StateManager(processes.address, token_file=processes.token_file) as manager:
            _wait(lambda: manager.cluster_status().writable)
            count = 0
            for size in sizes:
                started_s, cpu_s, made = time.monotonic(), processes.cpu_s("coordinator"), size - count
                asyncio.run(_make_tenants(processes, range(count, size)))
                count = size
                row = {
                    "tenants": size,
                    "create_ms": 1000 * (time.monotonic() - started_s) / made,
                    "create_cpu_ms": 1000 * (processes.cpu_s("coordinator") - cpu_s) / made,
                    "rss_mb": processes.rss_bytes("coordinator") / 1e6,
                    "metadata_bytes": stored_bytes(processes.folder / "coordinator"),
                }
                started_s, cpu_s = time.monotonic(), processes.cpu_s("coordinator")
                manager.collect()
                row["collection_s"] = time.monotonic() - started_s
                row["collection_cpu_s"] = processes.cpu_s("coordinator") - cpu_s
                rows.append(row)
                say(f"tenants: {row}")
    finally:
        processes.stop()
    return rows


async def _make_tenants(processes: Processes, numbers: Sequence[int]) -> None:
    metadata = Credential(token_file=processes.token_file).metadata()
    async with open_channel(processes.address) as channel:
        tenants = TenantServiceStub(channel)
        for number in numbers:
            request = tenants_pb2.CreateTenantRequest(name=f"tenant-{number}")
            await tenants.CreateTenant(request, metadata=metadata)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _wait(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 120.0
    while not condition():
        if time.monotonic() > deadline_s:
            raise RuntimeError("the cluster takes no writes")
        time.sleep(0.1)
