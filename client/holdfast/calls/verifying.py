"""Checking what is stored: one point, one piece of application data, or all that a tenant has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.calls.core import AsyncCore, BlockingCore
from holdfast.results import ProgressCallback
from holdfast_core.model.names import check_id

if TYPE_CHECKING:
    from holdfast.findings import ClusterVerifyReport, VerifyReport


class AsyncVerifyCalls(AsyncCore):
    """Calls that check what is stored. All of them report what is lost to the coordinator."""

    async def verify(
        self, point_id: str, *, node_only: bool = False, progress: ProgressCallback | None = None
    ) -> VerifyReport:
        """Read and check every block of a point or of application data; returns only if all is well.

        Without `node_only` one copy of each block is fetched, opened and compared with its fingerprint; with it, every
        node reads and hashes all its copies, and nothing but the index crosses the wire.

        Raises:
            HoldfastError: CORRUPT or MISSING with ids and ranges as in `restore_vm`; UNREACHABLE; NOT_FOUND.
        """
        return await self._reading.verify(check_id(point_id, "point id"), node_only=node_only, progress=progress)

    async def survey(
        self, point_id: str, *, node_only: bool = False, progress: ProgressCallback | None = None
    ) -> VerifyReport:
        """Check as `verify` does, and return what is damaged, and where, in `damage` in place of raising for it.

        Raises:
            HoldfastError: NOT_FOUND; UNREACHABLE if no coordinator answers.
        """
        return await self._reading.survey(check_id(point_id, "point id"), node_only=node_only, progress=progress)

    async def verify_all(
        self, *, node_only: bool = False, progress: ProgressCallback | None = None
    ) -> ClusterVerifyReport:
        """Check every recovery point and all application data of the tenant that the caller may see.

        What several points share is checked once, as far as half a million index nodes are remembered; what is damaged
        is told for each that needs it. Takes flat memory whatever there is. `progress` counts points and objects.

        Raises:
            HoldfastError: DENIED if something may be listed and not read; UNREACHABLE if no coordinator answers.
        """
        # Loaded when it is asked for, as everything that reads.
        from holdfast.verifying.everything import Everything

        return await Everything(self._reading, self._remote, node_only=node_only).check(progress)


class VerifyCalls(BlockingCore):
    """The blocking face of `AsyncVerifyCalls`."""

    def verify(
        self, point_id: str, *, node_only: bool = False, progress: ProgressCallback | None = None
    ) -> VerifyReport:
        """Read and check every block of a point or of application data; returns only if all is well."""
        return self._loop.run(self._core.verify(point_id, node_only=node_only, progress=progress))

    def survey(
        self, point_id: str, *, node_only: bool = False, progress: ProgressCallback | None = None
    ) -> VerifyReport:
        """Check as `verify` does, and return what is damaged in place of raising for it."""
        return self._loop.run(self._core.survey(point_id, node_only=node_only, progress=progress))

    def verify_all(self, *, node_only: bool = False, progress: ProgressCallback | None = None) -> ClusterVerifyReport:
        """Check every recovery point and all application data of the tenant."""
        return self._loop.run(self._core.verify_all(node_only=node_only, progress=progress))
