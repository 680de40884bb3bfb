"""Rules of retention applied from time to time, without anybody's call: what the steward has to see to."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Final

from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.ownership import of_vm
from holdfast_coordinator.retention import Pins, Retention
from holdfast_coordinator.tenants import Tenants
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.logs import get_log
from holdfast_core.runtime.requests import new_request_id

RETENTION_INTERVAL_S: Final = 3600.0
FORGOTTEN_PER_RUN_MAX: Final = 1000
_PRINCIPAL: Final = "coordinator"
_ACTION: Final = "point.forget"


class RetentionDuty:
    """Applies all rules of all tenants now and then; `run` is one round, and safe beside any other."""

    name: Final = "retention"

    def __init__(self, tenants: Tenants, random_bytes: Callable[[int], bytes]) -> None:
        """Bind to the tenants; `random_bytes` makes the ids of records."""
        self._tenants = tenants
        self._random_bytes = random_bytes
        self._after: tuple[str, str] = ("", "")

    async def run(self) -> None:
        """Apply rules VM by VM until so many points are forgotten as a round may; the next one goes on behind.

        What keeps one VM from being looked at is logged, and the others are not kept waiting by it.

        Raises:
            HoldfastError: UNREACHABLE as the store.
        """
        left = FORGOTTEN_PER_RUN_MAX
        places = [
            (name, vm_id)
            for name in sorted(self._tenants.names())
            for vm_id in await (await self._tenants.named(name)).retention.ruled()
        ]
        behind = bisect_right(places, self._after)
        templates: dict[str, Pins] = {}
        for name, vm_id in places[behind:] + places[:behind]:
            retention = (await self._tenants.named(name)).retention
            if name not in templates:
                templates = {name: await retention.templates()}
            left -= await self._apply(name, retention, vm_id, left, templates[name])
            if left <= 0:
                self._after = (name, vm_id)
                return

    async def _apply(self, tenant: str, retention: Retention, vm_id: str, most: int, templates: Pins) -> int:
        """Apply one VM's rules; return how many points are forgotten by that."""
        entry = Entry(
            principal=_PRINCIPAL,
            tenant=tenant,
            action=_ACTION,
            resource=of_vm(vm_id),
            request_id=new_request_id(),
            entry_id=self._random_bytes(8).hex(),
        )
        try:
            applied = await retention.apply(vm_id, None, entry, most=most, templates=templates)
        except HoldfastError as error:
            if error.code is ErrorCode.UNREACHABLE:
                raise
            get_log("retention").warning("rules not applied", tenant=tenant, vm=vm_id, why=error.message)
            return 0
        return len(applied.forgotten)
