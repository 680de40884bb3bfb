"""Real coordinators on loopback over real metadata stores, and clients that speak gRPC to them."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any

import grpc.aio
import pytest

from holdfast_coordinator import keyspace
from holdfast_coordinator.access.identity import admin_token
from holdfast_coordinator.bootstrap import ClusterOptions
from holdfast_coordinator.coordinator import Coordinator, CoordinatorSettings
from holdfast_coordinator.healing.parts import HealingSettings
from holdfast_coordinator.keys.master import FileMasterKey, MasterKeys
from holdfast_coordinator.records import each, parse
from holdfast_core.model.access.tokens import token_hash
from holdfast_core.model.audit.record import AuditRecord
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.keys import KeyRing, TenantSecrets
from holdfast_core.model.records import object_mac, point_mac
from holdfast_core.runtime.channels import open_channel
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.credentials import Credential, new_token, parse_token
from holdfast_core.runtime.metadata.store import MetadataStore, Put
from holdfast_core.runtime.options import TlsFiles
from holdfast_core.runtime.status import error_from_rpc
from holdfast_proto.v1 import access_pb2, cluster_pb2, state_pb2
from holdfast_proto.v1.access_pb2_grpc import AccessServiceStub
from holdfast_proto.v1.audit_pb2 import AuditBatch
from holdfast_proto.v1.cluster_pb2_grpc import ClusterServiceStub
from holdfast_proto.v1.collection_pb2_grpc import CollectionServiceStub
from holdfast_proto.v1.common_pb2 import NodeStatus, TenantKeys
from holdfast_proto.v1.records_pb2 import CONSISTENCY_OFFLINE, NodeRecord, VmRecord, VolumeRecord, VolumeSpec
from holdfast_proto.v1.state_pb2_grpc import StateServiceStub
from holdfast_proto.v1.tenants_pb2_grpc import TenantServiceStub

MASTER_KEY = bytes(range(32))
ADMIN_TOKEN = new_token(random.Random(3).randbytes)
STATIC_TOKENS = (admin_token(Credential(token=ADMIN_TOKEN)),)
PARTITIONS = 16
VOLUME_BYTES = 1 << 20
BLOCK_BYTES = 64 * 1024


def master_keys(key: bytes = MASTER_KEY) -> MasterKeys:
    """Return a master key as coordinators take it."""
    return MasterKeys(FileMasterKey(key, random.Random(key).randbytes))


async def eventually(condition: Callable[[], Awaitable[bool]], what: str, *, within_s: float = 20.0) -> None:
    """Wait until the condition holds; fail with `what` once the time is over."""
    deadline_s = time.monotonic() + within_s
    while not await condition():
        assert time.monotonic() < deadline_s, f"{what}: not within {within_s} s"
        await asyncio.sleep(0.02)


async def refused(code: ErrorCode, awaitable: Awaitable[object]) -> HoldfastError:
    """Await something that must be refused with `code`; return the error."""
    with pytest.raises(HoldfastError) as caught:
        await awaitable
    assert caught.value.code is code, caught.value
    return caught.value


class Client:
    """Calls one coordinator, as an administrator unless told otherwise; errors come as `HoldfastError`."""

    def __init__(
        self, address: str, *, tls: TlsFiles | None = None, token: str = ADMIN_TOKEN, tenant: str = ""
    ) -> None:
        self.address = address
        self._metadata = Credential(token=token, tenant=tenant).metadata()
        self._channel = open_channel(address, tls=tls)
        self._access = AccessServiceStub(self._channel)
        self._state = StateServiceStub(self._channel)
        self._cluster = ClusterServiceStub(self._channel)
        self._tenants = TenantServiceStub(self._channel)
        self._collection = CollectionServiceStub(self._channel)

    async def state(self, name: str, request: Any) -> Any:
        """Call a method of the state service."""
        return await self._call(getattr(self._state, name), request)

    async def cluster(self, name: str, request: Any) -> Any:
        """Call a method of the cluster service."""
        return await self._call(getattr(self._cluster, name), request)

    async def collection(self, name: str, request: Any) -> Any:
        """Call a method of the collection service."""
        return await self._call(getattr(self._collection, name), request)

    async def access(self, name: str, request: Any) -> Any:
        """Call a method of the access service."""
        return await self._call(getattr(self._access, name), request)

    async def tenants(self, name: str, request: Any) -> Any:
        """Call a method of the tenant service."""
        return await self._call(getattr(self._tenants, name), request)

    def watch(self) -> Any:
        """Open WatchCluster."""
        return self._cluster.WatchCluster(cluster_pb2.WatchClusterRequest(), metadata=self._metadata)

    async def first_state(self) -> Any:
        """Open WatchCluster, return its first message and end it."""
        watch = self.watch()
        try:
            return await watch.read()
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, peer=self.address) from error
        finally:
            watch.cancel()

    async def new_token(self, principal: str) -> str:
        """Make a token for a principal and return its text."""
        token = new_token(random.randbytes)
        token_id, secret = parse_token(token)
        request = access_pb2.CreateTokenRequest(
            token_id=token_id, principal=principal, secret_hash=token_hash(secret), ttl_s=3600
        )
        await self.access("CreateToken", request)
        return token

    async def bind(
        self,
        *bindings: tuple[str, str, str],
        tenant: str = "default",
        roles: Mapping[str, Iterable[str]] = MappingProxyType({}),
    ) -> None:
        """Let principals hold roles on patterns of resources, and nobody else anything; `roles` are new ones."""
        held = [{"principal": p, "role": r, "tenant": tenant, "resource": on} for p, r, on in bindings]
        made = {name: sorted(permissions) for name, permissions in roles.items()}
        document = json.dumps({"format": 1, "roles": made, "bindings": held})
        revision = (await self.access("GetPolicy", access_pb2.GetPolicyRequest())).revision
        await self.access("SetPolicy", access_pb2.SetPolicyRequest(document=document, revision=revision))

    async def _call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=20, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, peer=self.address) from error

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    async def beat(
        self, number: int, *, lease_id: int = 0, layout_revision: int = 0, **changes: Any
    ) -> cluster_pb2.HeartbeatResponse:
        """Send the heartbeat of node `number`, which nobody has to be behind."""
        incarnation = changes.pop("incarnation", bytes([number]) * 16)
        fields: dict[str, Any] = {
            "node_id": f"node-{number}",
            "address": f"127.0.0.1:{1024 + number}",
            "zone": f"zone-{number % 3}",
            "capacity_bytes": 1 << 40,
        }
        status = NodeStatus(**(fields | changes))
        request = cluster_pb2.HeartbeatRequest(
            status=status, lease_id=lease_id, incarnation=incarnation, layout_revision=layout_revision
        )
        answer: cluster_pb2.HeartbeatResponse = await self.cluster("Heartbeat", request)
        return answer

    async def form_layout(self, nodes: int = 3) -> None:
        """Register nodes until the first layout forms."""
        for number in range(1, nodes + 1):
            await self.beat(number)

    async def register_vm(
        self, vm_id: str = "vm-1", *, replace: bool = False, volumes: Sequence[str] = ("root",)
    ) -> Any:
        """Register a VM with volumes of these names."""
        vm = VmRecord(vm_id=vm_id, volumes=[VolumeSpec(name=name, uri=f"/disks/{name}") for name in volumes])
        return await self.state("RegisterVm", state_pb2.RegisterVmRequest(vm=vm, replace=replace))

    async def begin(self, vm_id: str = "vm-1", nonce: bytes | None = None, **fields: Any) -> Any:
        """Begin a point."""
        nonce = random.randbytes(16) if nonce is None else nonce
        return await self.state("BeginPoint", state_pb2.BeginPointRequest(vm_id=vm_id, nonce=nonce, **fields))

    async def commit(self, request: state_pb2.CommitPointRequest) -> Any:
        """Commit a point."""
        return (await self.state("CommitPoint", request)).point

    async def save(self, vm_id: str = "vm-1", **fields: Any) -> Any:
        """Make a point of zeros and return its record."""
        begun = await self.begin(vm_id, **fields)
        return await self.commit(zero_commit(begun))

    async def points(self, vm_id: str = "vm-1", *, include_forgotten: bool = False) -> list[Any]:
        """List a VM's points."""
        request = state_pb2.ListPointsRequest(vm_id=vm_id, include_forgotten=include_forgotten)
        return list((await self.state("ListPoints", request)).points)


async def add_stopped_node(store: MetadataStore, node_id: str) -> None:
    """Register a node that sent its last heartbeat long ago, and owns and holds nothing."""
    record = NodeRecord(node_id=node_id, zone="zone-9", capacity_bytes=1 << 40, incarnation=bytes(16))
    await store.txn([], [Put(keyspace.node_record(node_id), record.SerializeToString())])


async def records(store: MetadataStore) -> list[AuditRecord]:
    """Return what the audit log has, oldest first."""
    batches = [parse(item, AuditBatch).message async for item in each(store, keyspace.AUDIT_BATCHES_PREFIX)]
    return [AuditRecord.from_line(line) for batch in batches for line in batch.lines]


def ring_of(keys: TenantKeys) -> KeyRing:
    """Return the key ring of a grant."""
    return KeyRing(TenantSecrets.from_message(keys))


def point_commit(begun: state_pb2.BeginPointResponse, volumes: Sequence[VolumeRecord]) -> state_pb2.CommitPointRequest:
    """Return the commit of a session with these volumes, authenticated as the SDK does it."""
    parent_id = begun.parent.point_id if begun.HasField("parent") else ""
    mac = point_mac(
        ring_of(begun.grant.keys),
        tenant=begun.grant.keys.tenant,
        point_id=begun.session_id,
        vm_id=begun.vm.vm_id,
        parent_id=parent_id,
        volumes=volumes,
    )
    return state_pb2.CommitPointRequest(session_id=begun.session_id, volumes=volumes, mac=mac, parent_id=parent_id)


def zero_volume(name: str = "root") -> VolumeRecord:
    """Return a volume of zeros: it names no block, so its commit asks no node."""
    return VolumeRecord(name=name, size_bytes=VOLUME_BYTES, block_bytes=BLOCK_BYTES, consistency=CONSISTENCY_OFFLINE)


def zero_commit(begun: state_pb2.BeginPointResponse) -> state_pb2.CommitPointRequest:
    """Return the commit of a session whose volume is all zero."""
    return point_commit(begun, [zero_volume()])


def empty_object_commit(begun: state_pb2.BeginObjectResponse, task_id: str) -> state_pb2.CommitObjectRequest:
    """Return the commit of an object without bytes."""
    keys = begun.grant.keys
    mac = object_mac(
        ring_of(keys), tenant=keys.tenant, storage_id=begun.session_id, task_id=task_id, size_bytes=0, root=b""
    )
    return state_pb2.CommitObjectRequest(session_id=begun.session_id, mac=mac)


@asynccontextmanager
async def coordinator(
    store: MetadataStore,
    *,
    clock: Clock | None = None,
    nodes: int | None = 3,
    replicas: int | None = 3,
    partitions: int | None = PARTITIONS,
    master_key: bytes = MASTER_KEY,
    session_ttl_s: float = 30.0,
    node_lease_ttl_s: float = 10.0,
    healing: HealingSettings | None = None,
    seed: int = 1,
) -> AsyncIterator[Client]:
    """Run a coordinator over the store; yields a client of it."""
    service = Coordinator(
        store,
        master=master_keys(master_key),
        settings=CoordinatorSettings(
            options=ClusterOptions(nodes_expected=nodes, replicas=replicas, partitions=partitions),
            session_ttl_s=session_ttl_s,
            healing=healing or HealingSettings(node_lease_ttl_s=node_lease_ttl_s),
            static_tokens=STATIC_TOKENS,
        ),
        random_bytes=random.Random(seed).randbytes,
        clock=clock,
    )
    client = Client(await service.start())
    try:
        yield client
    finally:
        await client.close()
        await service.stop(0.2)
