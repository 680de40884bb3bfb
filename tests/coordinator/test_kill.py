"""Coordinators as processes over one etcd, one of them killed with SIGKILL while clients commit through it."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import pytest

from holdfast_coordinator.keyspace import TenantKeyspace, point_place
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.credentials import write_token
from holdfast_core.runtime.metadata.etcd import EtcdStore
from holdfast_core.runtime.metadata.store import Operation, Put
from holdfast_proto.v1 import state_pb2
from holdfast_proto.v1.records_pb2 import PointRecord
from tests.coordinator.rig import ADMIN_TOKEN, MASTER_KEY, Client, coordinator, eventually, refused, zero_commit
from tests.support.etcd import EtcdCluster

ROUNDS = 4
POINTS = 4000
PROGRAM = """
import typer
from holdfast_coordinator.main import command
app = typer.Typer()
app.command()(command)
app()
"""


class Process:
    """One `holdfast coordinator`, started again after each kill."""

    def __init__(self, endpoints: str, directory: Path) -> None:
        key = directory / "master.key"
        key.write_bytes(MASTER_KEY)
        token = directory / "admin.token"
        write_token(token, ADMIN_TOKEN)
        self._arguments = ["--etcd", endpoints, "--master-key", str(key), "--bind", "127.0.0.1:0"]
        self._arguments += ["--admin-token-file", str(token)]
        self._log = directory / "coordinator.log"
        self._process: subprocess.Popen[str] | None = None

    async def start(self) -> Client:
        """Start it and return a client once it serves."""
        line = await asyncio.wait_for(asyncio.to_thread(self._start), 30)
        assert line.startswith("listening "), self._log.read_text()
        return Client(line.removeprefix("listening ").strip())

    def _start(self) -> str:
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *self._arguments],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={name: value for name, value in os.environ.items() if not name.startswith("HOLDFAST_")},
            )
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def kill(self) -> None:
        """End it with SIGKILL and wait until it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None


@pytest.fixture
async def etcd(tmp_path: Path) -> AsyncIterator[tuple[EtcdCluster, EtcdStore]]:
    """An etcd of the test's own, and a store over it."""
    with EtcdCluster(1, tmp_path / "etcd") as cluster:
        store = await EtcdStore.open(cluster.endpoints)
        try:
            yield cluster, store
        finally:
            await store.close()


@pytest.fixture
async def processes(etcd: tuple[EtcdCluster, EtcdStore], tmp_path: Path) -> AsyncIterator[tuple[Process, Client]]:
    """A process to be killed, and a client of a coordinator that lives, over one etcd."""
    cluster, store = etcd
    async with AsyncExitStack() as stack:
        living = await stack.enter_async_context(coordinator(store))
        process = Process(",".join(cluster.endpoints), tmp_path)
        stack.callback(process.kill)
        yield process, living


async def _save(mortal: Client, living: Client, vm_id: str, source: random.Random) -> str:
    """Make a point through the mortal one, and on the living one whatever that leaves unanswered."""
    nonce = source.randbytes(16)
    try:
        begun = await mortal.begin(vm_id, nonce=nonce)
    except HoldfastError as error:
        if error.code is not ErrorCode.UNREACHABLE:
            raise
        begun = await living.begin(vm_id, nonce=nonce)
    request = zero_commit(begun)
    try:
        return str((await mortal.commit(request)).point_id)
    except HoldfastError as error:
        if error.code is not ErrorCode.UNREACHABLE:
            raise
        return str((await living.commit(request)).point_id)


async def _reached(acknowledged: Mapping[str, Sequence[str]], target: int) -> bool:
    return sum(map(len, acknowledged.values())) >= target


@pytest.mark.slow
async def test_points_survive_coordinators_killed_in_mid_commit(processes: tuple[Process, Client]) -> None:
    process, living = processes
    await living.form_layout()
    vms = [f"vm-{number}" for number in range(4)]
    for vm_id in vms:
        await living.register_vm(vm_id)
    acknowledged: dict[str, list[str]] = {vm_id: [] for vm_id in vms}

    async def work(vm_id: str, mortal: Client, killed: asyncio.Event, source: random.Random) -> None:
        while not killed.is_set():
            acknowledged[vm_id].append(await _save(mortal, living, vm_id, source))

    for round_number in range(ROUNDS):
        mortal = await process.start()
        killed = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for position, vm_id in enumerate(vms):
                group.create_task(work(vm_id, mortal, killed, random.Random(100 * round_number + position)))
            target = sum(map(len, acknowledged.values())) + 8 + round_number
            await eventually(partial(_reached, acknowledged, target), "some points are made")
            await asyncio.to_thread(process.kill)
            killed.set()
        await mortal.close()
    for vm_id in vms:
        points = await living.points(vm_id)
        assert [point.point_id for point in points] == acknowledged[vm_id]
        assert [point.number for point in points] == list(range(1, len(points) + 1))
        assert len(set(acknowledged[vm_id])) == len(points) > 0
        # Nothing holds the VM any more.
        assert (await living.save(vm_id)).number == len(points) + 1


async def _give_points(store: EtcdStore, vm_id: str, count: int) -> str:
    """Write points of a VM, each charged with a byte, past the coordinators; return the newest."""
    space = TenantKeyspace(1)
    point_id = ""
    for first in range(1, count + 1, 40):
        operations: list[Operation] = []
        for number in range(first, min(first + 40, count + 1)):
            point_id = f"snap-{vm_id}-{number}"
            point = PointRecord(point_id=point_id, vm_id=vm_id, number=number, tenant=1, charged_bytes=1)
            place = point_place(vm_id, number)
            operations.append(Put(space.point(place), point.SerializeToString()))
            operations.append(Put(space.point_id(point_id), place.encode()))
        await store.txn([], operations)
    await store.txn([], [Put(space.point_number(vm_id), str(count).encode())])
    return point_id


@pytest.mark.slow
async def test_a_vm_is_discarded_by_coordinators_killed_in_mid_discard(
    processes: tuple[Process, Client], etcd: tuple[EtcdCluster, EtcdStore]
) -> None:
    process, living = processes
    _, store = etcd
    await living.form_layout()
    await living.register_vm("vm-1")
    newest = await _give_points(store, "vm-1", POINTS)
    request = state_pb2.DiscardVmRequest(vm_id="vm-1", newest_point_id=newest)
    before = POINTS

    async def left() -> int:
        return len((await store.snapshot([TenantKeyspace(1).points_of("vm-1")])).items)

    async def under_way() -> bool:
        return await left() < before

    for _ in range(ROUNDS // 2):
        mortal = await process.start()
        discarding = asyncio.create_task(mortal.state("DiscardVm", request))
        await eventually(under_way, "some points are gone")
        await asyncio.to_thread(process.kill)
        await refused(ErrorCode.UNREACHABLE, discarding)
        await mortal.close()
        before = await left()
        assert before
        assert (await living.points("vm-1"))[-1].point_id == newest
        await refused(ErrorCode.CONFLICT, living.begin("vm-1"))
    receipt = await living.state("DiscardVm", request)
    assert (receipt.point_count, receipt.released_bytes) == (POINTS, POINTS)
    assert await left() == 0
    assert await living.state("DiscardVm", request) == receipt
