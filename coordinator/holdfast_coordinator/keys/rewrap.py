"""Wrapping every secret of the metadata store by the master key in force; what is wrapped, and all data, stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Final

from holdfast_coordinator import keyspace
from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.keys.chain import audit_purpose, signing_purpose, tenant_purpose
from holdfast_coordinator.keys.master import MasterKeys
from holdfast_coordinator.records import Stored, each, parse
from holdfast_coordinator.transactions import ATTEMPTS_MAX, Outcome, attempt, contention
from holdfast_core.runtime.metadata.store import MetadataStore, Put
from holdfast_proto.v1.records_pb2 import WrappedSecret
from holdfast_proto.v1.tenants_pb2 import TenantRecord

# Secrets that one transaction writes: the keys of sixteen tenants with all the epochs they may have fit one.
_PORTION: Final = 16


class Rewrapping:
    """Counts and wraps anew."""

    def __init__(self, store: MetadataStore, master: MasterKeys, ledger: Ledger) -> None:
        self._store = store
        self._master = master
        self._ledger = ledger

    async def wrapped_by(self) -> Mapping[str, int]:
        """Return how many secrets each master key wraps, by its fingerprint in hexadecimal."""
        counts: Counter[str] = Counter()
        async for portion in self._portions():
            for stored in await self._read(list(portion)):
                counts[stored.message.master_fingerprint.hex()] += 1
        return counts

    async def run(self, entry: Entry) -> int:
        """Wrap by the key in force whatever another key wraps; return how many secrets that were.

        The first transaction carries the entry. Sent again after an interruption it goes on where it was.

        Raises:
            HoldfastError: KEY_MISMATCH if one is wrapped by a key that is not here; UNREACHABLE; CONFLICT.
        """
        entry.details["master_key"] = self._master.fingerprint.hex()
        done = 0
        async for portion in self._portions():
            done += await self._rewrap(entry, portion)
        if not entry.written:
            entry.repeated()
        return done

    async def _rewrap(self, entry: Entry, portion: Mapping[str, str]) -> int:
        for _ in range(ATTEMPTS_MAX):
            old = [
                stored
                for stored in await self._read(list(portion))
                if stored.message.master_fingerprint != self._master.fingerprint
            ]
            if not old:
                return 0
            puts = [await self._wrapped_anew(stored, portion[stored.key]) for stored in old]
            conditions = [stored.unchanged for stored in old]
            if entry.written:
                outcome = await attempt(self._store, conditions, puts)
            else:
                outcome = await self._ledger.apply(entry, conditions, puts)
            if outcome is Outcome.APPLIED:
                return len(old)
        raise contention("the wrapping of secrets by the new master key")

    async def _wrapped_anew(self, stored: Stored[WrappedSecret], purpose: str) -> Put:
        wrapped = await self._master.wrap(await self._master.unwrap(stored.message, purpose), purpose)
        wrapped.created_unix_ms, wrapped.public_key = stored.message.created_unix_ms, stored.message.public_key
        return Put(stored.key, wrapped.SerializeToString())

    async def _read(self, names: list[str]) -> list[Stored[WrappedSecret]]:
        items = (await self._store.snapshot(names)).items
        return [parse(item, WrappedSecret) for item in items if item.key in names]

    async def _portions(self) -> AsyncIterator[dict[str, str]]:
        """Yield the metadata keys of all secrets with their purposes, a few at a time."""
        portion: dict[str, str] = {}
        async for key, purpose in self._secrets():
            portion[key] = purpose
            if len(portion) == _PORTION:
                yield portion
                portion = {}
        if portion:
            yield portion

    async def _secrets(self) -> AsyncIterator[tuple[str, str]]:
        families: tuple[tuple[str, Callable[[str], str]], ...] = (
            (keyspace.SIGNING_PREFIX, signing_purpose),
            (keyspace.AUDIT_KEYS_PREFIX, audit_purpose),
        )
        for prefix, purpose in families:
            async for item in each(self._store, prefix):
                yield item.key, purpose(item.key.removeprefix(prefix))
        async for item in each(self._store, keyspace.TENANTS_PREFIX):
            tenant = parse(item, TenantRecord).message.tenant
            yield keyspace.TenantKeyspace(tenant).keys, tenant_purpose(tenant)
