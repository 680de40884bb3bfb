"""What a tenant has, and what a change of it may come to. Pure; the ledger writes it with what it counts (ADR 0082)."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_proto.v1.tenants_pb2 import Quota, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageChange:
    """By how much one operation changes what its tenant has; any of the three may be negative.

    Attributes:
        tenant: number of the tenant.
        quota: its quota as the caller knows it.
    """

    tenant: int
    quota: Quota
    bytes: int = 0
    objects: int = 0
    vms: int = 0


def changed(usage: Usage, change: UsageChange) -> Usage:
    """Return the usage after the change; nothing falls below 0.

    Raises:
        HoldfastError: QUOTA_EXCEEDED if what grows would pass its bound; what shrinks or stays never does.
    """
    return Usage(
        bytes=_added(usage.bytes, change.bytes, change.quota.bytes, "bytes"),
        objects=_added(usage.objects, change.objects, change.quota.objects, "objects"),
        vms=_added(usage.vms, change.vms, change.quota.vms, "VMs"),
    )


def _added(have: int, more: int, bound: int, what: str) -> int:
    after = max(0, have + more)
    if more > 0 and bound and after > bound:
        raise HoldfastError(
            ErrorCode.QUOTA_EXCEEDED,
            f"the tenant's quota is {bound} {what} and it has {have}; this takes {more} more. Forget what is no longer "
            "needed, or ask for a larger quota",
            facts={"what": what, "bound": str(bound), "have": str(have), "more": str(more)},
        )
    return after
