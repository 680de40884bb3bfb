"""A coordinator that asks nobody who he is and keeps no log: what the security benchmark compares the real one with.

The product has no such switch. Here the two factories that the real coordinator makes its guard and its ledger with
are replaced (ADR 0088), in a process of its own: `python -m benchmarks.open_coordinator FOLDER COPIES`. It serves plain
text on this machine, prints `listening HOST:PORT`, and forgets its master key when it ends.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from holdfast.cli.parent import end_with_parent
from holdfast_coordinator.access.call import Call, serving
from holdfast_coordinator.access.guard import Context
from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.audit.metrics import AuditMetrics
from holdfast_coordinator.bootstrap import ClusterOptions
from holdfast_coordinator.coordinator import Coordinator, CoordinatorSettings, _Parts
from holdfast_coordinator.keys.chain import KeyChain
from holdfast_coordinator.keys.master import FileMasterKey, MasterKeys
from holdfast_coordinator.tenant import Tenant
from holdfast_coordinator.transactions import Outcome, attempt
from holdfast_coordinator.usage import UsageChange
from holdfast_core.model.access.permissions import CLUSTER_PERMISSIONS
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.calls import Guard
from holdfast_core.runtime.clock import SystemClock
from holdfast_core.runtime.logs import configure_logs
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import Condition, Operation
from holdfast_core.runtime.requests import current_request_id
from holdfast_core.runtime.rules import rule_of
from holdfast_core.runtime.signals import termination_signals

_ANYBODY = "anybody"
_TENANT = "default"
_ENTRY_ID = "0" * 16


class OpenGuard:
    """Lets everybody do everything in the default tenant."""

    def __init__(self, tenant: Callable[[str], Awaitable[Tenant]]) -> None:
        """Take what gives a tenant's parts by its name."""
        self._tenant = tenant

    @asynccontextmanager
    async def enter(self, method: str, context: Context) -> AsyncIterator[None]:
        """Serve one call."""
        rule = rule_of(method)
        if rule is None:
            raise HoldfastError(ErrorCode.INTERNAL, f"{method} has no rule")
        about_the_cluster = rule.permission in CLUSTER_PERMISSIONS
        call = Call(
            principal=_ANYBODY,
            entry=Entry(
                principal=_ANYBODY,
                tenant=_TENANT,
                action=rule.permission,
                request_id=current_request_id(),
                entry_id=_ENTRY_ID,
            ),
            allows=lambda permission, resource: True,
            allows_everywhere=lambda permission, resource: True,
            permission=rule.permission,
            otherwise=rule.permission_otherwise,
            tenant=None if about_the_cluster else await self._tenant(_TENANT),
        )
        with serving(call):
            yield


class PlainLedger(Ledger):
    """Makes each transaction by itself, as it was asked for, and writes no record and no usage."""

    async def apply(
        self,
        entry: Entry,
        conditions: Sequence[Condition],
        operations: Sequence[Operation],
        usage: UsageChange | None = None,
    ) -> Outcome:
        """Apply the operations if the conditions hold.

        Raises:
            HoldfastError: what the store raises; UNREACHABLE if it was lost before it answered.
        """
        if not operations:
            return Outcome.APPLIED
        outcome = await attempt(self._store, conditions, operations)
        if outcome is Outcome.UNKNOWN:
            raise HoldfastError(ErrorCode.UNREACHABLE, "the metadata store was lost before it answered")
        return outcome


class OpenCoordinator(Coordinator):
    """A coordinator with an open guard and a plain ledger."""

    def _make_ledger(self, chain: KeyChain, metrics: AuditMetrics) -> Ledger:
        return PlainLedger(
            self._store,
            signer=chain.head_signer,
            clock=self._clock,
            random_bytes=self._random_bytes,
            metrics=metrics,
        )

    def _make_guard(self, parts: _Parts) -> Guard:
        return OpenGuard(parts.tenants.named)


def main() -> None:
    """Serve until told to end."""
    end_with_parent()
    parser = argparse.ArgumentParser(prog="benchmarks.open_coordinator")
    parser.add_argument("folder", type=Path)
    parser.add_argument("copies", type=int)
    arguments = parser.parse_args()
    configure_logs("coordinator", level="info")
    arguments.folder.mkdir(parents=True)
    asyncio.run(_serve(arguments.folder, arguments.copies))


async def _serve(folder: Path, copies: int) -> None:
    store = await SqliteStore.open(folder / "metadata.sqlite", SystemClock())
    coordinator = OpenCoordinator(
        store,
        master=MasterKeys(FileMasterKey(secrets.token_bytes(32), secrets.token_bytes)),
        settings=CoordinatorSettings(options=ClusterOptions(nodes_expected=copies, replicas=copies)),
        random_bytes=secrets.token_bytes,
    )
    try:
        with termination_signals() as asked:
            address = await coordinator.start()
            print(f"listening {address}", flush=True)
            await asked.wait()
    finally:
        await coordinator.stop()
        await store.close()


if __name__ == "__main__":
    main()
