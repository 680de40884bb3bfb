"""Adding up from its records what a tenant has, where no transaction has ever written it down (ADR 0082)."""

from __future__ import annotations

from holdfast_coordinator.keyspace import TenantKeyspace
from holdfast_coordinator.records import count, each, parse
from holdfast_core.runtime.metadata.store import MetadataStore
from holdfast_proto.v1.records_pb2 import ObjectRecord, PointRecord
from holdfast_proto.v1.tenants_pb2 import Usage


async def count_usage(store: MetadataStore, tenant: int) -> Usage:
    """Return what a tenant's VMs, points and objects add up to, each as its forgetting would give it back.

    A point of a version that did not charge counts as 0 bytes, now and when it is forgotten. The pages are not all read
    at one revision: who writes the sum compares the head of the audit log, which every change of a record moves.

    Raises:
        HoldfastError: UNREACHABLE as the store; INTERNAL if a record is not one.
    """
    space = TenantKeyspace(tenant)
    usage = Usage(vms=await count(store, space.vms_prefix))
    async for item in each(store, space.points_prefix):
        usage.bytes += parse(item, PointRecord).message.charged_bytes
    async for item in each(store, space.objects_prefix):
        usage.objects += 1
        usage.bytes += parse(item, ObjectRecord).message.size_bytes
    return usage
