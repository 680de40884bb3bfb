"""AccessService: the gRPC shell around tokens, the policy and revoked certificates."""

from __future__ import annotations

import hashlib
from typing import Any, Final, TypeAlias

import grpc.aio

from holdfast_coordinator import keyspace
from holdfast_coordinator.access.call import current_call
from holdfast_coordinator.access.identity import Identities, Shown
from holdfast_coordinator.access.tokens import Tokens
from holdfast_coordinator.access.view import AccessView
from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.records import check_fits_answer, load, parse, still
from holdfast_coordinator.transactions import ATTEMPTS_MAX, Outcome, contention
from holdfast_core.model.access.policy import DEFAULT_DOCUMENT, Policy, check_principal
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import REVOKED_CERTIFICATES_MAX
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.metadata.store import Absent, KeyValue, MetadataStore, Put
from holdfast_proto.v1 import access_pb2 as pb
from holdfast_proto.v1.access_pb2_grpc import AccessServiceServicer

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

RESOURCE: Final = "access"
# What GetPolicy gives as the revision of a policy that nobody has set, so that the first change can be compared too.
_NEVER_SET: Final = -1
_FINGERPRINT_BYTES: Final = 32


class AccessService(AccessServiceServicer):
    """Principals, what they may do, and how they prove who they are."""

    def __init__(
        self, store: MetadataStore, ledger: Ledger, view: AccessView, identities: Identities, clock: Clock
    ) -> None:
        """Bind to where it is kept and to the copy that calls are let in from."""
        self._store = store
        self._ledger = ledger
        self._view = view
        self._identities = identities
        self._clock = clock
        self._tokens = Tokens(store, ledger, view, clock)

    async def WhoAmI(self, request: pb.WhoAmIRequest, context: Context) -> pb.WhoAmIResponse:
        """Say who the caller is."""
        call = current_call()
        call.filtered()
        who = self._identities.of(Shown.of(context))
        rights = self._view.policy.rights_of(who.principal, who.also)
        return pb.WhoAmIResponse(
            principal=who.principal,
            proof=who.proof,
            tenant=call.entry.tenant,
            bindings=[
                pb.Binding(principal=each.principal, role=each.role, tenant=each.tenant, resource=each.resource)
                for each in rights.bindings
            ],
        )

    async def CreateToken(self, request: pb.CreateTokenRequest, context: Context) -> pb.CreateTokenResponse:
        """Keep a token that the caller has drawn."""
        return pb.CreateTokenResponse(record=await self._tokens.create(request, _entry("CreateToken")))

    async def ListTokens(self, request: pb.ListTokensRequest, context: Context) -> pb.ListTokensResponse:
        """List tokens."""
        _entry("ListTokens")
        return pb.ListTokensResponse(tokens=await self._tokens.list())

    async def RevokeToken(self, request: pb.RevokeTokenRequest, context: Context) -> pb.RevokeTokenResponse:
        """End a token."""
        await self._tokens.revoke(request.token_id, _entry("RevokeToken"))
        return pb.RevokeTokenResponse()

    async def GetPolicy(self, request: pb.GetPolicyRequest, context: Context) -> pb.GetPolicyResponse:
        """Return the policy as it is in the store, also where it is malformed."""
        _entry("GetPolicy")
        item = await self._store.get(keyspace.ACCESS_POLICY)
        if item is None:
            return pb.GetPolicyResponse(document=DEFAULT_DOCUMENT, revision=_NEVER_SET)
        return pb.GetPolicyResponse(document=item.value.decode("utf-8", "replace"), revision=item.mod_revision)

    async def SetPolicy(self, request: pb.SetPolicyRequest, context: Context) -> pb.SetPolicyResponse:
        """Replace the policy as a whole."""
        entry = _entry("SetPolicy")
        value = request.document.encode()
        # The log cannot hold the document; it says which one it was.
        entry.details["sha256"] = hashlib.sha256(value).hexdigest()
        entry.details["bindings"] = str(len(Policy.parse(request.document).bindings))
        for _ in range(ATTEMPTS_MAX):
            item = await self._store.get(keyspace.ACCESS_POLICY)
            if item is not None and item.value == value:
                # This request sent again, or somebody else's with the same words: there is nothing to change.
                entry.repeated()
                return pb.SetPolicyResponse(revision=item.mod_revision)
            if request.revision not in (0, _revision_of(item)):
                raise HoldfastError(
                    ErrorCode.CONFLICT, "the policy has been changed since it was read; read it and change it again"
                )
            condition = still(keyspace.ACCESS_POLICY, item)
            if await self._ledger.apply(entry, [condition], [Put(keyspace.ACCESS_POLICY, value)]) is Outcome.APPLIED:
                await self._view.fresh()
                # Where another change came right after ours, the next one of this caller has to read that first.
                return pb.SetPolicyResponse(revision=self._view.revision_of(value) or _NEVER_SET)
        raise contention("the policy")

    async def RevokeCertificate(
        self, request: pb.RevokeCertificateRequest, context: Context
    ) -> pb.RevokeCertificateResponse:
        """Refuse a certificate from now on."""
        entry = _entry("RevokeCertificate")
        if len(request.fingerprint) != _FINGERPRINT_BYTES:
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"a fingerprint is a SHA-256 of {_FINGERPRINT_BYTES} bytes")
        if request.principal:
            check_principal(request.principal)
        entry.details |= {"fingerprint": request.fingerprint.hex(), "of": request.principal}
        key = keyspace.revoked(request.fingerprint)
        mark = pb.RevokedCertificate(
            fingerprint=request.fingerprint,
            principal=request.principal,
            revoked_unix_ms=self._clock.now_unix_ms(),
        )
        for _ in range(ATTEMPTS_MAX):
            if await load(self._store, key, pb.RevokedCertificate) is not None:
                entry.repeated()
                return pb.RevokeCertificateResponse()
            if len(self._view.revoked) >= REVOKED_CERTIFICATES_MAX:
                raise HoldfastError(
                    ErrorCode.LIMIT_EXCEEDED,
                    f"{REVOKED_CERTIFICATES_MAX} certificates are revoked already; make a new CA",
                )
            operations = [Put(key, mark.SerializeToString())]
            if await self._ledger.apply(entry, [Absent(key)], operations) is Outcome.APPLIED:
                await self._view.fresh()
                return pb.RevokeCertificateResponse()
        raise contention("the list of revoked certificates")

    async def ListRevokedCertificates(
        self, request: pb.ListRevokedCertificatesRequest, context: Context
    ) -> pb.ListRevokedCertificatesResponse:
        """List revoked certificates, by fingerprint."""
        _entry("ListRevokedCertificates")
        snapshot = await self._store.snapshot([keyspace.REVOKED_PREFIX])
        items = check_fits_answer(snapshot.items, "the list of revoked certificates")
        return pb.ListRevokedCertificatesResponse(
            certificates=[parse(item, pb.RevokedCertificate).message for item in items]
        )


def _entry(name: str) -> Entry:
    """Check that the caller may administer access; return what the audit log will say of the call of this name."""
    call = current_call()
    call.entry.details["call"] = name
    call.require(RESOURCE)
    return call.entry


def _revision_of(item: KeyValue | None) -> int:
    return _NEVER_SET if item is None else item.mod_revision
