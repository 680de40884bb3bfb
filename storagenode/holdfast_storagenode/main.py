"""The command `holdfast storagenode`: options, and a process that serves until it is told to stop."""

from __future__ import annotations

import asyncio
import secrets
from typing import Final

from holdfast_core.model.limits import ANTI_ENTROPY_INTERVAL_S, SCRUB_PERIOD_S
from holdfast_core.runtime.clock import SystemClock
from holdfast_core.runtime.credentials import find_credential
from holdfast_core.runtime.loaded import leave_out_what_is_loaded
from holdfast_core.runtime.logs import configure_logs
from holdfast_core.runtime.options import parse_address, parse_addresses, parse_size, tls_files
from holdfast_core.runtime.signals import termination_signals
from holdfast_storagenode import command_options as opt
from holdfast_storagenode.allocator import keep_freed_memory
from holdfast_storagenode.healing.workers import DAY_S, GENTLENESS_DEFAULT, healing_options
from holdfast_storagenode.home import DirectoryHome, open_directory
from holdfast_storagenode.node import DEFAULT_ZONE, NodeSettings, StorageNode
from holdfast_storagenode.segments.engine import EngineOptions

DEFAULT_BIND: Final = "127.0.0.1:7410"
SCRUB_DAYS_DEFAULT: Final = SCRUB_PERIOD_S / DAY_S


def command(
    *,
    data: opt.Data,
    coordinator: opt.Coordinator,
    node_id: opt.NodeId = None,
    zone: opt.Zone = DEFAULT_ZONE,
    bind: opt.Bind = DEFAULT_BIND,
    advertise: opt.Advertise = None,
    capacity: opt.Capacity = None,
    reserve: opt.Reserve = None,
    metrics: opt.Metrics = None,
    scrub_days: opt.ScrubDays = SCRUB_DAYS_DEFAULT,
    repair_gentleness: opt.RepairGentleness = GENTLENESS_DEFAULT,
    compare_every: opt.CompareEvery = ANTI_ENTROPY_INTERVAL_S,
    tls_ca: opt.TlsCa = None,
    tls_cert: opt.TlsCert = None,
    tls_key: opt.TlsKey = None,
    token_file: opt.TokenFile = None,
    insecure_plaintext_on_network: opt.PlaintextOnNetwork = False,
    log_level: opt.LogLevel = "info",
) -> None:
    """Run a storage node until SIGTERM or SIGINT."""
    configure_logs("storagenode", level=log_level)
    keep_freed_memory()
    if advertise is not None:
        parse_address(advertise)
    coordinators = parse_addresses(coordinator)
    tls = tls_files(ca=tls_ca, cert=tls_cert, key=tls_key)
    settings = NodeSettings(
        coordinators=coordinators,
        credential=find_credential(coordinators, token_file=token_file, certificate=tls is not None),
        bind=bind,
        advertise=advertise,
        zone=zone,
        tls=tls,
        plaintext_on_network=insecure_plaintext_on_network,
        metrics_bind=metrics,
        healing=healing_options(scrub_days=scrub_days, gentleness=repair_gentleness, compare_every_s=compare_every),
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
            leave_out_what_is_loaded()
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
