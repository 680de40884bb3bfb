"""One collection, from its roots to its report: tenant by tenant, marked at one revision and then swept.

The tenants with the oldest open sessions come first, because nodes refuse a cut-off below one that they have seen.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast_coordinator.collection.marking import KNOWN_NODES, KnownNodes, Marker
from holdfast_coordinator.collection.roots import Roots, lowest_session_epoch, read_roots, sources
from holdfast_coordinator.collection.scanner import NodeScanner
from holdfast_coordinator.collection.spool import MARKS_IN_MEMORY, MarkSpool
from holdfast_coordinator.collection.sweeping import MARKS_PER_RANGE, Nodes, Sweeper, SweepPlan
from holdfast_coordinator.keyspace import TenantKeyspace
from holdfast_core.model.block import Opener, SealedBlock
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.layout import Layout
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.logs import get_log
from holdfast_core.runtime.metadata.store import MetadataStore
from holdfast_proto.v1.collection_pb2 import CollectionReport, SkippedTenant

PHASE_MARKING = "marking"
PHASE_SWEEPING = "sweeping"
PHASE_DONE = "done"
PHASE_FAILED = "failed"


@dataclass(frozen=True, slots=True)
class MarkedTenant:
    """What a collection needs of one tenant.

    Attributes:
        name: its name, for the report; the cluster's own has none.
        space: its keys of the metadata store.
        fetch: brings index nodes.
        opener: opens them; needs the structure key alone.
        confirm: records those of the ids that all owners confirm as lost, and returns how many.
    """

    name: str
    space: TenantKeyspace
    fetch: Callable[[Sequence[bytes]], Awaitable[Mapping[bytes, SealedBlock]]]
    opener: Opener
    confirm: Callable[[Sequence[bytes]], Awaitable[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What is collected.

    Attributes:
        epoch: the collection's number k; for a dry run the number that it would have.
        dry_run: whether nothing is deleted.
        newest: the newest layout.
        living_nodes: names of all nodes of living layouts.
        nodes: names of all registered nodes, and whether each is up.
        tenants: numbers of all tenants, the cluster's own among them.
    """

    epoch: int
    dry_run: bool
    newest: Layout
    living_nodes: frozenset[str]
    nodes: Mapping[str, bool]
    tenants: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a collection may use.

    Attributes:
        scratch: directory for what does not fit into memory; None for where temporary files go.
        marks_in_memory: ids of marked blocks before they are written there.
        marks_per_range: marks that are compared with listings at once.
        known_nodes: index nodes that are remembered as walked.
    """

    scratch: Path | None = None
    marks_in_memory: int = MARKS_IN_MEMORY
    marks_per_range: int = MARKS_PER_RANGE
    known_nodes: int = KNOWN_NODES


class Collector:
    """Carries out one collection. `report` grows while it runs."""

    def __init__(
        self,
        store: MetadataStore,
        scanner: NodeScanner,
        tenant: Callable[[int], Awaitable[MarkedTenant]],
        report: CollectionReport,
        *,
        clock: Clock,
        check: Callable[[], Awaitable[None]],
        bounds: Bounds,
    ) -> None:
        """Bind to the store and the nodes.

        Args:
            store, scanner, clock: what it works with.
            tenant: opens a tenant by its number.
            report: where what is found is counted.
            check: raises CONFLICT once this collection is not the one any more.
            bounds: what it may use.
        """
        self._store = store
        self._scanner = scanner
        self._tenant = tenant
        self._report = report
        self._clock = clock
        self._check = check
        self._bounds = bounds

    async def collect(self, scope: Scope) -> None:
        """Collect all tenants. What keeps one of them from being collected is in the report, and the others go on.

        Raises:
            HoldfastError: CONFLICT if another collection has begun; DISK_FULL if the scratch directory is full;
                UNREACHABLE if the metadata store is away.
        """
        nodes = Nodes({node_id for node_id, up in scope.nodes.items() if up}, scope.living_nodes)
        for node_id, up in scope.nodes.items():
            if not up:
                nodes.leave_out(node_id, "it is down")
        cutoffs = {
            tenant: await lowest_session_epoch(self._store, TenantKeyspace(tenant), scope.epoch)
            for tenant in scope.tenants
        }
        self._report.cutoff = min(cutoffs.values(), default=scope.epoch)
        for tenant in sorted(cutoffs, key=lambda tenant: (cutoffs[tenant], tenant)):
            await self._check()
            await self._collect_tenant(scope, tenant, cutoffs[tenant], nodes)
            del self._report.nodes_left_out[:]
            self._report.nodes_left_out.extend(sorted(nodes.left_out))

    async def _collect_tenant(self, scope: Scope, tenant: int, cutoff: int, nodes: Nodes) -> None:
        newest = scope.newest
        marks = MarkSpool(
            newest.partition_of,
            newest.partitions,
            scratch=self._bounds.scratch,
            in_memory=self._bounds.marks_in_memory,
        )
        try:
            opened = await self._marked(tenant, marks)
            if opened is None:
                return
            self._report.phase = PHASE_SWEEPING
            sweeper = Sweeper(
                self._scanner,
                nodes,
                self._report,
                clock=self._clock,
                check=self._check,
                marks_per_range=self._bounds.marks_per_range,
            )
            plan = SweepPlan(tenant=tenant, cutoff=cutoff, newest=newest, dry_run=scope.dry_run)
            await self._sweep(sweeper, plan, marks, opened)
        finally:
            marks.close()

    async def _marked(self, tenant: int, marks: MarkSpool) -> MarkedTenant | None:
        """Mark all that a tenant reaches; None, and said so in the report, if a tree cannot be read."""
        self._report.phase = PHASE_MARKING
        try:
            opened = await self._tenant(tenant)
        except HoldfastError as error:
            self._skip(f"number {tenant}", error.message)
            return None
        roots = await read_roots(self._store, opened.space, scratch=self._bounds.scratch)
        try:
            await self._mark(opened, roots, marks)
        except HoldfastError as error:
            if error.code is ErrorCode.DISK_FULL:
                raise
            self._skip(opened.name, error.message)
            return None
        finally:
            roots.spool.close()
        self._report.points += roots.points
        self._report.objects += roots.objects
        self._report.sessions += roots.sessions
        return opened

    async def _mark(self, opened: MarkedTenant, roots: Roots, marks: MarkSpool) -> None:
        known = KnownNodes(self._bounds.known_nodes)
        marker = Marker(opened.fetch, opened.opener, marks, known)
        await marker.mark(sources(roots, known))

    async def _sweep(self, sweeper: Sweeper, plan: SweepPlan, marks: MarkSpool, opened: MarkedTenant) -> None:
        try:
            nowhere = await sweeper.sweep(plan, marks)
        except HoldfastError as error:
            if error.code is not ErrorCode.CONFLICT:
                raise
            # This collection's own end, or a node that has deleted under a higher cut-off: a session of this tenant is
            # older than that of the tenants that an earlier collection looked at.
            await self._check()
            self._skip(
                opened.name,
                f"a session that began under collection {plan.cutoff} is open, and an earlier collection went further "
                f"for other tenants; what is garbage is deleted once it has ended ({error.message})",
            )
            return
        if not nowhere:
            return
        if plan.dry_run:
            self._report.lost_blocks += len(nowhere)
            return
        try:
            self._report.lost_blocks += await opened.confirm(nowhere)
        except HoldfastError as error:
            if not error.retryable:
                raise
            # Nothing was recorded that is not so; the next collection finds them again.
            get_log("collection").warning("lost blocks are not confirmed", blocks=len(nowhere), why=error.message)

    def _skip(self, tenant: str, why: str) -> None:
        self._report.tenants_left_out.append(SkippedTenant(tenant=tenant, reason=why))
