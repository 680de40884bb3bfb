"""`holdfast up`: a whole cluster in the foreground, each service a process of its own, on this machine only.

What it decides when a service dies unexpectedly: a storage node that dies is told on stderr and the others go on, as in
any cluster; nothing is restarted, so that a test which kills a node sees a dead node. Without its coordinator the
cluster answers nobody, so then `up` drains the nodes and ends with exit code 1.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer

from holdfast.cli.children import Child
from holdfast.cli.directory import UpDirectory, opened, token_at_home
from holdfast.cli.exits import DONE, FAILED, say
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import NODES_MAX, REPLICAS_DEFAULT
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.clock import Clock, SystemClock
from holdfast_core.runtime.credentials import Credential
from holdfast_core.runtime.options import format_address
from holdfast_core.runtime.signals import termination_signals

app = typer.Typer()

DEFAULT_DATA: Final = Path("holdfast-data")
DEFAULT_PORT: Final = 7400
DEFAULT_NODES: Final = 3
_HOST: Final = "127.0.0.1"
_START_S: Final = 60.0
_POLL_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class UpSettings:
    """What `up` was asked for; None where nothing was said."""

    data: Path = DEFAULT_DATA
    port: int = DEFAULT_PORT
    nodes: int | None = None
    replicas: int | None = None
    etcd: str | None = None
    old_master_key: Path | None = None


@app.command("up")
def up(
    nodes: Annotated[
        int | None,
        typer.Option("--nodes", metavar="N", min=1, max=NODES_MAX, help="Storage nodes; 3, or as many as DIR has."),
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option("--replicas", metavar="R", min=1, help="Copies of each block; 3, or N if that is fewer."),
    ] = None,
    data: Annotated[Path, typer.Option("--data", metavar="DIR", help="Where everything is kept.")] = DEFAULT_DATA,
    port: Annotated[
        int, typer.Option("--port", metavar="P", min=0, max=65535, help="Port of the coordinator; 0 takes a free one.")
    ] = DEFAULT_PORT,
    etcd: Annotated[
        str | None,
        typer.Option("--etcd", metavar="HOST:PORT", help="Keep the metadata in this etcd, not in DIR/coordinator."),
    ] = None,
    old_master_key: Annotated[
        Path | None,
        typer.Option(
            "--old-master-key",
            metavar="FILE",
            help="What DIR/master.key was before, until `holdfast keys rewrap` has run.",
        ),
    ] = None,
) -> None:
    """Run a whole cluster in the foreground; prints `ready coordinator=HOST:PORT` when it can be used.

    SIGTERM or Ctrl-C stops it cleanly, and DIR survives: the next `up` on it goes on. DIR/master.key seals the data;
    losing it loses the data. A storage node that dies is told and the others go on. Callers of the same user find
    their token by themselves; others need --token-file DIR/admin.token.
    """
    settings = UpSettings(data, port, nodes, replicas, etcd, old_master_key)
    code = asyncio.run(run_up(settings, clock=SystemClock()))
    if code:
        raise typer.Exit(code)


async def run_up(settings: UpSettings, *, clock: Clock) -> int:
    """Run the cluster until a signal comes or the coordinator dies; return the exit code.

    Raises:
        HoldfastError: INVALID_ARGUMENT for options that contradict each other or the directory; CONFLICT if another
            `up` runs there; KEY_MISMATCH if its master key is gone; NOT_READY if a service does not start.
    """
    with opened(settings.data.absolute()) as directory, termination_signals() as asked:
        plan = _Plan.of(settings, directory)
        directory.draw_tokens(os.urandom)
        serving = asyncio.ensure_future(_serve(plan, directory, clock))
        stopping = asyncio.ensure_future(asked.wait())
        try:
            await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                return serving.result()
            say("stopping")
            return DONE
        finally:
            for task in (serving, stopping):
                task.cancel()
            await asyncio.gather(serving, stopping, return_exceptions=True)


async def _serve(plan: _Plan, directory: UpDirectory, clock: Clock) -> int:
    """Start everything, announce it, and watch it; whatever ends this, the services are drained before it returns."""
    children: list[Child] = []
    try:
        coordinator = await plan.start_coordinator(directory)
        children.append(coordinator)
        _tell_key(directory, made=plan.new)

        async def start_node(number: int) -> None:
            children.append(await plan.start_node(number, directory, coordinator.address))

        with token_at_home(directory, coordinator.address):
            async with plain_task_group() as group:
                for number in range(1, plan.node_count + 1):
                    group.create_task(start_node(number))
            return await _watch(coordinator, children, directory, clock)
    finally:
        await _end(children)


async def _watch(coordinator: Child, children: Sequence[Child], directory: UpDirectory, clock: Clock) -> int:
    """Wait until the cluster takes writes, say so, tell of each service that ends; return when the coordinator does.

    Raises:
        HoldfastError: NOT_READY if a service ends, or time is over, before the cluster takes writes.
    """
    deaths: asyncio.Queue[tuple[Child, str]] = asyncio.Queue()

    async def watch(child: Child) -> None:
        await deaths.put((child, await child.wait()))

    async with plain_task_group() as group:
        watchers = [group.create_task(watch(child)) for child in children]
        try:
            await _until_ready(coordinator.address, children, deaths, directory, clock)
            sys.stdout.write(f"ready coordinator={coordinator.address}\n")
            sys.stdout.flush()
            while True:
                child, how = await deaths.get()
                if child is coordinator:
                    say(f"the coordinator {how}. Nobody can use the cluster without it: stopping; start `up` again")
                    return FAILED
                say(f"{child.name} {how}. The others go on; to have it back, stop and start `up` again")
        finally:
            for watcher in watchers:
                watcher.cancel()


async def _until_ready(
    coordinator: str,
    children: Sequence[Child],
    deaths: asyncio.Queue[tuple[Child, str]],
    directory: UpDirectory,
    clock: Clock,
) -> None:
    """Wait until the cluster takes writes and knows every node at the address that it has in this run.

    After a restart the nodes of the run before count as up until their leases end, at addresses where nobody is.
    """
    # Imported here: gRPC loads while the services start.
    from holdfast_core.runtime.endpoints import Endpoints
    from holdfast_proto.v1.cluster_pb2 import GetClusterStatusRequest
    from holdfast_proto.v1.cluster_pb2_grpc import ClusterServiceStub

    addresses = {child.address for child in children if child.address != coordinator}
    deadline_s = clock.monotonic_s() + _START_S
    endpoints = Endpoints([coordinator], credential=Credential(token_file=directory.admin_token))
    try:
        while True:
            status = await endpoints.call(
                lambda channel: ClusterServiceStub(channel).GetClusterStatus, GetClusterStatusRequest()
            )
            if status.writable and addresses <= {node.address for node in status.nodes if node.up}:
                return
            if not deaths.empty():
                child, how = deaths.get_nowait()
                raise HoldfastError(ErrorCode.NOT_READY, f"{child.name} {how}")
            if clock.monotonic_s() > deadline_s:
                raise HoldfastError(
                    ErrorCode.NOT_READY, f"the cluster is not ready after {_START_S:g} s: {status.state}"
                )
            await clock.sleep(_POLL_S)
    finally:
        await endpoints.close()


async def _end(children: Sequence[Child]) -> None:
    """Drain the coordinator first, whose calls in flight need the nodes, then all nodes at once."""
    for group in (children[:1], children[1:]):
        for child, went in zip(group, await asyncio.gather(*(child.end() for child in group)), strict=True):
            if not went:
                say(f"{child.name} did not end in time and was killed")


def _tell_key(directory: UpDirectory, *, made: bool) -> None:
    say(
        f"{'made' if made else 'using'} {directory.master_key}, which seals all data of this cluster: losing it loses "
        "the data, so keep a copy in a safe place"
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which services to start, with what."""

    settings: UpSettings
    node_count: int
    new: bool

    @classmethod
    def of(cls, settings: UpSettings, directory: UpDirectory) -> _Plan:
        new = directory.is_new()
        present = directory.node_count()
        count = settings.nodes if settings.nodes is not None else present or DEFAULT_NODES
        if count < present:
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT,
                f"{directory.root} holds {present} nodes; --nodes {count} would leave blocks behind. Start "
                "all of them; nodes leave a cluster by `holdfast layout apply --remove`",
            )
        if settings.replicas is not None and settings.replicas > count:
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT,
                f"--replicas {settings.replicas} needs as many nodes; there are {count}: raise --nodes",
            )
        return cls(settings=settings, node_count=count, new=new)

    async def start_coordinator(self, directory: UpDirectory) -> Child:
        arguments = ["coordinator", "--data", str(directory.service("coordinator"))]
        arguments += ["--bind", format_address(_HOST, self.settings.port), "--master-key", str(directory.master_key)]
        arguments += ["--admin-token-file", str(directory.admin_token), "--node-token-file", str(directory.node_token)]
        replicas = self.settings.replicas
        if self.new:
            arguments.append("--create-master-key")
            replicas = replicas or min(REPLICAS_DEFAULT, self.node_count)
        if replicas is not None:
            arguments += ["--replicas", str(replicas)]
        if self.new or self.settings.nodes is not None:
            arguments += ["--nodes", str(self.node_count)]
        if self.settings.etcd is not None:
            arguments += ["--etcd", self.settings.etcd]
        if self.settings.old_master_key is not None:
            arguments += ["--old-master-key", str(self.settings.old_master_key.absolute())]
        return await Child.start("coordinator", arguments, directory, within_s=_START_S)

    async def start_node(self, number: int, directory: UpDirectory, coordinator: str) -> Child:
        name = f"node-{number}"
        arguments = ["storagenode", "--node-id", name, "--zone", f"zone-{number}", "--coordinator", coordinator]
        arguments += ["--data", str(directory.service(name)), "--bind", format_address(_HOST, 0)]
        arguments += ["--token-file", str(directory.node_token)]
        return await Child.start(name, arguments, directory, within_s=_START_S)
