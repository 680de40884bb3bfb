"""Collections of one coordinator: beginning one, carrying it out in the background, and reports of the last ones."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from holdfast_coordinator import keyspace
from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.bootstrap import RandomBytes
from holdfast_coordinator.collection.collector import (
    PHASE_DONE,
    PHASE_FAILED,
    PHASE_MARKING,
    Bounds,
    Collector,
    MarkedTenant,
    Scope,
)
from holdfast_coordinator.collection.epochs import present_epoch, set_epoch
from holdfast_coordinator.collection.scanner import NodeScanner
from holdfast_coordinator.collection.tenure import TTL_S, Tenure
from holdfast_coordinator.records import load, parse
from holdfast_coordinator.transactions import ATTEMPTS_MAX, Outcome, contention
from holdfast_coordinator.view import ClusterView
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.logs import get_log
from holdfast_core.runtime.metadata.store import Absent, Delete, MetadataStore, Operation, Put
from holdfast_proto.v1.collection_pb2 import CollectionReport
from holdfast_proto.v1.tenants_pb2 import TenantRecord

_END_ATTEMPTS: Final = 5
_END_PAUSE_S: Final = 2.0

OpenTenant = Callable[[int, Callable[[str], Entry]], Awaitable[MarkedTenant]]
"""Opens a tenant by its number; the function that it is given makes entries for what the collection records."""


@dataclass(frozen=True, slots=True)
class _Begun:
    """A collection that has begun and waits to be carried out."""

    tenure: Tenure
    report: CollectionReport


@dataclass(frozen=True, slots=True)
class Reports:
    """What is known of collections; None for what there is none of."""

    running: CollectionReport | None
    last: CollectionReport | None
    planned: CollectionReport | None


class Collections:
    """Begins collections and carries them out. Belongs to one event loop."""

    def __init__(
        self,
        store: MetadataStore,
        ledger: Ledger,
        view: ClusterView,
        scanner: NodeScanner,
        open_tenant: OpenTenant,
        *,
        clock: Clock,
        random_bytes: RandomBytes,
        bounds: Bounds,
    ) -> None:
        """Bind to the store and the nodes.

        Args:
            store, ledger, view, scanner, clock: what it works with.
            open_tenant: opens a tenant by its number.
            random_bytes: for the entries of the audit log.
            bounds: what a collection may use.
        """
        self._store = store
        self._ledger = ledger
        self._view = view
        self._scanner = scanner
        self._open_tenant = open_tenant
        self._clock = clock
        self._random_bytes = random_bytes
        self._bounds = bounds
        # There is one collection at a time in the whole cluster, so none ever waits for long.
        self._begun: asyncio.Queue[_Begun] = asyncio.Queue()

    async def begin(self, entry: Entry, *, dry_run: bool) -> tuple[int, bool]:
        """Begin a collection, or find the one that is under way; `run` carries it out.

        Returns:
            The collection's number, and whether it was under way already.

        Raises:
            HoldfastError: BUSY if the one under way is a dry run and this is to be none, or the other way round;
                NOT_READY before the first layout; CONFLICT under contention; UNREACHABLE.
        """
        for _ in range(ATTEMPTS_MAX):
            running = await load(self._store, keyspace.COLLECTION_RUNNING, CollectionReport)
            if running is not None:
                _check_same_kind(running.message, dry_run)
                entry.repeated()
                return running.message.epoch, True
            if (await self._view.fresh()).layout_set.newest is None:
                raise HoldfastError(ErrorCode.NOT_READY, "there is no layout yet, so there is nothing to collect")
            begun = await self._begin(entry, dry_run)
            if begun is not None:
                self._begun.put_nowait(begun)
                return begun.report.epoch, False
        raise contention("the beginning of a collection")

    async def begin_due(self) -> None:
        """Begin a collection that nobody asked for; nothing happens while one is under way.

        Raises:
            HoldfastError: as `begin`.
        """
        try:
            await self.begin(self._entry("collection.begin"), dry_run=False)
        except HoldfastError as error:
            if error.code is not ErrorCode.BUSY:
                raise

    async def reports(self) -> Reports:
        """Return what is known of collections, at one revision."""
        keys = (keyspace.COLLECTION_RUNNING, keyspace.COLLECTION_LAST, keyspace.COLLECTION_PLANNED)
        items = {item.key: item for item in (await self._store.snapshot(keys)).items}
        return Reports(*[parse(items[key], CollectionReport).message if key in items else None for key in keys])

    async def run(self) -> None:
        """Carry out what `begin` begins, one after another, until cancelled."""
        while True:
            begun = await self._begun.get()
            await self._carry_out(begun)

    async def _begin(self, entry: Entry, dry_run: bool) -> _Begun | None:
        """Claim the key and raise the epoch in one transaction; None if somebody else was quicker."""
        epoch, same_epoch = await present_epoch(self._store)
        number = epoch if dry_run else epoch + 1
        report = CollectionReport(
            epoch=number, dry_run=dry_run, phase=PHASE_MARKING, started_unix_ms=self._clock.now_unix_ms()
        )
        lease_id = await self._store.grant_lease(TTL_S)
        operations: list[Operation] = [Put(keyspace.COLLECTION_RUNNING, report.SerializeToString(), lease_id)]
        if not dry_run:
            operations.append(set_epoch(number))
        entry.details["epoch"] = str(number)
        conditions = [Absent(keyspace.COLLECTION_RUNNING), same_epoch]
        if await self._ledger.apply(entry, conditions, operations) is not Outcome.APPLIED:
            await self._store.revoke_lease(lease_id)
            return None
        made = await self._store.get(keyspace.COLLECTION_RUNNING)
        if made is None or made.lease_id != lease_id:
            return None  # the store was away for so long that it lapsed
        tenure = Tenure(
            self._store,
            self._clock,
            lease_id=lease_id,
            create_revision=made.create_revision,
            present_epoch=number,
        )
        return _Begun(tenure, report)

    async def _carry_out(self, begun: _Begun) -> None:
        report, log = begun.report, get_log("collection")
        log.info("collection began", epoch=report.epoch, dry_run=report.dry_run)
        try:
            await self._collect(begun)
        except HoldfastError as error:
            report.phase, report.failure = PHASE_FAILED, error.message
            log.warning("collection failed", epoch=report.epoch, code=error.code.name, why=error.message)
        else:
            report.phase = PHASE_DONE
        report.ended_unix_ms = self._clock.now_unix_ms()
        await self._end(begun)

    async def _collect(self, begun: _Begun) -> None:
        report, tenure = begun.report, begun.tenure
        collector = Collector(
            self._store,
            self._scanner,
            lambda tenant: self._open_tenant(tenant, self._entry),
            report,
            clock=self._clock,
            check=tenure.check,
            bounds=self._bounds,
        )
        async with plain_task_group() as group:
            beside = [group.create_task(tenure.keep()), group.create_task(tenure.publish(report))]
            await collector.collect(await self._scope(report))
            for task in beside:
                task.cancel()

    async def _scope(self, report: CollectionReport) -> Scope:
        state = await self._view.fresh()
        layouts = state.layout_set.layouts
        if not layouts:
            raise HoldfastError(ErrorCode.NOT_READY, "there is no layout yet, so there is nothing to collect")
        records = (await self._store.snapshot([keyspace.TENANTS_PREFIX])).items
        return Scope(
            # What a dry run finds is what the collection after it would delete, by its own number.
            epoch=report.epoch + report.dry_run,
            dry_run=report.dry_run,
            newest=layouts[0],
            living_nodes=frozenset(node.node_id for layout in layouts for node in layout.nodes),
            nodes={node.node_id: node.up for node in state.nodes},
            tenants=[parse(item, TenantRecord).message.tenant for item in records],
        )

    async def _end(self, begun: _Begun) -> None:
        """Put the report away and let go of the key, in one recorded transaction, as long as the key is held."""
        report, log = begun.report, get_log("collection")
        key = keyspace.COLLECTION_PLANNED if report.dry_run else keyspace.COLLECTION_LAST
        entry = self._entry("collection.end", **_details(report))
        operations: list[Operation] = [Delete(keyspace.COLLECTION_RUNNING), Put(key, report.SerializeToString())]
        for _ in range(_END_ATTEMPTS):
            try:
                outcome = await self._ledger.apply(entry, [begun.tenure.held], operations)
                await begun.tenure.let_go()
            except HoldfastError as error:
                if not error.retryable:
                    raise
                log.warning("the report of a collection waits", code=error.code.name, why=error.message)
            else:
                log.info("collection ended", recorded=outcome is Outcome.APPLIED, **_details(report))
                return
            await self._clock.sleep(_END_PAUSE_S)

    def _entry(self, action: str, **details: str) -> Entry:
        """Return the audit log's entry for what a coordinator does by itself."""
        entry_id = self._random_bytes(8).hex()
        return Entry(
            principal="coordinator",
            tenant="",
            action=action,
            resource="cluster",
            request_id=f"collection-{entry_id}",
            entry_id=entry_id,
            details=dict(details),
        )


def _check_same_kind(running: CollectionReport, dry_run: bool) -> None:
    if running.dry_run != dry_run:
        what = "a dry run" if running.dry_run else "a collection"
        raise HoldfastError(ErrorCode.BUSY, f"{what} is under way; try again when it has ended")


def _details(report: CollectionReport) -> Mapping[str, str]:
    names: Sequence[str] = ("epoch", "dry_run", "phase", "cutoff", "marked_blocks", "deleted_copies", "deleted_bytes")
    details = {name: str(getattr(report, name)).lower() for name in names}
    return details | ({"failure": report.failure} if report.failure else {})
