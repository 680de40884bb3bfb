"""The guard over a real server on loopback, handlers that do what a test tells them, certificates of any shape."""

from __future__ import annotations

import datetime
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from prometheus_client import CollectorRegistry

from holdfast_coordinator import keyspace
from holdfast_coordinator.access.call import Call, current_call
from holdfast_coordinator.access.guard import AccessGuard
from holdfast_coordinator.access.identity import Identities, StaticToken, admin_token
from holdfast_coordinator.access.refusals import RefusalCounts
from holdfast_coordinator.access.service import AccessService
from holdfast_coordinator.access.view import AccessView
from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.tenant import Tenant
from holdfast_coordinator.transactions import Outcome, attempt
from holdfast_coordinator.usage import UsageChange
from holdfast_core.model.access.policy import DEFAULT_POLICY, BindingRule, Policy
from holdfast_core.model.access.tokens import token_hash
from holdfast_core.model.audit.record import AuditRecord
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.channels import open_channel
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.credentials import Credential, new_token, parse_token
from holdfast_core.runtime.metadata.store import Condition, MetadataStore, Operation, Put
from holdfast_core.runtime.options import TlsFiles
from holdfast_core.runtime.server import ServiceHost
from holdfast_core.runtime.status import error_from_rpc
from holdfast_proto.v1 import access_pb2, audit_pb2, cluster_pb2, state_pb2, tenants_pb2
from holdfast_proto.v1.access_pb2_grpc import AccessServiceStub, add_AccessServiceServicer_to_server
from holdfast_proto.v1.audit_pb2_grpc import AuditServiceServicer, AuditServiceStub, add_AuditServiceServicer_to_server
from holdfast_proto.v1.cluster_pb2_grpc import (
    ClusterServiceServicer,
    ClusterServiceStub,
    add_ClusterServiceServicer_to_server,
)
from holdfast_proto.v1.state_pb2_grpc import StateServiceServicer, StateServiceStub, add_StateServiceServicer_to_server
from holdfast_proto.v1.tenants_pb2_grpc import (
    TenantServiceServicer,
    TenantServiceStub,
    add_TenantServiceServicer_to_server,
)

ADMIN: Final = new_token(random.Random(7).randbytes)
TENANTS: Final = ("default", "blue", "green")

Act = Callable[[Call], Awaitable[None]]


class KeptLedger(Ledger):
    """Applies what it is given and keeps the records in a list; `away` makes it as one whose store is lost."""

    def __init__(self, store: MetadataStore, clock: Clock) -> None:
        self._kept_store = store
        self._kept_clock = clock
        self.records: list[AuditRecord] = []
        self.away = False

    async def apply(
        self,
        entry: Entry,
        conditions: Sequence[Condition],
        operations: Sequence[Operation],
        usage: UsageChange | None = None,
    ) -> Outcome:
        if self.away:
            raise HoldfastError(ErrorCode.UNREACHABLE, "the store is away")
        outcome = await attempt(self._kept_store, conditions, operations) if operations else Outcome.APPLIED
        if outcome is Outcome.APPLIED:
            self.records.append(entry.record(len(self.records), self._kept_clock.now_unix_ms()))
            entry.written = True
        return outcome

    async def record(self, entry: Entry) -> None:
        if not entry.written:
            await self.apply(entry, (), ())


async def require_default(call: Call) -> None:
    """What a handler of one VM does."""
    call.require("vm/web-1")


class Tiny(StateServiceServicer, TenantServiceServicer, AuditServiceServicer, ClusterServiceServicer):
    """Handlers of every shape; each runs `act` and answers with nothing."""

    def __init__(self) -> None:
        self.act: Act = require_default
        self.calls: list[Call] = []

    async def _act(self) -> None:
        call = current_call()
        self.calls.append(call)
        await self.act(call)

    async def GetVm(self, request: Any, context: Any) -> state_pb2.GetVmResponse:
        await self._act()
        return state_pb2.GetVmResponse()

    async def BeginPoint(self, request: Any, context: Any) -> state_pb2.BeginPointResponse:
        await self._act()
        return state_pb2.BeginPointResponse()

    async def KeepAlive(self, request: Any, context: Any) -> state_pb2.KeepAliveResponse:
        await self._act()
        return state_pb2.KeepAliveResponse()

    async def RefreshGrant(self, request: Any, context: Any) -> state_pb2.RefreshGrantResponse:
        await self._act()
        return state_pb2.RefreshGrantResponse()

    async def ListTenants(self, request: Any, context: Any) -> tenants_pb2.ListTenantsResponse:
        await self._act()
        return tenants_pb2.ListTenantsResponse()

    async def ExportAuditRecords(
        self, request: Any, context: Any
    ) -> AsyncIterator[audit_pb2.ExportAuditRecordsResponse]:
        await self._act()
        yield audit_pb2.ExportAuditRecordsResponse()

    async def WatchCluster(self, request: Any, context: Any) -> AsyncIterator[cluster_pb2.WatchClusterResponse]:
        await self._act()
        yield cluster_pb2.WatchClusterResponse()


@dataclass(slots=True)
class Rig:
    """A server behind the guard, and clients of it."""

    store: MetadataStore
    view: AccessView
    ledger: KeptLedger
    refusals: RefusalCounts
    registry: CollectorRegistry
    clock: Clock
    tiny: Tiny
    identities: Identities
    host: ServiceHost
    tenants: set[str] = field(default_factory=lambda: set(TENANTS))

    async def bind(self, *bindings: tuple[str, str, str, str]) -> None:
        """Set a policy of these bindings alone."""
        document = Policy({}, tuple(BindingRule(*each) for each in bindings)).to_document()
        await self.store.txn([], [Put(keyspace.ACCESS_POLICY, document.encode())])
        await self.view.fresh()

    async def token_of(self, principal: str, *, ends_unix_ms: int | None = None) -> str:
        """Keep a token for a principal and return its text."""
        text = new_token(random.randbytes)
        token_id, secret = parse_token(text)
        record = access_pb2.TokenRecord(
            token_id=token_id,
            principal=principal,
            secret_hash=token_hash(secret),
            expires_unix_ms=self.clock.now_unix_ms() + 60_000 if ends_unix_ms is None else ends_unix_ms,
        )
        await self.store.txn([], [Put(keyspace.token(token_id), record.SerializeToString())])
        await self.view.fresh()
        return text

    def actions(self) -> list[tuple[str, str, str, str, str]]:
        """What was recorded, as (principal, tenant, action, resource, outcome)."""
        return [(each.principal, each.tenant, each.action, each.resource, each.outcome) for each in self.ledger.records]

    def counted(self, reason: str) -> float:
        """How many calls without a good credential the metric shows for a reason."""
        return self.registry.get_sample_value("holdfast_unauthenticated_total", {"reason": reason}) or 0.0

    @asynccontextmanager
    async def client(self, token: str = "", *, tenant: str = "", tls: TlsFiles | None = None) -> AsyncIterator[Client]:
        """A client that shows this token and means this tenant."""
        # Certificates are for the name, and only who speaks TLS looks.
        address = self.host.address if tls is None else self.host.address.replace("127.0.0.1", "localhost")
        client = Client(address, Credential(token=token, tenant=tenant), tls)
        try:
            yield client
        finally:
            await client.close()


class Client:
    """Calls by name; errors come as `HoldfastError`."""

    def __init__(self, address: str, credential: Credential, tls: TlsFiles | None) -> None:
        self._channel = open_channel(address, tls=tls)
        self._credential = credential

    async def call(self, name: str, request: Any = None, *, metadata: Sequence[tuple[str, str]] | None = None) -> Any:
        """Make one call; streams are read to their end. Without a request an empty one goes."""
        stub, module = {
            "ListTenants": (TenantServiceStub, tenants_pb2),
            "ExportAuditRecords": (AuditServiceStub, audit_pb2),
            "WatchCluster": (ClusterServiceStub, cluster_pb2),
        }.get(name, (AccessServiceStub if hasattr(access_pb2, f"{name}Request") else StateServiceStub, None))
        module = module or (access_pb2 if stub is AccessServiceStub else state_pb2)
        method = getattr(stub(self._channel), name)
        request = getattr(module, f"{name}Request")() if request is None else request
        sent = self._credential.metadata() if metadata is None else tuple(metadata)
        try:
            answer = method(request, timeout=20, metadata=sent)
            if isinstance(answer, grpc.aio.UnaryStreamCall):
                return [each async for each in answer]
            return await answer
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, peer="test") from error

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


@asynccontextmanager
async def running(
    store: MetadataStore,
    clock: Clock,
    *,
    tls: TlsFiles | None = None,
    static: Sequence[StaticToken] | None = None,
    encrypted: bool | None = None,
) -> AsyncIterator[Rig]:
    """Run the guard over a store."""
    registry = CollectorRegistry()
    view = AccessView(store, registry)
    await view.fresh()
    ledger = KeptLedger(store, clock)
    source = random.Random(5).randbytes
    refusals = RefusalCounts(ledger, registry, clock=clock, random_bytes=source)
    statics = (admin_token(Credential(token=ADMIN)),) if static is None else static
    identities = Identities(view, static=statics, clock=clock)
    tenants = set(TENANTS)

    async def tenant(name: str) -> Tenant:
        if name not in tenants:
            raise HoldfastError(ErrorCode.NOT_FOUND, f"there is no tenant {name}")
        return cast(Tenant, name)

    guard = AccessGuard(
        view=view,
        identities=identities,
        tenant=tenant,
        ledger=ledger,
        refusals=refusals,
        encrypted=tls is not None if encrypted is None else encrypted,
        clock=clock,
        random_bytes=source,
    )
    host = ServiceHost("test", bind="127.0.0.1:0", tls=tls, guard=guard)
    tiny = Tiny()  # type: ignore[abstract]  # what no test calls answers UNIMPLEMENTED
    host.add(add_StateServiceServicer_to_server, tiny, "holdfast.v1.StateService")
    host.add(add_TenantServiceServicer_to_server, tiny, "holdfast.v1.TenantService")
    host.add(add_AuditServiceServicer_to_server, tiny, "holdfast.v1.AuditService")
    host.add(add_ClusterServiceServicer_to_server, tiny, "holdfast.v1.ClusterService")
    service = AccessService(store, ledger, view, identities, clock)
    host.add(add_AccessServiceServicer_to_server, service, "holdfast.v1.AccessService")
    await host.start()
    try:
        yield Rig(store, view, ledger, refusals, registry, clock, tiny, identities, host, tenants)
    finally:
        await host.stop(0)


class Authority:
    """A certificate authority whose leaves may have any names and times."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test authority")])
        builder = self._builder(self._name, self._key.public_key(), datetime.timedelta(days=2))
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        self._certificate = builder.sign(self._key, hashes.SHA256())

    def issue(
        self,
        folder: Path,
        *,
        uris: Sequence[str] = (),
        hosts: Sequence[str] = (),
        life: datetime.timedelta = datetime.timedelta(days=1),
    ) -> TlsFiles:
        """Write the files of one party, whose certificate ends after `life`."""
        folder.mkdir()
        files = TlsFiles(ca=folder / "ca.pem", cert=folder / "cert.pem", key=folder / "key.pem")
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "admin")])
        names = [*map(x509.UniformResourceIdentifier, uris), *map(x509.DNSName, hosts)]
        builder = self._builder(name, key.public_key(), life)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        files.ca.write_bytes(self._certificate.public_bytes(Encoding.PEM))
        files.cert.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM))
        files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return files

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, life: datetime.timedelta
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + life)
        )


def fingerprint(files: TlsFiles) -> bytes:
    """SHA-256 of a party's certificate."""
    return x509.load_pem_x509_certificate(files.cert.read_bytes()).fingerprint(hashes.SHA256())


DEFAULT_BINDINGS: Final = tuple(
    (each.principal, each.role, each.tenant, each.resource) for each in DEFAULT_POLICY.bindings
)
