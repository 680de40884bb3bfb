"""The keys of a cluster as the metadata store holds them now: signing keys of both kinds, and tenants' secrets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from holdfast_coordinator import keyspace
from holdfast_coordinator.keys.master import MasterKeys
from holdfast_coordinator.records import parse
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.keys import TenantSecrets
from holdfast_core.model.limits import SIGNING_KEY_SPREAD_S
from holdfast_core.runtime.capability import CapabilitySigner
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.metadata.store import KeyValue, MetadataStore
from holdfast_proto.v1.cluster_pb2 import VerifyingKey
from holdfast_proto.v1.common_pb2 import TenantKeys
from holdfast_proto.v1.records_pb2 import WrappedSecret

_PREFIXES: Final = (keyspace.SIGNING_PREFIX, keyspace.AUDIT_KEYS_PREFIX)


def signing_purpose(key_id: str) -> str:
    """Purpose under which a key that signs capabilities is wrapped: a wrapped secret opens only as what it is."""
    return f"signing/{key_id}"


def audit_purpose(key_id: str) -> str:
    """Purpose under which a key that signs heads of the audit log is wrapped."""
    return f"audit/{key_id}"


def tenant_purpose(tenant: int) -> str:
    """Purpose under which a tenant's secrets are wrapped."""
    return f"tenant/{tenant}"


@dataclass(frozen=True, slots=True, repr=False)
class SigningKey:
    """An Ed25519 key.

    Attributes:
        key_id: its id.
        private_key: 32 bytes.
        created_unix_ms: when it was made; 0 for a cluster's first.
        create_revision: revision of the metadata store that made it; orders keys of one millisecond.
    """

    key_id: str
    private_key: bytes
    created_unix_ms: int
    create_revision: int


class KeyChain:
    """Keys as the store holds them now. `fresh` reads them, `run` keeps them so."""

    def __init__(self, store: MetadataStore, master: MasterKeys, cluster_id: str, clock: Clock) -> None:
        self._store = store
        self._master = master
        self._cluster_id = cluster_id
        self._clock = clock
        self._revision = 0
        self._signing: tuple[SigningKey, ...] = ()
        self._audit: tuple[SigningKey, ...] = ()
        self._signers: dict[str, CapabilitySigner] = {}

    @property
    def cluster_id(self) -> str:
        """Name of the cluster, which capabilities and heads are bound to."""
        return self._cluster_id

    async def fresh(self) -> None:
        """Read the signing keys at one revision.

        Raises:
            HoldfastError: KEY_MISMATCH if no master key given here wrapped one of them; CORRUPT; UNREACHABLE.
        """
        snapshot = await self._store.snapshot(_PREFIXES)
        signing = await self._opened(snapshot.items, keyspace.SIGNING_PREFIX, signing_purpose)
        audit = await self._opened(snapshot.items, keyspace.AUDIT_KEYS_PREFIX, audit_purpose)
        if snapshot.revision >= self._revision:
            self._revision, self._signing, self._audit = snapshot.revision, signing, audit

    async def run(self) -> None:
        """Follow changes of the signing keys until cancelled or until the store is closed."""
        async with aclosing(self._store.watch(keyspace.SIGNING_PREFIX)) as batches:
            async for batch in batches:
                if batch.revision > self._revision:
                    await self.fresh()

    def capability_signer(self) -> CapabilitySigner:
        """Return the signer for new capabilities: the newest key that every node has had time to learn."""
        known_unix_ms = self._clock.now_unix_ms() - int(SIGNING_KEY_SPREAD_S * 1000)
        spread = [key for key in self._signing if key.created_unix_ms <= known_unix_ms]
        key = spread[-1] if spread else self._signing[0]
        signer = self._signers.get(key.key_id)
        if signer is None:
            signer = self._signers[key.key_id] = CapabilitySigner(key.key_id, key.private_key, self._cluster_id)
        return signer

    def verifying_keys(self) -> tuple[VerifyingKey, ...]:
        """Return the public halves of all keys that capabilities in force may be signed with."""
        return tuple(
            VerifyingKey(
                key_id=key.key_id,
                public_key=CapabilitySigner(key.key_id, key.private_key, self._cluster_id).public_key,
            )
            for key in self._signing
        )

    def audit_key(self) -> SigningKey:
        """Return the key that signs heads of the audit log now: the newest."""
        return self._audit[-1]

    async def secrets(self, tenant: int) -> TenantSecrets:
        """Return a tenant's secrets as they are in the store now.

        Raises:
            HoldfastError: INTERNAL if it has none; KEY_MISMATCH, CORRUPT, UNREACHABLE as `fresh`.
        """
        item = await self._store.get(keyspace.TenantKeyspace(tenant).keys)
        if item is None:
            raise HoldfastError(ErrorCode.INTERNAL, f"the metadata store holds no keys of tenant {tenant}")
        wrapped = parse(item, WrappedSecret).message
        message = TenantKeys.FromString(await self._master.unwrap(wrapped, tenant_purpose(tenant)))
        return TenantSecrets.from_message(message)

    async def _opened(
        self, items: Iterable[KeyValue], prefix: str, purpose: Callable[[str], str]
    ) -> tuple[SigningKey, ...]:
        keys = []
        for item in items:
            if not item.key.startswith(prefix):
                continue
            stored = parse(item, WrappedSecret)
            key_id = item.key.removeprefix(prefix)
            private = await self._master.unwrap(stored.message, purpose(key_id))
            keys.append(SigningKey(key_id, private, stored.message.created_unix_ms, stored.create_revision))
        return tuple(sorted(keys, key=lambda key: (key.created_unix_ms, key.create_revision)))
