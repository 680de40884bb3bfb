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

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.credentials import write_token
from holdfast_core.runtime.metadata.etcd import EtcdStore
from tests.coordinator.rig import ADMIN_TOKEN, MASTER_KEY, Client, coordinator, eventually, zero_commit
from tests.support.etcd import EtcdCluster

ROUNDS = 4
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
async def processes(tmp_path: Path) -> AsyncIterator[tuple[Process, Client]]:
    """A process to be killed, and a client of a coordinator that lives, over one etcd."""
    async with AsyncExitStack() as stack:
        etcd = stack.enter_context(EtcdCluster(1, tmp_path / "etcd"))
        store = await EtcdStore.open(etcd.endpoints)
        stack.push_async_callback(store.close)
        living = await stack.enter_async_context(coordinator(store))
        process = Process(",".join(etcd.endpoints), tmp_path)
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
