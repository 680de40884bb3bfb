"""Making keys that sign, and changing them: those of capabilities without an interruption, those of heads for good.

A change writes the key that was newest once more, unchanged, under the condition that nobody wrote it since: of two
changes at once one finds that out and looks again, so a call that is sent twice makes one key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from holdfast_coordinator import keyspace
from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.keys.chain import KeyChain, SigningKey, audit_purpose, signing_purpose
from holdfast_coordinator.keys.master import MasterKeys
from holdfast_coordinator.records import parse
from holdfast_coordinator.transactions import ATTEMPTS_MAX, Outcome, contention
from holdfast_core.model.audit.record import ROTATE_AUDIT_ACTION
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.xaes import KEY_BYTES
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.metadata.store import (
    Absent,
    Condition,
    Delete,
    KeyValue,
    MetadataStore,
    ModRevisionIs,
    Operation,
    Put,
)
from holdfast_proto.v1.records_pb2 import WrappedSecret

# Nodes are told of all of them with every heartbeat.
LIVING_KEYS_MAX: Final = 16
_KEY_ID_BYTES: Final = 8


@dataclass(frozen=True, slots=True, repr=False)
class NewKey:
    """A key that is not stored yet, and how it is to be stored."""

    key_id: str
    private_key: bytes
    public_key: bytes
    wrapped: WrappedSecret


async def new_signing_key(
    master: MasterKeys,
    purpose: Callable[[str], str],
    random_bytes: Callable[[int], bytes],
    *,
    created_unix_ms: int = 0,
) -> NewKey:
    """Make an Ed25519 key, wrapped for `purpose(its id)`.

    Raises:
        HoldfastError: as `MasterKeys.wrap`.
    """
    private = random_bytes(KEY_BYTES)
    public = Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
    key_id = blake3(public).hexdigest(length=_KEY_ID_BYTES)
    wrapped = await master.wrap(private, purpose(key_id))
    wrapped.public_key, wrapped.created_unix_ms = public, created_unix_ms
    return NewKey(key_id, private, public, wrapped)


class SigningKeys:
    """Changes the keys that sign."""

    def __init__(
        self,
        store: MetadataStore,
        chain: KeyChain,
        master: MasterKeys,
        ledger: Ledger,
        clock: Clock,
        random_bytes: Callable[[int], bytes],
    ) -> None:
        self._store = store
        self._chain = chain
        self._master = master
        self._ledger = ledger
        self._clock = clock
        self._random_bytes = random_bytes

    async def rotate_capability(self, entry: Entry, *, after: str = "", retire_now: bool = False) -> SigningKey:
        """Make a new key for capabilities and return it.

        Args:
            entry: what the audit log says of it.
            after: the key that the caller saw signing; if there is a newer one already, that is the answer.
            retire_now: remove all older keys at once. What they signed is refused as soon as nodes have heard of it.

        Raises:
            HoldfastError: LIMIT_EXCEEDED if too many keys live; UNREACHABLE; CONFLICT under contention.
        """
        for _ in range(ATTEMPTS_MAX):
            items = await self._items(keyspace.SIGNING_PREFIX)
            ids = [item.key.removeprefix(keyspace.SIGNING_PREFIX) for item in items]
            # With `retire_now` it is done only when the key that the caller saw is gone.
            if after and (after not in ids if retire_now else ids[-1] != after):
                found = next((key for key in self._chain.signing_keys() if key.key_id == ids[-1]), None)
                if found is None:
                    continue
                entry.repeated()
                return found
            if len(ids) >= LIVING_KEYS_MAX and not retire_now:
                raise HoldfastError(
                    ErrorCode.LIMIT_EXCEEDED,
                    f"{len(ids)} signing keys are in use, and {LIVING_KEYS_MAX} may be; an old one ends by itself "
                    "some twenty minutes after the next was made, or at once with --retire-now",
                )
            made = await self._new(signing_purpose)
            entry.details["key_id"] = made.key_id
            conditions: list[Condition] = [Absent(keyspace.signing_key(made.key_id))]
            conditions += [ModRevisionIs(item.key, item.mod_revision) for item in items]
            operations: list[Operation] = [Put(keyspace.signing_key(made.key_id), made.wrapped.SerializeToString())]
            if retire_now:
                entry.details["retired"] = ",".join(ids)
                operations += [Delete(item.key) for item in items]
            else:
                operations.append(Put(items[-1].key, items[-1].value))
            if await self._ledger.apply(entry, conditions, operations) is Outcome.APPLIED:
                await self._chain.fresh()
                return _stored(made)
        raise contention("the change of the signing key")

    async def rotate_audit(self, entry: Entry, *, after: str = "") -> SigningKey:
        """Make a new key for heads of the audit log and return it.

        Its record is under a head that an older key signed, which is how a verifier comes to trust it.

        Raises:
            HoldfastError: UNREACHABLE; CONFLICT under contention.
        """
        entry.action = ROTATE_AUDIT_ACTION
        for _ in range(ATTEMPTS_MAX):
            newest = (await self._items(keyspace.AUDIT_KEYS_PREFIX))[-1]
            if after and newest.key != keyspace.audit_key(after):
                entry.repeated()
                return next(
                    key for key in self._chain.audit_keys_held() if keyspace.audit_key(key.key_id) == newest.key
                )
            made = await self._new(audit_purpose)
            entry.details.update(key_id=made.key_id, public_key=made.public_key.hex())
            name = keyspace.audit_key(made.key_id)
            conditions: list[Condition] = [Absent(name), ModRevisionIs(newest.key, newest.mod_revision)]
            operations = [Put(name, made.wrapped.SerializeToString()), Put(newest.key, newest.value)]
            if await self._ledger.apply(entry, conditions, operations) is Outcome.APPLIED:
                await self._chain.fresh()
                return _stored(made)
        raise contention("the change of the audit log's key")

    async def _items(self, prefix: str) -> list[KeyValue]:
        """Return the keys as stored, oldest first; the chain then knows them, or something newer."""
        items = (await self._store.snapshot([prefix])).items
        await self._chain.fresh()
        order = {item.key: (parse(item, WrappedSecret).message.created_unix_ms, item.create_revision) for item in items}
        return sorted(items, key=lambda item: order[item.key])

    async def _new(self, purpose: Callable[[str], str]) -> NewKey:
        now_unix_ms = self._clock.now_unix_ms()
        return await new_signing_key(self._master, purpose, self._random_bytes, created_unix_ms=now_unix_ms)


def _stored(made: NewKey) -> SigningKey:
    created_unix_ms = made.wrapped.created_unix_ms
    return SigningKey(made.key_id, made.private_key, made.public_key, created_unix_ms, create_revision=0)
