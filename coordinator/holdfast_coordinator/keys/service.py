"""KeyService: the gRPC shell around keys. No key crosses it, only what identifies one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

import grpc.aio

from holdfast_coordinator.access.call import current_call
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.keys.chain import KeyChain, SigningKey
from holdfast_coordinator.keys.master import MasterKeys
from holdfast_coordinator.keys.rewrap import Rewrapping
from holdfast_coordinator.keys.signing import SigningKeys
from holdfast_coordinator.keys.tenant_keys import TenantKeyRotation, Wanted
from holdfast_coordinator.tenants import Tenants
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.metadata.store import MetadataStore
from holdfast_proto.v1 import keys_pb2 as pb
from holdfast_proto.v1.keys_pb2_grpc import KeyServiceServicer

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

CAPABILITY: Final = "capability"
AUDIT: Final = "audit"
_ADMIN: Final = "keys.admin"
_CLUSTER: Final = "cluster"


class KeyService(KeyServiceServicer):
    """Epochs of tenants' secrets, keys that sign, and the master key's wrapping."""

    def __init__(
        self,
        store: MetadataStore,
        chain: KeyChain,
        master: MasterKeys,
        ledger: Ledger,
        tenants: Tenants,
        *,
        clock: Clock,
        random_bytes: Callable[[int], bytes],
    ) -> None:
        """Bind to the logic."""
        self._chain = chain
        self._master = master
        self._tenants = tenants
        self._signing = SigningKeys(store, chain, master, ledger, clock, random_bytes)
        self._rotation = TenantKeyRotation(store, chain, master, ledger, random_bytes)
        self._rewrapping = Rewrapping(store, master, ledger)

    async def ListKeys(self, request: pb.ListKeysRequest, context: Context) -> pb.ListKeysResponse:
        """Say which keys there are: the tenant's epochs, and to who may change them the cluster's keys."""
        call = current_call()
        record = call.of.record
        call.require(_tenant_resource(record.name))
        secrets = await self._chain.secrets(record.tenant)
        response = pb.ListKeysResponse(data_epochs=secrets.data_epochs, structure_epochs=secrets.structure_epochs)
        if call.may(_ADMIN, _CLUSTER):
            await self._chain.fresh()
            response.master_fingerprint = self._master.fingerprint
            response.wrapped_by.update(await self._rewrapping.wrapped_by())
            signing = {self._chain.signing_key().key_id, self._chain.audit_key().key_id}
            for purpose, keys in ((CAPABILITY, self._chain.signing_keys()), (AUDIT, self._chain.audit_keys_held())):
                for key in keys:
                    response.signing_keys.append(_described(key, purpose, signing=key.key_id in signing))
        return response

    async def RotateTenantKeys(
        self, request: pb.RotateTenantKeysRequest, context: Context
    ) -> pb.RotateTenantKeysResponse:
        """Start new epochs for the tenant's new blocks."""
        call = current_call()
        record = call.of.record
        call.require(_tenant_resource(record.name))
        wanted = Wanted(request.data, request.structure, request.after_data_epoch, request.after_structure_epoch)
        secrets = await self._rotation.rotate(call.entry, record.tenant, wanted)
        # This coordinator's next session begins under the new epoch; others hear of it by their watch.
        await self._tenants.fresh()
        return pb.RotateTenantKeysResponse(
            data_epoch=max(secrets.data_epochs, default=0), structure_epoch=max(secrets.structure_epochs)
        )

    async def RotateSigningKey(
        self, request: pb.RotateSigningKeyRequest, context: Context
    ) -> pb.RotateSigningKeyResponse:
        """Make a new key for capabilities or for heads of the audit log."""
        call = current_call()
        call.require(_CLUSTER)
        if request.purpose == CAPABILITY:
            made = await self._signing.rotate_capability(
                call.entry, after=request.after_key_id, retire_now=request.retire_now
            )
        elif request.purpose != AUDIT:
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT, f"keys sign for {CAPABILITY!r} or {AUDIT!r}, not for {request.purpose!r}"
            )
        elif request.retire_now:
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT, "keys of the audit log stay for good: what they signed must stay verifiable"
            )
        else:
            made = await self._signing.rotate_audit(call.entry, after=request.after_key_id)
        return pb.RotateSigningKeyResponse(key_id=made.key_id, public_key=made.public_key)

    async def RewrapKeys(self, request: pb.RewrapKeysRequest, context: Context) -> pb.RewrapKeysResponse:
        """Wrap all secrets with the present master key."""
        call = current_call()
        call.require(_CLUSTER)
        rewrapped = await self._rewrapping.run(call.entry)
        return pb.RewrapKeysResponse(rewrapped=rewrapped, master_fingerprint=self._master.fingerprint)


def _tenant_resource(name: str) -> str:
    return f"tenant/{name}"


def _described(key: SigningKey, purpose: str, *, signing: bool) -> pb.ListKeysResponse.SigningKey:
    return pb.ListKeysResponse.SigningKey(
        key_id=key.key_id,
        purpose=purpose,
        public_key=key.public_key,
        created_unix_ms=key.created_unix_ms,
        signing=signing,
    )
