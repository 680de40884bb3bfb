"""A storage node: its home, its store, its service and its heartbeats, started and stopped together."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.background import run_workers
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.credentials import Credential
from holdfast_core.runtime.endpoints import Endpoints
from holdfast_core.runtime.logs import get_log
from holdfast_core.runtime.options import TlsFiles
from holdfast_core.runtime.server import DRAIN_GRACE_S, ServiceHost
from holdfast_proto.v1.common_pb2 import NodeStatus
from holdfast_storagenode.access import AccessControl
from holdfast_storagenode.core import NodeCore
from holdfast_storagenode.healing.grpc_peers import GrpcPeers
from holdfast_storagenode.healing.workers import HEALING_DEFAULT, Healing, HealingOptions
from holdfast_storagenode.heartbeats import Heartbeats, heartbeats_over
from holdfast_storagenode.home import NodeHome
from holdfast_storagenode.metrics import NodeMetrics
from holdfast_storagenode.peer_service import PeerService
from holdfast_storagenode.segments.record import SEGMENT_BYTES_TARGET
from holdfast_storagenode.service import BlockService
from holdfast_storagenode.store import CompactingStore
from holdfast_storagenode.wire import PEER_SERVICE_NAME, SERVICE_NAME, add_block_service, add_peer_service
from holdfast_storagenode.workers import Workers

DEFAULT_ZONE: Final = "default"

# Dead space of half a segment is worth a rewrite; looking for one costs next to nothing. A full node takes
# what it gets.
_DEAD_FRACTION_MIN: Final = 0.5
_DEAD_FRACTION_MIN_FULL: Final = 0.1
_COMPACT_INTERVAL_S: Final = 30.0
_COMPACT_INTERVAL_FULL_S: Final = 5.0
# What frees less was mostly tombstones, which are carried on; doing the next at once would move them in a circle.
_FREED_BYTES_MIN: Final = SEGMENT_BYTES_TARGET // 8
_FREED_FRACTION: Final = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """How a node is set up.

    Attributes:
        coordinators: HOST:PORT of each coordinator.
        bind: HOST:PORT to serve on; port 0 takes a free one.
        advertise: HOST:PORT that others reach it on; None for the address it serves on.
        zone: failure domain.
        credential: what it shows to coordinators; None where its certificate says who it is.
        tls: files for mutual TLS; None on loopback.
        plaintext_on_network: whether it may bind any address without TLS.
        metrics_bind: HOST:PORT of the metrics page; None for none.
        heartbeat_s: seconds between heartbeats at most; None for what the coordinator asks.
        healing: how it repairs and scrubs.
    """

    coordinators: tuple[str, ...]
    bind: str = "127.0.0.1:0"
    advertise: str | None = None
    zone: str = DEFAULT_ZONE
    credential: Credential | None = None
    tls: TlsFiles | None = None
    plaintext_on_network: bool = False
    metrics_bind: str | None = None
    heartbeat_s: float | None = None
    healing: HealingOptions = HEALING_DEFAULT


class StorageNode:
    """One node in one event loop. Started once and stopped once; its home outlives it."""

    def __init__(self, home: NodeHome, settings: NodeSettings, *, clock: Clock) -> None:
        """Prepare a node; nothing is opened yet.

        Raises:
            HoldfastError: INVALID_ARGUMENT for addresses that may not be used.
        """
        self._home = home
        self._settings = settings
        self._clock = clock
        self._log = get_log("storagenode").bind(node=home.identity.node_id)
        self._host = ServiceHost(
            "storagenode",
            bind=settings.bind,
            tls=settings.tls,
            metrics_bind=settings.metrics_bind,
            clock=clock,
            plaintext_on_network=settings.plaintext_on_network,
        )
        self._metrics = NodeMetrics(self._host.registry, self._log)
        self._workers = Workers()
        self._core = NodeCore(home, self._workers, self._metrics)
        self._endpoints: Endpoints | None = None
        self._peers: GrpcPeers | None = None
        self._background: asyncio.Task[None] | None = None

    @property
    def node_id(self) -> str:
        """The node's name."""
        return self._home.identity.node_id

    @property
    def core(self) -> NodeCore:
        """What it does without its network, e.g. to reach its store."""
        return self._core

    @property
    def metrics_port(self) -> int | None:
        """TCP port of the metrics page, None where there is none."""
        return self._host.metrics_port

    async def start(self) -> str:
        """Open the store if the placement is known, serve, begin to beat; return the address served on.

        Raises:
            HoldfastError: as `ServiceHost.start` and `NodeCore.open`.
        """
        await self._core.open()
        self._metrics.watch_store(self._core.store_status)
        settings = self._settings
        self._endpoints = Endpoints(settings.coordinators, tls=settings.tls, credential=settings.credential)
        self._peers = GrpcPeers(self._core.cluster, tls=settings.tls)
        beats = Heartbeats(
            self._core,
            heartbeats_over(self._endpoints),
            incarnation=self._home.identity.incarnation,
            interval_s=settings.heartbeat_s,
            status=self._status,
            clock=self._clock,
            log=self._log,
        )
        healing = Healing(
            self._core,
            self._home,
            self._peers,
            fresh_epoch=beats.fresh_epoch,
            clock=self._clock,
            log=self._log,
            options=settings.healing,
        )
        self._serve(healing)
        await self._host.start()
        # Owned: `failed` waits for it and `stop` ends it.
        self._background = asyncio.create_task(self._run(beats, healing))
        return self._host.address

    async def failed(self) -> HoldfastError:
        """Wait until the node cannot go on, and return why."""
        if self._background is None:
            raise RuntimeError("the node was not started")
        try:
            await asyncio.shield(self._background)
        except HoldfastError as error:
            return error
        return HoldfastError(ErrorCode.INTERNAL, "the node's background work ended")

    async def stop(self, grace_s: float = DRAIN_GRACE_S) -> None:
        """Drain, end the background work, make everything durable and release the files. The home stays open."""
        await self._host.stop(grace_s)
        if self._background is not None:
            self._background.cancel()
            await asyncio.wait([self._background])
        if self._endpoints is not None:
            await self._endpoints.close()
        if self._peers is not None:
            await self._peers.close()
        await self._core.close()
        await asyncio.to_thread(self._workers.close)

    def _serve(self, healing: Healing) -> None:
        """Add the services to the server, and tell the metrics what to ask."""
        access = AccessControl(self._core.cluster, self._clock)
        blocks = BlockService(self._core, access, self._metrics, self._status)
        self._host.add(add_block_service, blocks, SERVICE_NAME)
        self._host.add(add_peer_service, PeerService(healing.peer_side, access, self._metrics), PEER_SERVICE_NAME)
        self._metrics.watch_healing(self._core.healing)
        loop = asyncio.get_running_loop()
        # The store finds rot in threads of its own too, e.g. while it compacts.
        self._metrics.on_quarantined(
            lambda tenant, block_id: loop.call_soon_threadsafe(healing.repair.add, tenant, (block_id,))
        )

    async def _run(self, beats: Heartbeats, healing: Healing) -> None:
        async with plain_task_group() as group:
            group.create_task(beats.run())
            group.create_task(self._compact())
            group.create_task(run_workers(healing.workers, self._clock, self._log))

    async def _compact(self) -> None:
        full = False
        while True:
            await self._clock.sleep(_COMPACT_INTERVAL_FULL_S if full else _COMPACT_INTERVAL_S)
            store = self._core.store if self._core.opened else None
            if not isinstance(store, CompactingStore):
                continue
            status = self._core.store_status()
            full = status.full
            # Where the capacity is small, so are its segments.
            freed_min = min(_FREED_BYTES_MIN, max(1, status.capacity_bytes // _FREED_FRACTION))
            try:
                while await self._compacted_bytes(store, full=full) >= freed_min:
                    await self._clock.sleep(0)
            except HoldfastError as error:
                # A full or failed disk: it shows in the status already, and the next try may do better.
                self._log.warning("compaction failed", code=error.code.name, message=error.message)

    async def _compacted_bytes(self, store: CompactingStore, *, full: bool) -> int:
        fraction = _DEAD_FRACTION_MIN_FULL if full else _DEAD_FRACTION_MIN
        return await self._workers.run(store.compact, dead_fraction_min=fraction)

    async def _status(self) -> NodeStatus:
        address = self._settings.advertise or self._host.address
        return await self._core.status(address=address, zone=self._settings.zone, now_unix_ms=self._clock.now_unix_ms())
