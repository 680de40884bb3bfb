"""How long points stay: rules, and locks."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import TYPE_CHECKING

from holdfast.calls.core import AsyncCore, BlockingCore
from holdfast_core.model.errors import ErrorCode, HoldfastError

if TYPE_CHECKING:
    from holdfast.retention import PointLock, RetainedPoint, RetentionRemote, RetentionRules

End = datetime.datetime | datetime.timedelta
"""When a lock ends: a time with its zone, or how long from now."""


class AsyncRetentionCalls(AsyncCore):
    """Calls about how long points stay."""

    @property
    def _retention(self) -> RetentionRemote:
        from holdfast.retention import RetentionRemote  # what only saves does not wait for this to load

        return RetentionRemote(self._remote.endpoints)

    async def lock(self, point_id: str, until: End) -> PointLock:
        """Lock a point: until then nothing forgets it or discards its VM. Returns the lock as it is.

        A lock is only ever made longer by this; one that ends later already stays as it is. Nobody but an administrator
        lifts it.

        Args:
            point_id: the point.
            until: when the lock ends, or how long from now it lasts by this machine's clock.

        Raises:
            HoldfastError: NOT_FOUND if the point is gone or forgotten; INVALID_ARGUMENT for a time that is past or has
                no zone; LIMIT_EXCEEDED beyond 100 years; CONFLICT while the VM is being discarded; DENIED.
        """
        return await self._retention.lock(point_id, self._end_unix_ms(until))

    async def unlock(self, point_id: str) -> None:
        """Lift a point's lock before its end; no error if there is none. DENIED to all but administrators."""
        await self._retention.unlock(point_id)

    async def set_retention(self, vm_id: str, rules: RetentionRules | None) -> None:
        """Keep a VM's points by these rules from now on; None keeps everything. The cluster applies them hourly.

        Raises:
            HoldfastError: NOT_FOUND; INVALID_ARGUMENT for rules that keep nothing; CONFLICT while the VM is being
                discarded; DENIED.
        """
        await self._retention.set_retention(vm_id, rules)

    async def apply_retention(
        self, vm_id: str, *, rules: RetentionRules | None = None, dry_run: bool = False
    ) -> Sequence[RetainedPoint]:
        """Forget the points of a VM that rules do not keep, and return what became of each, newest first.

        The newest point always stays, and so does what is locked, what is a template of a VM, and what an open session
        builds on.

        Args:
            vm_id: the VM.
            rules: rules for this call alone; the VM's own if None, and a VM without any keeps everything.
            dry_run: only say what would be forgotten.

        Raises:
            HoldfastError: as `set_retention`.
        """
        return await self._retention.apply_retention(vm_id, rules, dry_run=dry_run)

    def _end_unix_ms(self, until: End) -> int:
        if isinstance(until, datetime.timedelta):
            return self._clock.now_unix_ms() + int(until.total_seconds() * 1000)
        if until.tzinfo is None:
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"{until} has no time zone; a lock's end needs one")
        return int(until.timestamp() * 1000)


class RetentionCalls(BlockingCore):
    """The blocking face of `AsyncRetentionCalls`."""

    def lock(self, point_id: str, until: End) -> PointLock:
        """Lock a point until a time, or for so long; returns the lock as it is."""
        return self._loop.run(self._core.lock(point_id, until))

    def unlock(self, point_id: str) -> None:
        """Lift a point's lock before its end; for administrators."""
        self._loop.run(self._core.unlock(point_id))

    def set_retention(self, vm_id: str, rules: RetentionRules | None) -> None:
        """Keep a VM's points by these rules from now on; None keeps everything."""
        self._loop.run(self._core.set_retention(vm_id, rules))

    def apply_retention(
        self, vm_id: str, *, rules: RetentionRules | None = None, dry_run: bool = False
    ) -> Sequence[RetainedPoint]:
        """Forget the points of a VM that rules do not keep; returns what became of each, newest first."""
        return self._loop.run(self._core.apply_retention(vm_id, rules=rules, dry_run=dry_run))
