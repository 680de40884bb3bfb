"""Checking all points and objects of a tenant, one after another, in flat memory."""

from __future__ import annotations

from typing import Final

from holdfast.findings import ClusterVerifyReport, DamagedResource, VerifyReport
from holdfast.reading import Reading
from holdfast.remote import CoordinatorCalls
from holdfast.results import Progress, ProgressCallback
from holdfast.verifying.tree_check import Whole
from holdfast_core.model.errors import ErrorCode, HoldfastError

DAMAGED_RANGES_MAX: Final = 10_000


class Everything:
    """One check of all that a tenant has. Used once."""

    def __init__(self, reading: Reading, calls: CoordinatorCalls, *, node_only: bool) -> None:
        """Bind to a manager's tools."""
        self._reading = reading
        self._calls = calls
        self._node_only = node_only
        self._whole = Whole()
        self._progress: ProgressCallback | None = None
        self._points = self._objects = self._gone = 0
        self._damaged_points = self._damaged_objects = 0
        self._blocks = self._plain_bytes = self._thin_blocks = 0
        self._damaged: list[DamagedResource] = []
        self._ranges_left = DAMAGED_RANGES_MAX

    async def check(self, progress: ProgressCallback | None) -> ClusterVerifyReport:
        """Check it all. Raises as `AsyncStateManager.verify_all`."""
        self._progress = progress
        for vm in await self._calls.list_vms():
            try:
                points = await self._calls.points(vm.vm_id, include_forgotten=False)
            except HoldfastError as error:
                if error.code is not ErrorCode.NOT_FOUND:
                    raise
                continue  # discarded since the list was made
            for point in points:
                report = await self._survey(point.point_id)
                if report is not None:
                    self._points += 1
                    self._damaged_points += self._note(report, vm.vm_id)
        async for stored in self._calls.all_objects():
            report = await self._survey(stored.storage_id)
            if report is not None:
                self._objects += 1
                self._damaged_objects += self._note(report, stored.task_id)
        return ClusterVerifyReport(
            points=self._points,
            objects=self._objects,
            gone=self._gone,
            blocks=self._blocks,
            plain_bytes=self._plain_bytes,
            thin_blocks=self._thin_blocks,
            damaged_points=self._damaged_points,
            damaged_objects=self._damaged_objects,
            damaged=tuple(self._damaged),
        )

    async def _survey(self, resource_id: str) -> VerifyReport | None:
        """Check one; None if it was forgotten meanwhile."""
        try:
            return await self._reading.survey(resource_id, node_only=self._node_only, progress=None, whole=self._whole)
        except HoldfastError as error:
            if error.code is not ErrorCode.NOT_FOUND:
                raise
            self._gone += 1
            return None

    def _note(self, report: VerifyReport, owner: str) -> bool:
        """Add up a report; return whether anything is damaged."""
        self._blocks += report.blocks
        self._plain_bytes += report.plain_bytes
        self._thin_blocks += report.thin_blocks
        if self._progress is not None:
            self._progress(Progress("verify", self._points + self._objects, 0))
        if not report.damage:
            return False
        kept = report.damage[: self._ranges_left]
        if kept:
            self._damaged.append(DamagedResource(report.resource_id, owner, kept))
            self._ranges_left -= len(kept)
        return True
