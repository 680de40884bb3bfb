"""How long points stay: rules that keep them, what rules made of each, and locks; and the calls for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Final

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import RETENTION_COUNT_MAX
from holdfast_core.model.names import check_id, check_name
from holdfast_core.model.retention import check_rules
from holdfast_core.runtime.endpoints import Endpoints
from holdfast_proto.v1 import records_pb2, state_pb2
from holdfast_proto.v1.state_pb2_grpc import StateServiceStub

_RETENTION_TIMEOUT_S: Final = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionRules:
    """Which points of a VM are kept: all that any of the rules keeps, and always the newest. Times are in UTC.

    Attributes:
        keep_last: so many of the newest points.
        keep_hourly: the newest point of each of so many newest hours that have one.
        keep_daily: likewise of days.
        keep_weekly: likewise of ISO weeks.
        keep_monthly: likewise of months.
        keep_yearly: likewise of years.
    """

    keep_last: int = 0
    keep_hourly: int = 0
    keep_daily: int = 0
    keep_weekly: int = 0
    keep_monthly: int = 0
    keep_yearly: int = 0

    @property
    def text(self) -> str:
        """The rules in one line, as the command takes them, e.g. "keep-last 2 keep-daily 7"."""
        counts = {name.replace("_", "-"): count for name, count in asdict(self).items() if count}
        return " ".join(f"{name} {count}" for name, count in counts.items())


@dataclass(frozen=True, slots=True)
class RetainedPoint:
    """What rules make of one living point.

    Attributes:
        point_id: the point.
        created_unix_ms: when it was made.
        reasons: why it stays, e.g. "daily 2026-11-29"; empty for one that goes.
        forgotten: whether this call forgot it.
    """

    point_id: str
    created_unix_ms: int
    reasons: tuple[str, ...]
    forgotten: bool


@dataclass(frozen=True, slots=True)
class PointLock:
    """A lock: nothing forgets its point, or discards its VM, before it ends.

    Attributes:
        point_id: the point.
        until_unix_ms: when it ends.
        principal: who set it.
        set_unix_ms: when it was set.
    """

    point_id: str
    until_unix_ms: int
    principal: str
    set_unix_ms: int


def retention_rules(message: records_pb2.RetentionRules) -> RetentionRules:
    """Return rules of retention."""
    return RetentionRules(**{name: getattr(message, name) for name in RetentionRules.__dataclass_fields__})


def retention_message(rules: RetentionRules) -> records_pb2.RetentionRules:
    """Return rules of retention as a message.

    Raises:
        HoldfastError: INVALID_ARGUMENT or LIMIT_EXCEEDED if they are not allowed.
    """
    counts = asdict(rules)
    for name, count in counts.items():
        if not 0 <= count <= RETENTION_COUNT_MAX:
            raise HoldfastError(
                ErrorCode.LIMIT_EXCEEDED, f"{name} is {count}; a rule keeps from 0 to {RETENTION_COUNT_MAX} points"
            )
    message = records_pb2.RetentionRules(**counts)
    check_rules(message)
    return message


def point_lock(record: records_pb2.LockRecord) -> PointLock:
    """Return a lock."""
    return PointLock(record.point_id, record.until_unix_ms, record.principal, record.set_unix_ms)


def retained_points(points: Iterable[state_pb2.RetainedPoint]) -> list[RetainedPoint]:
    """Return what rules made of points."""
    return [
        RetainedPoint(point.point_id, point.created_unix_ms, tuple(point.reasons), point.forgotten) for point in points
    ]


class RetentionRemote:
    """The coordinator's plain calls about locks and rules. All methods raise HoldfastError as the coordinator says."""

    def __init__(self, endpoints: Endpoints) -> None:
        """Bind to the coordinators."""
        self._endpoints = endpoints

    async def lock(self, point_id: str, until_unix_ms: int) -> PointLock:
        """Lock a point until then; returns the lock as it is."""
        if until_unix_ms < 0:
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "a lock ends in the future")
        request = state_pb2.LockPointRequest(point_id=check_id(point_id, "point id"), until_unix_ms=until_unix_ms)
        answer = await self._endpoints.call(lambda channel: StateServiceStub(channel).LockPoint, request)
        return point_lock(answer.lock)

    async def unlock(self, point_id: str) -> None:
        """Lift a point's lock."""
        request = state_pb2.UnlockPointRequest(point_id=check_id(point_id, "point id"))
        await self._endpoints.call(lambda channel: StateServiceStub(channel).UnlockPoint, request)

    async def set_retention(self, vm_id: str, rules: RetentionRules | None) -> None:
        """Set a VM's rules of retention; None removes them."""
        message = None if rules is None else retention_message(rules)
        request = state_pb2.SetRetentionRequest(vm_id=check_name(vm_id, "VM name"), rules=message)
        await self._endpoints.call(lambda channel: StateServiceStub(channel).SetRetention, request)

    async def apply_retention(
        self, vm_id: str, rules: RetentionRules | None, *, dry_run: bool
    ) -> Sequence[RetainedPoint]:
        """Apply rules of retention to a VM's points; its own where `rules` is None."""
        message = None if rules is None else retention_message(rules)
        request = state_pb2.ApplyRetentionRequest(vm_id=check_name(vm_id, "VM name"), rules=message, dry_run=dry_run)
        answer = await self._endpoints.call(
            lambda channel: StateServiceStub(channel).ApplyRetention, request, timeout_s=_RETENTION_TIMEOUT_S
        )
        return retained_points(answer.points)
