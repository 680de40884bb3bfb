"""What the tests of keys share: plain calls to a cluster in memory, and its coordinator's store and keys."""

from __future__ import annotations

import asyncio
from typing import Any

from holdfast.testing import MemoryCluster
from holdfast_coordinator.coordinator import Coordinator
from holdfast_core.runtime.credentials import Credential
from holdfast_core.runtime.endpoints import Endpoints
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_proto.v1.keys_pb2_grpc import KeyServiceStub
from holdfast_proto.v1.tenants_pb2_grpc import TenantServiceStub

_STUBS: Any = {"keys": KeyServiceStub, "tenants": TenantServiceStub}


def ask(address: str, token: str, service: str, method: str, request: Any, *, tenant: str = "") -> Any:
    """Make one call as the administrator; `service` is "keys" or "tenants"."""

    async def call() -> Any:
        endpoints = Endpoints([address], credential=Credential(token=token, tenant=tenant))
        try:
            return await endpoints.call(lambda channel: getattr(_STUBS[service](channel), method), request)
        finally:
            await endpoints.close()

    return asyncio.run(call())


def ask_cluster(cluster: MemoryCluster, service: str, method: str, request: Any, *, tenant: str = "") -> Any:
    """As `ask`, of a cluster in memory."""
    return ask(cluster.coordinator_address, cluster.token, service, method, request, tenant=tenant)


def coordinator_of(cluster: MemoryCluster) -> Coordinator:
    """The coordinator, behind the service's back."""
    coordinator = cluster._coordinator._coordinator  # type: ignore[union-attr]
    assert isinstance(coordinator, Coordinator)
    return coordinator


def metadata_of(cluster: MemoryCluster) -> SqliteStore:
    """Its metadata store."""
    store = coordinator_of(cluster)._store
    assert isinstance(store, SqliteStore)
    return store
