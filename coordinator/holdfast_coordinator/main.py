"""The command `holdfast coordinator`: options, the metadata store they name, and a process that serves until signalled.

On stdout it prints one line, `listening HOST:PORT`, once it serves; its log goes to stderr.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from holdfast_coordinator import command_options as opt
from holdfast_coordinator.access.identity import StaticToken, admin_token, node_token
from holdfast_coordinator.bootstrap import ClusterOptions
from holdfast_coordinator.collection.parts import CollectionSettings
from holdfast_coordinator.coordinator import Coordinator, CoordinatorSettings
from holdfast_coordinator.healing.parts import HealingSettings
from holdfast_coordinator.keys.master import MasterKeys
from holdfast_coordinator.master_key import make_directory, open_master_keys
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import COLLECTION_INTERVAL_S, NODE_OUT_AFTER_S
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.clock import SystemClock
from holdfast_core.runtime.credentials import Credential
from holdfast_core.runtime.loaded import leave_out_what_is_loaded
from holdfast_core.runtime.logs import configure_logs
from holdfast_core.runtime.metadata.etcd import EtcdStore
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import MetadataStore
from holdfast_core.runtime.options import TlsFiles, parse_addresses, tls_files
from holdfast_core.runtime.signals import termination_signals

DEFAULT_BIND: Final = "127.0.0.1:7400"
METADATA_FILE: Final = "metadata.sqlite"


@dataclass(frozen=True, slots=True, kw_only=True)
class Etcd:
    """How to reach etcd."""

    endpoints: tuple[str, ...]
    tls: TlsFiles | None
    user: str
    password: str


def command(
    *,
    data: opt.Data = None,
    bind: opt.Bind = DEFAULT_BIND,
    etcd: opt.EtcdAddresses = None,
    etcd_ca: opt.EtcdCa = None,
    etcd_cert: opt.EtcdCert = None,
    etcd_key: opt.EtcdKey = None,
    etcd_user: opt.EtcdUser = "",
    etcd_password: opt.EtcdPassword = "",
    nodes: opt.Nodes = None,
    replicas: opt.Replicas = None,
    partitions: opt.Partitions = None,
    out_after: opt.OutAfter = NODE_OUT_AFTER_S,
    collect_every: opt.CollectEvery = COLLECTION_INTERVAL_S,
    scratch: opt.Scratch = None,
    master_key: opt.MasterKey = None,
    old_master_key: opt.OldMasterKey = None,
    create_master_key: opt.CreateMasterKey = False,
    admin_token_file: opt.AdminTokenFile = None,
    node_token_file: opt.NodeTokenFile = None,
    metrics: opt.Metrics = None,
    tls_ca: opt.TlsCa = None,
    tls_cert: opt.TlsCert = None,
    tls_key: opt.TlsKey = None,
    insecure_plaintext_on_network: opt.PlaintextOnNetwork = False,
    log_level: opt.LogLevel = "info",
) -> None:
    """Run a coordinator until SIGTERM or SIGINT."""
    configure_logs("coordinator", level=log_level)
    settings = CoordinatorSettings(
        bind=bind,
        tls=tls_files(ca=tls_ca, cert=tls_cert, key=tls_key),
        metrics_bind=metrics,
        options=ClusterOptions(nodes_expected=nodes, replicas=replicas, partitions=partitions),
        healing=HealingSettings(out_after_s=out_after),
        collection=CollectionSettings(every_s=collect_every, scratch=_scratch(scratch, data)),
        static_tokens=_static_tokens(data, admin=admin_token_file, node=node_token_file),
        plaintext_on_network=insecure_plaintext_on_network,
    )
    master = open_master_keys(
        master_key,
        old_master_key,
        data=data,
        create=create_master_key,
        has_metadata=data is not None and (data / METADATA_FILE).exists(),
        random_bytes=secrets.token_bytes,
        environment=os.environ,
    )
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
    asyncio.run(_serve(data, engine, master, settings))


def _scratch(scratch: Path | None, data: Path | None) -> Path | None:
    """Return where a collection keeps what does not fit into memory, None for where temporary files go.

    Raises:
        HoldfastError: INVALID_ARGUMENT for a scratch directory that is none.
    """
    if scratch is not None and not scratch.is_dir():
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"the scratch directory {scratch} does not exist")
    return scratch or data


def _static_tokens(data: Path | None, *, admin: Path | None, node: Path | None) -> tuple[StaticToken, ...]:
    """Return the tokens of the files named, or of those that lie in the data directory.

    Raises:
        HoldfastError: UNAUTHENTICATED if a file cannot be read or holds no token.
    """
    tokens = []
    for principal, path, token in (("admin", admin, admin_token), ("node", node, node_token)):
        if path is None and data is not None and (data / f"{principal}.token").exists():
            path = data / f"{principal}.token"
        if path is not None:
            source = Credential(token_file=path)
            source.metadata()  # a wrong file is told now, not at the first call
            tokens.append(token(source))
    return tuple(tokens)


@asynccontextmanager
async def _open_store(data: Path | None, etcd: Etcd | None) -> AsyncIterator[MetadataStore]:
    store: EtcdStore | SqliteStore
    if etcd is not None:
        store = await EtcdStore.open(etcd.endpoints, tls=etcd.tls, user=etcd.user, password=etcd.password)
    elif data is not None:
        make_directory(data)
        store = await SqliteStore.open(data / METADATA_FILE, SystemClock())
    else:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "say where the metadata is: --data DIR, or --etcd HOST:PORT")
    try:
        yield store
    finally:
        await store.close()


async def _serve(data: Path | None, etcd: Etcd | None, master: MasterKeys, settings: CoordinatorSettings) -> None:
    async with _open_store(data, etcd) as store:
        coordinator = Coordinator(store, master=master, settings=settings, random_bytes=secrets.token_bytes)
        with termination_signals() as asked:
            try:
                address = await coordinator.start()
                leave_out_what_is_loaded()
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
