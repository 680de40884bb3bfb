"""The command `holdfast coordinator`: options, the metadata store they name, and a process that serves until signalled.

On stdout it prints one line, `listening HOST:PORT`, once it serves; its log goes to stderr.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer

from holdfast_coordinator.bootstrap import ClusterOptions
from holdfast_coordinator.coordinator import Coordinator, CoordinatorSettings
from holdfast_coordinator.master_key import create_master_key as make_master_key
from holdfast_coordinator.master_key import read_master_key
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.clock import SystemClock
from holdfast_core.runtime.logs import configure_logs
from holdfast_core.runtime.metadata.etcd import EtcdStore
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import MetadataStore
from holdfast_core.runtime.options import TlsFiles, parse_addresses, tls_files
from holdfast_core.runtime.server import termination_signals

DEFAULT_BIND: Final = "127.0.0.1:7400"
METADATA_FILE: Final = "metadata.sqlite"
MASTER_KEY_FILE: Final = "master.key"


@dataclass(frozen=True, slots=True, kw_only=True)
class Etcd:
    """How to reach etcd."""

    endpoints: tuple[str, ...]
    tls: TlsFiles | None
    user: str
    password: str


def command(
    *,
    data: Annotated[
        Path | None,
        typer.Option(
            envvar="HOLDFAST_DATA",
            help="Directory for the embedded metadata and, unless named elsewhere, the master key. Not needed with "
            "--etcd and --master-key.",
        ),
    ] = None,
    bind: Annotated[str, typer.Option(envvar="HOLDFAST_BIND", help="HOST:PORT to serve on.")] = DEFAULT_BIND,
    etcd: Annotated[
        str | None,
        typer.Option(envvar="HOLDFAST_ETCD", help="HOST:PORT[,…] of etcd; without it metadata is embedded in --data."),
    ] = None,
    etcd_ca: Annotated[Path | None, typer.Option(envvar="HOLDFAST_ETCD_CA", help="CA of etcd's certificates.")] = None,
    etcd_cert: Annotated[
        Path | None, typer.Option(envvar="HOLDFAST_ETCD_CERT", help="Own certificate towards etcd.")
    ] = None,
    etcd_key: Annotated[Path | None, typer.Option(envvar="HOLDFAST_ETCD_KEY", help="Key of that certificate.")] = None,
    etcd_user: Annotated[
        str,
        typer.Option(envvar="HOLDFAST_ETCD_USER", help="User of etcd; its password is in HOLDFAST_ETCD_PASSWORD."),
    ] = "",
    etcd_password: Annotated[str, typer.Option(envvar="HOLDFAST_ETCD_PASSWORD", hidden=True)] = "",
    nodes: Annotated[
        int | None,
        typer.Option(envvar="HOLDFAST_NODES", help="Storage nodes to wait for before the first layout forms."),
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(envvar="HOLDFAST_REPLICAS", help="Copies of each block, fixed when the cluster is made (3)."),
    ] = None,
    partitions: Annotated[
        int | None,
        typer.Option(
            envvar="HOLDFAST_PARTITIONS", help="Partitions, a power of two, fixed when the cluster is made (4096)."
        ),
    ] = None,
    master_key: Annotated[
        Path | None,
        typer.Option(
            envvar="HOLDFAST_MASTER_KEY",
            help="File of the master key: 32 raw bytes or 64 hexadecimal digits (DATA/master.key).",
        ),
    ] = None,
    create_master_key: Annotated[
        bool,
        typer.Option(
            envvar="HOLDFAST_CREATE_MASTER_KEY", help="Make the master key if there is none. Losing it loses the data."
        ),
    ] = False,
    metrics: Annotated[
        str | None, typer.Option(envvar="HOLDFAST_METRICS", help="HOST:PORT of the Prometheus metrics page.")
    ] = None,
    tls_ca: Annotated[Path | None, typer.Option(envvar="HOLDFAST_TLS_CA", help="CA that signs all parties.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(envvar="HOLDFAST_TLS_CERT", help="Own certificate.")] = None,
    tls_key: Annotated[Path | None, typer.Option(envvar="HOLDFAST_TLS_KEY", help="Key of that certificate.")] = None,
    log_level: Annotated[
        str, typer.Option(envvar="HOLDFAST_LOG_LEVEL", help="debug, info, warning or error.")
    ] = "info",
) -> None:
    """Run a coordinator until SIGTERM or SIGINT."""
    configure_logs("coordinator", level=log_level)
    settings = CoordinatorSettings(
        bind=bind,
        tls=tls_files(ca=tls_ca, cert=tls_cert, key=tls_key),
        metrics_bind=metrics,
        options=ClusterOptions(nodes_expected=nodes, replicas=replicas, partitions=partitions),
    )
    key = _master_key(master_key, data, create=create_master_key)
    engine = (
        None
        if etcd is None
        else Etcd(
            endpoints=parse_addresses(etcd),
            tls=tls_files(ca=etcd_ca, cert=etcd_cert, key=etcd_key),
            user=etcd_user,
            password=etcd_password,
        )
    )
    asyncio.run(_serve(data, engine, key, settings))


def _master_key(path: Path | None, data: Path | None, *, create: bool) -> bytes:
    """Return the master key.

    Raises:
        HoldfastError: INVALID_ARGUMENT if no place for it was named; as `read_master_key` and `create_master_key`.
    """
    if path is None:
        if data is None:
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "name the master key's file with --master-key, or --data")
        path = data / MASTER_KEY_FILE
    if not create:
        return read_master_key(path)
    _make_directory(path.parent)
    return make_master_key(path, random_bytes=secrets.token_bytes)


@asynccontextmanager
async def _open_store(data: Path | None, etcd: Etcd | None) -> AsyncIterator[MetadataStore]:
    store: EtcdStore | SqliteStore
    if etcd is not None:
        store = await EtcdStore.open(etcd.endpoints, tls=etcd.tls, user=etcd.user, password=etcd.password)
    elif data is not None:
        _make_directory(data)
        store = await SqliteStore.open(data / METADATA_FILE, SystemClock())
    else:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "say where the metadata is: --data DIR, or --etcd HOST:PORT")
    try:
        yield store
    finally:
        await store.close()


async def _serve(data: Path | None, etcd: Etcd | None, key: bytes, settings: CoordinatorSettings) -> None:
    async with _open_store(data, etcd) as store:
        coordinator = Coordinator(store, master_key=key, settings=settings, random_bytes=secrets.token_bytes)
        with termination_signals() as asked:
            try:
                address = await coordinator.start()
                print(f"listening {address}", flush=True)
                async with plain_task_group() as group:
                    watching = group.create_task(_raise_failure(coordinator))
                    await asked.wait()
                    watching.cancel()
            finally:
                await coordinator.stop()


async def _raise_failure(coordinator: Coordinator) -> None:
    """Raise what ends the background work: a coordinator that no longer follows the store must not go on serving."""
    raise await coordinator.failed()


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT, f"the directory {path} cannot be made: {error.strerror}"
        ) from error
