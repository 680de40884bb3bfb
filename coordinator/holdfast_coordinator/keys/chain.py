"""The keys of a cluster as the metadata store holds them now: signing keys of both kinds, and tenants' secrets.

Keys that sign capabilities live for a while: a new one is told to nodes at once and signs `SIGNING_KEY_SPREAD_S` later,
an old one is removed when the last capability that it can have signed has ended (ADR 0084). Keys that sign heads of
the audit log stay for good, since old heads must stay verifiable; the newest one signs.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from holdfast_coordinator import keyspace
from holdfast_coordinator.keys.master import MasterKeys
from holdfast_coordinator.records import parse
from holdfast_coordinator.transactions import Outcome, attempt
from holdfast_core.model.audit.heads import HeadSigner
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.keys import TenantSecrets
from holdfast_core.model.limits import CAPABILITY_TTL_S, CLOCK_TOLERANCE_S, SIGNING_KEY_SPREAD_S
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.capability import CapabilitySigner
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.logs import get_log
from holdfast_core.runtime.metadata.store import Condition, Delete, Exists, KeyValue, MetadataStore, ModRevisionIs
from holdfast_proto.v1.audit_pb2 import AuditKey
from holdfast_proto.v1.cluster_pb2 import VerifyingKey
from holdfast_proto.v1.common_pb2 import TenantKeys
from holdfast_proto.v1.records_pb2 import WrappedSecret

# How long a key is kept after its successor was made: the successor may not sign before the spread has passed, what was
# signed just before lives on for its own life, and two clocks may each be off by the tolerance.
RETIREMENT_MS: Final = int((CAPABILITY_TTL_S + 2 * CLOCK_TOLERANCE_S + SIGNING_KEY_SPREAD_S) * 1000)

_SPREAD_MS: Final = int(SIGNING_KEY_SPREAD_S * 1000)
_SWEEP_INTERVAL_S: Final = 30.0
_RETRY_S: Final = 2.0


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
        public_key: 32 bytes.
        created_unix_ms: when it was made; 0 for a cluster's first.
        create_revision: revision of the metadata store that made it; orders keys of one millisecond.
    """

    key_id: str
    private_key: bytes
    public_key: bytes
    created_unix_ms: int
    create_revision: int


class _Family:
    """The keys below one prefix, oldest first."""

    def __init__(self, prefix: str, purpose: Callable[[str], str], master: MasterKeys) -> None:
        self.prefix = prefix
        self.keys: tuple[SigningKey, ...] = ()
        self._purpose = purpose
        self._master = master
        self._revision = 0
        self._taking = asyncio.Lock()

    async def take(
        self, revision: int, puts: Iterable[KeyValue], deletes: Sequence[str] = (), *, relisted: bool
    ) -> None:
        """Take what the store says at `revision`. Raises as `MasterKeys.unwrap`; then nothing has changed."""
        async with self._taking:
            if revision < self._revision:
                return
            known = {key.key_id: key for key in self.keys}
            kept = {} if relisted else dict(known)
            for key in deletes:
                kept.pop(key.removeprefix(self.prefix), None)
            for item in puts:
                if item.key.startswith(self.prefix):
                    key_id = item.key.removeprefix(self.prefix)
                    # The id stands for the public half, so a key that is merely wrapped anew is the same key: a
                    # coordinator that does not have the new master key yet goes on with what it knows.
                    kept[key_id] = known.get(key_id) or await self._opened(key_id, item)
            self.keys = tuple(sorted(kept.values(), key=lambda key: (key.created_unix_ms, key.create_revision)))
            self._revision = revision

    async def _opened(self, key_id: str, item: KeyValue) -> SigningKey:
        wrapped = parse(item, WrappedSecret).message
        private = await self._master.unwrap(wrapped, self._purpose(key_id))
        public = CapabilitySigner(key_id, private, "").public_key
        if wrapped.public_key not in (b"", public):
            raise HoldfastError(ErrorCode.CORRUPT, f"the metadata key {item.key} names another public key than its own")
        return SigningKey(key_id, private, public, wrapped.created_unix_ms, item.create_revision)


class KeyChain:
    """Keys as the store holds them now. `fresh` reads them, `run` keeps them so."""

    def __init__(self, store: MetadataStore, master: MasterKeys, cluster_id: str, clock: Clock) -> None:
        self._store = store
        self._master = master
        self._cluster_id = cluster_id
        self._clock = clock
        self._signing = _Family(keyspace.SIGNING_PREFIX, signing_purpose, master)
        self._audit = _Family(keyspace.AUDIT_KEYS_PREFIX, audit_purpose, master)
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
        families = (self._signing, self._audit)
        snapshot = await self._store.snapshot([family.prefix for family in families])
        for family in families:
            await family.take(snapshot.revision, snapshot.items, relisted=True)

    async def run(self) -> None:
        """Follow changes of the signing keys, and remove ended ones, until cancelled.

        Raises:
            HoldfastError: KEY_MISMATCH if a new key is wrapped by a master key that is not here; CORRUPT.
        """
        async with plain_task_group() as group:
            group.create_task(self._follow(self._signing))
            group.create_task(self._follow(self._audit))
            group.create_task(self._sweep_forever())

    def capability_signer(self) -> CapabilitySigner:
        """Return the signer for new capabilities: the newest key that every node has had time to learn."""
        key = self.signing_key()
        signer = self._signers.get(key.key_id)
        if signer is None:
            signer = CapabilitySigner(key.key_id, key.private_key, self._cluster_id)
            self._signers = {key.key_id: signer}
        return signer

    def signing_key(self) -> SigningKey:
        """Return the key of `capability_signer`."""
        known_unix_ms = self._clock.now_unix_ms() - _SPREAD_MS
        spread = [key for key in self._signing.keys if key.created_unix_ms <= known_unix_ms]
        return spread[-1] if spread else self._signing.keys[0]

    def signing_keys(self) -> tuple[SigningKey, ...]:
        """Return all keys that capabilities in force may be signed with, oldest first."""
        return self._signing.keys

    def verifying_keys(self) -> tuple[VerifyingKey, ...]:
        """Return their public halves, for nodes."""
        return tuple(VerifyingKey(key_id=key.key_id, public_key=key.public_key) for key in self._signing.keys)

    def audit_key(self) -> SigningKey:
        """Return the key that signs heads of the audit log now: the newest."""
        return self._audit.keys[-1]

    def head_signer(self) -> HeadSigner:
        """Return the signer of heads of the audit log."""
        key = self.audit_key()
        return HeadSigner(key.key_id, key.private_key, self._cluster_id)

    def audit_keys_held(self) -> tuple[SigningKey, ...]:
        """Return all keys that heads were ever signed with, oldest first."""
        return self._audit.keys

    def audit_keys(self) -> tuple[AuditKey, ...]:
        """Return their public halves."""
        return tuple(AuditKey(key_id=key.key_id, public_key=key.public_key) for key in self._audit.keys)

    async def secrets(self, tenant: int) -> TenantSecrets:
        """Return a tenant's secrets as they are in the store now.

        Raises:
            HoldfastError: INTERNAL if it has none; KEY_MISMATCH, CORRUPT, UNREACHABLE as `fresh`.
        """
        item = await self._store.get(keyspace.TenantKeyspace(tenant).keys)
        if item is None:
            raise HoldfastError(ErrorCode.INTERNAL, f"the metadata store holds no keys of tenant {tenant}")
        return await self.opened(tenant, parse(item, WrappedSecret).message)

    async def opened(self, tenant: int, wrapped: WrappedSecret) -> TenantSecrets:
        """Return what a tenant's wrapped secrets hold.

        Raises:
            HoldfastError: KEY_MISMATCH, CORRUPT; UNREACHABLE if the master key's service is away.
        """
        message = TenantKeys.FromString(await self._master.unwrap(wrapped, tenant_purpose(tenant)))
        return TenantSecrets.from_message(message)

    async def sweep(self) -> None:
        """Remove keys whose last capability has ended.

        Raises:
            HoldfastError: UNREACHABLE.
        """
        keys, now_unix_ms = self._signing.keys, self._clock.now_unix_ms()
        for key, successor in itertools.pairwise(keys):
            if successor.created_unix_ms + RETIREMENT_MS > now_unix_ms:
                continue
            name = keyspace.signing_key(key.key_id)
            item = await self._store.get(name)
            if item is None:
                continue
            conditions: list[Condition] = [
                ModRevisionIs(name, item.mod_revision),
                Exists(keyspace.signing_key(successor.key_id)),
            ]
            if await attempt(self._store, conditions, [Delete(name)]) is Outcome.APPLIED:
                get_log("coordinator").info("signing key ended", key_id=key.key_id)

    async def _follow(self, family: _Family) -> None:
        async with aclosing(self._store.watch(family.prefix)) as batches:
            async for batch in batches:
                while True:
                    try:
                        await family.take(batch.revision, batch.puts, batch.deletes, relisted=batch.relisted)
                        break
                    except HoldfastError as error:
                        if error.code is not ErrorCode.UNREACHABLE:
                            raise
                        # The service that holds the master key is away; the keys that are known go on working.
                        await self._clock.sleep(_RETRY_S)

    async def _sweep_forever(self) -> None:
        while True:
            await self._clock.sleep(_SWEEP_INTERVAL_S)
            try:
                await self.sweep()
            except HoldfastError as error:
                if error.code is not ErrorCode.UNREACHABLE:
                    raise
