"""Coordinators of the simulated world: the product's own, all of it, but for its server and its connections."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from prometheus_client import CollectorRegistry

from holdfast_coordinator.access.identity import admin_token
from holdfast_coordinator.bootstrap import ClusterOptions, open_cluster
from holdfast_coordinator.coordinator import Coordinator, CoordinatorSettings
from holdfast_coordinator.healing.parts import HealingSettings
from holdfast_coordinator.keys.master import FileMasterKey, MasterKeys
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.credentials import Credential, new_token
from holdfast_core.runtime.endpoints import Endpoints
from tests.sim.metadata import MetadataTables
from tests.sim.metadata_link import MetadataLink
from tests.sim.network import Network
from tests.sim.rpc import SimChannels, SimServer, address_of, inject
from tests.sim.world import Process, World

MASTER_KEY: Final = bytes(range(32))
TOKEN: Final = new_token(random.Random(3).randbytes)
_RESTART_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How long things take in a simulated cluster, seconds."""

    session_ttl_s: float = 12.0
    node_lease_ttl_s: float = 6.0
    heartbeat_interval_s: float = 2.0
    out_after_s: float = 20.0
    steward_ttl_s: float = 5.0


class _SimCoordinator(Coordinator):
    """A coordinator that listens on the simulated network."""

    def __init__(self, process: Process, link: MetadataLink, network: Network, **parts: Any) -> None:
        super().__init__(link, clock=process.clock, registry=CollectorRegistry(), **parts)
        self._process = process
        inject(self._pool, "_channels", SimChannels(process, network))

    async def serve(self) -> None:
        """Open the cluster, listen, and do the background work until it fails."""
        cluster = await open_cluster(
            self._store,
            master=self._master,
            options=self._settings.options,
            random_bytes=self._random_bytes,
            now_unix_ms=self._clock.now_unix_ms(),
        )
        parts = await self._make_parts(cluster)
        server: Any = SimServer(self._process, self._make_guard(parts))
        await self._view.fresh()
        self._add_services(server, parts)
        self._add_access(server, parts)
        server.start()
        await self._follow(parts)


class CoordinatorHost:
    """A machine on which a coordinator runs, crashes and is started again."""

    def __init__(
        self, world: World, name: str, tables: MetadataTables, network: Network, options: ClusterOptions, terms: Terms
    ) -> None:
        """Have nothing running yet."""
        self._world = world
        self.name = name
        self._tables = tables
        self._network = network
        self._options = options
        self._terms = terms
        self._starts = 0
        self.process: Process | None = None
        self.link: MetadataLink | None = None
        self.prepare: Callable[[MetadataLink], None] = lambda link: None
        self.skew_ms = 0

    def start(self) -> None:
        """Start a coordinator; one that fails is started again, as a supervisor does."""
        self._starts += 1
        process = Process(self._world, self.name, skew_ms=self.skew_ms)
        self.process = process
        self.link = MetadataLink(process, self._tables, self._network)
        self.prepare(self.link)
        dice = self._world.random(f"{self.name}/{self._starts}")
        coordinator = _SimCoordinator(
            process,
            self.link,
            self._network,
            master=MasterKeys(FileMasterKey(MASTER_KEY, dice.randbytes)),
            settings=CoordinatorSettings(
                options=self._options,
                session_ttl_s=self._terms.session_ttl_s,
                healing=HealingSettings(
                    node_lease_ttl_s=self._terms.node_lease_ttl_s,
                    heartbeat_interval_s=self._terms.heartbeat_interval_s,
                    out_after_s=self._terms.out_after_s,
                    steward_ttl_s=self._terms.steward_ttl_s,
                ),
                static_tokens=(admin_token(Credential(token=TOKEN)),),
            ),
            random_bytes=dice.randbytes,
        )
        self._world.note(self.name, "starts")
        process.spawn(self._supervise(process, coordinator))

    async def _supervise(self, process: Process, coordinator: _SimCoordinator) -> None:
        try:
            await coordinator.serve()
        except HoldfastError as error:
            if error.code not in (ErrorCode.UNREACHABLE, ErrorCode.CONFLICT):
                raise
            self._world.note(self.name, f"cannot go on: {error.code.name}")
            self._world.loop.call_later(_RESTART_S, self._again, process)

    def _again(self, process: Process) -> None:
        if process.alive and process is self.process:
            process.crash()
            self.start()

    def crash(self) -> None:
        """End the coordinator here and now."""
        if self.process is not None and self.process.alive:
            self.process.crash()


class SimEndpoints(Endpoints):
    """Several coordinators as one, as the product's own, over the simulated network."""

    def __init__(self, process: Process, names: Sequence[str], network: Network, *, tenant: str = "") -> None:
        """Know these coordinators."""
        self.addresses = tuple(map(address_of, names))
        self._what = "coordinator"
        self._credential = Credential(token=TOKEN, tenant=tenant)
        channels: Any = SimChannels(process, network)
        self._channels = channels
        self._good = 0


async def settle(seconds: float) -> None:
    """Let virtual time pass."""
    await asyncio.sleep(seconds)
