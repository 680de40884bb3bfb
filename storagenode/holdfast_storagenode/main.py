"""The command `holdfast storagenode`: options, and a process that serves until it is told to stop."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path
from typing import Annotated, Final

import typer

from holdfast_core.runtime.clock import SystemClock
from holdfast_core.runtime.credentials import find_credential
from holdfast_core.runtime.logs import configure_logs
from holdfast_core.runtime.options import parse_address, parse_addresses, parse_size, tls_files
from holdfast_core.runtime.signals import termination_signals
from holdfast_storagenode.allocator import keep_freed_memory
from holdfast_storagenode.home import DirectoryHome, open_directory
from holdfast_storagenode.node import DEFAULT_ZONE, NodeSettings, StorageNode
from holdfast_storagenode.segments.engine import EngineOptions

DEFAULT_BIND: Final = "127.0.0.1:7410"


def command(
    *,
    data: Annotated[Path, typer.Option(envvar="HOLDFAST_DATA", help="Directory of the node's blocks and identity.")],
    coordinator: Annotated[str, typer.Option(envvar="HOLDFAST_COORDINATOR", help="HOST:PORT[,…] of the coordinators.")],
    node_id: Annotated[
        str | None,
        typer.Option(envvar="HOLDFAST_NODE_ID", help="Name of a new node (the machine's); fixed by its directory."),
    ] = None,
    zone: Annotated[
        str, typer.Option(envvar="HOLDFAST_ZONE", help="Failure domain; copies are put in distinct ones.")
    ] = DEFAULT_ZONE,
    bind: Annotated[str, typer.Option(envvar="HOLDFAST_BIND", help="HOST:PORT to serve on.")] = DEFAULT_BIND,
    advertise: Annotated[
        str | None, typer.Option(envvar="HOLDFAST_ADVERTISE", help="HOST:PORT that others reach this node on.")
    ] = None,
    capacity: Annotated[
        str | None,
        typer.Option(envvar="HOLDFAST_CAPACITY", help="Bytes for blocks, e.g. 500GiB (the whole file system)."),
    ] = None,
    reserve: Annotated[
        str | None,
        typer.Option(
            envvar="HOLDFAST_RESERVE", help="Bytes of the file system to leave free (a twentieth, at most 1GiB)."
        ),
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(envvar="HOLDFAST_METRICS", help="HOST:PORT of the Prometheus metrics page.")
    ] = None,
    tls_ca: Annotated[Path | None, typer.Option(envvar="HOLDFAST_TLS_CA", help="CA that signs all parties.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(envvar="HOLDFAST_TLS_CERT", help="Own certificate.")] = None,
    tls_key: Annotated[Path | None, typer.Option(envvar="HOLDFAST_TLS_KEY", help="Key of that certificate.")] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(envvar="HOLDFAST_TOKEN_FILE", help="File of a token to join with, where no certificate says who."),
    ] = None,
    insecure_plaintext_on_network: Annotated[
        bool,
        typer.Option(
            "--insecure-plaintext-on-network",
            envvar="HOLDFAST_INSECURE_PLAINTEXT_ON_NETWORK",
            help="Bind any address without TLS, for a network that encrypts below.",
        ),
    ] = False,
    log_level: Annotated[
        str, typer.Option(envvar="HOLDFAST_LOG_LEVEL", help="debug, info, warning or error.")
    ] = "info",
) -> None:
    """Run a storage node until SIGTERM or SIGINT."""
    configure_logs("storagenode", level=log_level)
    keep_freed_memory()
    if advertise is not None:
        parse_address(advertise)
    coordinators = parse_addresses(coordinator)
    settings = NodeSettings(
        coordinators=coordinators,
        credential=find_credential(coordinators, token_file=token_file),
        bind=bind,
        advertise=advertise,
        zone=zone,
        tls=tls_files(ca=tls_ca, cert=tls_cert, key=tls_key),
        plaintext_on_network=insecure_plaintext_on_network,
        metrics_bind=metrics,
    )
    options = EngineOptions(
        capacity_bytes=None if capacity is None else parse_size(capacity),
        reserve_bytes=None if reserve is None else parse_size(reserve),
    )
    home = open_directory(data, node_id=node_id, options=options, random_bytes=secrets.token_bytes)
    try:
        asyncio.run(_serve(home, settings))
    finally:
        home.close()


async def _serve(home: DirectoryHome, settings: NodeSettings) -> None:
    """Serve until a signal comes or the node cannot go on; raise the reason then."""
    with termination_signals() as asked:
        node = StorageNode(home, settings, clock=SystemClock())
        try:
            address = await node.start()
            print(f"listening {address}", flush=True)
            signalled = asyncio.create_task(asked.wait())
            failing = asyncio.create_task(node.failed())
            await asyncio.wait({signalled, failing}, return_when=asyncio.FIRST_COMPLETED)
            signalled.cancel()
            failing.cancel()
            if failing.done() and not failing.cancelled():
                raise failing.result()
        finally:
            await node.stop()
