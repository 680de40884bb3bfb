"""A coordinator: all parts around one metadata store, served on one address.

It opens the store's cluster (making it if need be), keeps its copy of nodes and layouts fresh in the background, and
serves until stopped. Any number of them may run over one store.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from prometheus_client import CollectorRegistry

from holdfast_coordinator import keyspace
from holdfast_coordinator.access.guard import AccessGuard
from holdfast_coordinator.access.identity import Identities, StaticToken
from holdfast_coordinator.access.refusals import RefusalCounts
from holdfast_coordinator.access.service import AccessService
from holdfast_coordinator.access.view import AccessView
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.audit.metrics import AuditMetrics
from holdfast_coordinator.audit.reader import AuditReader
from holdfast_coordinator.audit.sealing import Sealing
from holdfast_coordinator.audit.segments import SegmentBlocks
from holdfast_coordinator.audit.service import AuditService
from holdfast_coordinator.bootstrap import SYSTEM_TENANT, Cluster, ClusterOptions, RandomBytes, open_cluster
from holdfast_coordinator.cautious_clock import CautiousClock
from holdfast_coordinator.cluster_service import ClusterService
from holdfast_coordinator.collection.parts import CollectionSettings, collection_duties, collections_of
from holdfast_coordinator.collection.running import Collections
from holdfast_coordinator.collection.service import CollectionService
from holdfast_coordinator.healing.condition import at_risk_of
from holdfast_coordinator.healing.parts import HealingParts, HealingSettings, healing_parts
from holdfast_coordinator.keys.chain import KeyChain
from holdfast_coordinator.keys.master import MasterKeys
from holdfast_coordinator.keys.service import KeyService
from holdfast_coordinator.metrics import CoordinatorMetrics
from holdfast_coordinator.records import count
from holdfast_coordinator.state_service import StateService
from holdfast_coordinator.tenant import Tenant, open_tenant
from holdfast_coordinator.tenant_service import TenantService
from holdfast_coordinator.tenants import Tenants
from holdfast_coordinator.usage_count import count_usage
from holdfast_coordinator.view import ClusterView
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.keys import KeyRing, TenantSecrets
from holdfast_core.model.limits import SESSION_TTL_S
from holdfast_core.runtime.background import run_workers
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.calls import Guard
from holdfast_core.runtime.clock import Clock, SystemClock
from holdfast_core.runtime.logs import get_log
from holdfast_core.runtime.metadata.store import MetadataStore
from holdfast_core.runtime.metrics import new_registry
from holdfast_core.runtime.options import TlsFiles
from holdfast_core.runtime.server import DRAIN_GRACE_S, ServiceHost
from holdfast_proto.v1 import access_pb2, audit_pb2, cluster_pb2, collection_pb2, keys_pb2, state_pb2, tenants_pb2
from holdfast_proto.v1.access_pb2_grpc import add_AccessServiceServicer_to_server
from holdfast_proto.v1.audit_pb2_grpc import add_AuditServiceServicer_to_server
from holdfast_proto.v1.cluster_pb2_grpc import add_ClusterServiceServicer_to_server
from holdfast_proto.v1.collection_pb2_grpc import add_CollectionServiceServicer_to_server
from holdfast_proto.v1.keys_pb2_grpc import add_KeyServiceServicer_to_server
from holdfast_proto.v1.state_pb2_grpc import add_StateServiceServicer_to_server
from holdfast_proto.v1.tenants_pb2 import TenantRecord
from holdfast_proto.v1.tenants_pb2_grpc import add_TenantServiceServicer_to_server

_COUNTING_INTERVAL_S: Final = 10.0
_ACCESS_SERVICE: Final = access_pb2.DESCRIPTOR.services_by_name["AccessService"].full_name
_TENANT_SERVICE: Final = tenants_pb2.DESCRIPTOR.services_by_name["TenantService"].full_name
_KEY_SERVICE: Final = keys_pb2.DESCRIPTOR.services_by_name["KeyService"].full_name
_AUDIT_SERVICE: Final = audit_pb2.DESCRIPTOR.services_by_name["AuditService"].full_name
_STATE_SERVICE: Final = state_pb2.DESCRIPTOR.services_by_name["StateService"].full_name
_COLLECTION_SERVICE: Final = collection_pb2.DESCRIPTOR.services_by_name["CollectionService"].full_name
_CLUSTER_SERVICE: Final = cluster_pb2.DESCRIPTOR.services_by_name["ClusterService"].full_name


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorSettings:
    """How a coordinator runs.

    Attributes:
        bind: HOST:PORT (port 0 takes a free one) or unix:PATH.
        tls: own certificate; without one only this machine is served.
        metrics_bind: HOST:PORT of the metrics page, None for none.
        options: what the operator said of the cluster.
        session_ttl_s: time without a keep-alive after which a session lapses.
        healing: how nodes are looked after.
        collection: how what nothing reaches is collected.
        static_tokens: tokens that the operator gave by files; the policy neither makes nor takes what they hold.
        plaintext_on_network: whether any address may be served without TLS.
    """

    bind: str = "127.0.0.1:0"
    tls: TlsFiles | None = None
    metrics_bind: str | None = None
    options: ClusterOptions = field(default_factory=ClusterOptions)
    session_ttl_s: float = SESSION_TTL_S
    healing: HealingSettings = field(default_factory=HealingSettings)
    collection: CollectionSettings = field(default_factory=CollectionSettings)
    static_tokens: tuple[StaticToken, ...] = ()
    plaintext_on_network: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What all services of one coordinator work with."""

    cluster: Cluster
    chain: KeyChain
    ledger: Ledger
    tenants: Tenants
    access: AccessView
    identities: Identities
    refusals: RefusalCounts
    reader: AuditReader
    sealing: Sealing
    healing: HealingParts
    collections: Collections


class Coordinator:
    """One coordinator over an open metadata store, which stays its owner's to close. Started once, stopped once."""

    def __init__(
        self,
        store: MetadataStore,
        *,
        master: MasterKeys,
        settings: CoordinatorSettings,
        random_bytes: RandomBytes,
        clock: Clock | None = None,
        registry: CollectorRegistry | None = None,
    ) -> None:
        """Take what it works with; `start` does the work."""
        self._store = store
        self._master = master
        self._settings = settings
        self._random_bytes = random_bytes
        self._clock: Clock = clock or SystemClock()
        self._lock_clock = CautiousClock(self._clock)
        self._registry = registry or new_registry()
        self._metrics = CoordinatorMetrics(self._registry, self._clock)
        self._view = ClusterView(store)
        self._pool = NodePool(tls=settings.tls, clock=self._clock)
        self._host: ServiceHost | None = None
        self._parts: _Parts | None = None
        self._background: asyncio.Task[None] | None = None

    @property
    def host(self) -> ServiceHost:
        """The gRPC server, once `prepare` has run."""
        if self._host is None:
            raise RuntimeError("the coordinator has not been prepared")
        return self._host

    async def prepare(self) -> ServiceHost:
        """Open the cluster, begin to follow it, and return the host, ready to be started.

        Raises:
            HoldfastError: as `open_cluster`; INVALID_ARGUMENT for an address that may not be served in plain text.
        """
        settings = self._settings
        cluster = await open_cluster(
            self._store,
            master=self._master,
            options=settings.options,
            random_bytes=self._random_bytes,
            now_unix_ms=self._clock.now_unix_ms(),
        )
        parts = await self._make_parts(cluster)
        host = ServiceHost(
            "coordinator",
            bind=settings.bind,
            tls=settings.tls,
            metrics_bind=settings.metrics_bind,
            registry=self._registry,
            clock=self._clock,
            guard=self._make_guard(parts),
            plaintext_on_network=settings.plaintext_on_network,
        )
        await self._view.fresh()
        self._add_services(host, parts)
        self._add_access(host, parts)
        self._host = host
        self._parts = parts
        self._background = asyncio.create_task(self._follow(parts), name="coordinator-background")
        return host

    async def start(self) -> str:
        """Open the cluster and serve it; return the address. Raises as `prepare`; CONFLICT if the address is taken."""
        host = await self.prepare()
        try:
            await host.start()
        except HoldfastError:
            self._host = None
            await self.close()
            raise
        return host.address

    async def stop(self, grace_s: float = DRAIN_GRACE_S) -> None:
        """Drain, stop serving, and let go of everything but the store."""
        if self._host is not None:
            await self._host.stop(grace_s)
        await self.close()

    async def close(self) -> None:
        """Let go of everything but the host and the store.

        Raises:
            HoldfastError: what ended the background work, if something did.
        """
        background, self._background = self._background, None
        if background is not None:
            background.cancel()
            await asyncio.wait([background])
        if self._parts is not None:
            await self._parts.healing.lease.close()
            await self._parts.ledger.close()
        await self._pool.close()
        if background is not None and not background.cancelled() and (failure := background.exception()):
            raise failure

    async def failed(self) -> HoldfastError:
        """Wait until the background work ends, which it never does by itself, and return why."""
        if self._background is not None:
            await asyncio.wait([self._background])
            if not self._background.cancelled() and isinstance(failure := self._background.exception(), HoldfastError):
                return failure
        return HoldfastError(ErrorCode.INTERNAL, "the coordinator lost its watch on the metadata store")

    async def _make_parts(self, cluster: Cluster) -> _Parts:
        chain = KeyChain(self._store, self._master, cluster.record.cluster_id, self._clock)
        await chain.fresh()
        audit_metrics = AuditMetrics(self._registry)
        ledger = self._make_ledger(chain, audit_metrics)

        def opened(record: TenantRecord, secrets: TenantSecrets) -> Tenant:
            return open_tenant(
                self._store,
                record,
                secrets,
                chain,
                ledger,
                self._view,
                self._pool,
                clock=self._clock,
                lock_clock=self._lock_clock,
                metrics=self._metrics,
                session_ttl_s=self._settings.session_ttl_s,
            )

        tenants = Tenants(self._store, chain, opened)
        await tenants.fresh()

        async def system_ring() -> KeyRing:
            return (await tenants.numbered(SYSTEM_TENANT)).ring

        segments = SegmentBlocks(self._view, self._pool, chain, system_ring, self._clock)
        reader = AuditReader(self._store, segments)
        access = AccessView(self._store, self._registry)
        await access.fresh()
        collections = collections_of(
            self._store,
            ledger,
            self._view,
            self._pool,
            tenants,
            clock=self._clock,
            random_bytes=self._random_bytes,
            settings=self._settings.collection,
        )
        return _Parts(
            cluster=cluster,
            chain=chain,
            ledger=ledger,
            tenants=tenants,
            access=access,
            identities=Identities(access, static=self._settings.static_tokens, clock=self._clock),
            refusals=RefusalCounts(ledger, self._registry, clock=self._clock, random_bytes=self._random_bytes),
            reader=reader,
            sealing=Sealing(self._store, reader, segments, clock=self._clock, metrics=audit_metrics),
            healing=healing_parts(
                self._store,
                cluster,
                chain,
                self._view,
                ledger=ledger,
                clock=self._clock,
                random_bytes=self._random_bytes,
                settings=self._settings.healing,
                duties=collection_duties(collections, self._settings.collection),
            ),
            collections=collections,
        )

    def _make_ledger(self, chain: KeyChain, metrics: AuditMetrics) -> Ledger:
        return Ledger(
            self._store,
            signer=chain.head_signer,
            clock=self._clock,
            random_bytes=self._random_bytes,
            metrics=metrics,
            count_usage=partial(count_usage, self._store),
        )

    def _make_guard(self, parts: _Parts) -> Guard:
        return AccessGuard(
            view=parts.access,
            identities=parts.identities,
            tenant=parts.tenants.named,
            ledger=parts.ledger,
            refusals=parts.refusals,
            encrypted=self._settings.tls is not None,
            clock=self._clock,
            random_bytes=self._random_bytes,
        )

    def _add_services(self, host: ServiceHost, parts: _Parts) -> None:
        settings = self._settings
        host.add(
            add_StateServiceServicer_to_server,
            StateService(parts.cluster, self._view, metrics=self._metrics, encrypted=settings.tls is not None),
            _STATE_SERVICE,
        )
        host.add(
            add_ClusterServiceServicer_to_server,
            ClusterService(
                self._store,
                parts.cluster,
                self._view,
                parts.healing,
            ),
            _CLUSTER_SERVICE,
            endless_methods=["WatchCluster"],
        )
        host.add(
            add_CollectionServiceServicer_to_server,
            CollectionService(self._store, parts.collections, self._view, self._pool),
            _COLLECTION_SERVICE,
        )

    def _add_access(self, host: ServiceHost, parts: _Parts) -> None:
        host.add(
            add_AccessServiceServicer_to_server,
            AccessService(self._store, parts.ledger, parts.access, parts.identities, self._clock),
            _ACCESS_SERVICE,
        )
        host.add(
            add_TenantServiceServicer_to_server,
            TenantService(
                self._store,
                parts.ledger,
                parts.tenants,
                self._master,
                clock=self._clock,
                random_bytes=self._random_bytes,
            ),
            _TENANT_SERVICE,
        )
        host.add(
            add_KeyServiceServicer_to_server,
            KeyService(
                self._store,
                parts.chain,
                self._master,
                parts.ledger,
                parts.tenants,
                clock=self._clock,
                random_bytes=self._random_bytes,
            ),
            _KEY_SERVICE,
        )
        host.add(
            add_AuditServiceServicer_to_server,
            AuditService(
                parts.cluster.record.cluster_id,
                parts.reader,
                parts.ledger,
                signer=parts.chain.head_signer,
                clock=self._clock,
            ),
            _AUDIT_SERVICE,
        )

    async def _follow(self, parts: _Parts) -> None:
        async with plain_task_group() as group:
            group.create_task(self._view.run())
            group.create_task(parts.chain.run())
            group.create_task(parts.tenants.run())
            group.create_task(parts.access.run())
            group.create_task(parts.refusals.run())
            group.create_task(parts.sealing.run())
            group.create_task(parts.collections.run())
            group.create_task(run_workers(parts.healing.workers, self._clock, get_log("coordinator")))
            group.create_task(self._log_changes())
            group.create_task(self._count(parts))

    async def _log_changes(self) -> None:
        """Say in the log when a node comes, goes or fills up, and when the layout changes."""
        log = get_log("coordinator")
        known: dict[str, tuple[bool, bool]] = {}
        epoch = 0
        async for state in self._view.changes():
            for node in state.nodes:
                now = (node.up, node.full)
                if known.get(node.node_id) != now:
                    known[node.node_id] = now
                    log.info("node", node_id=node.node_id, up=node.up, full=node.full, address=node.address)
            newest = state.layout_set.newest
            if newest is not None and newest.epoch != epoch:
                epoch = newest.epoch
                log.info("layout", epoch=epoch, nodes=len(newest.nodes), living=len(state.layout_set.layouts))

    async def _count(self, parts: _Parts) -> None:
        """Keep the gauges of the cluster's state fresh; while the store is away they keep what they showed last."""
        while True:
            try:
                sessions_open = 0
                for record in parts.tenants.names().values():
                    space = keyspace.TenantKeyspace(record.tenant)
                    sessions_open += await count(self._store, space.sessions_prefix)
            except HoldfastError as error:
                if error.code is not ErrorCode.UNREACHABLE:
                    raise
            else:
                state = self._view.state
                newest = state.layout_set.newest
                self._metrics.seen(
                    sessions_open=sessions_open,
                    nodes_up=len(state.up),
                    nodes_down=len(state.nodes) - len(state.up),
                    nodes_full=sum(node.up and node.full for node in state.nodes),
                    nodes_out=sum(node.state.out for node in state.nodes),
                    layout_epoch=newest.epoch if newest else 0,
                    layouts_living=len(state.layout_set.layouts),
                    partitions_at_risk=at_risk_of(state),
                    is_steward=parts.healing.lease.term > 0,
                )
            await self._clock.sleep(_COUNTING_INTERVAL_S)
