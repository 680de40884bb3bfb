"""What a coordinator knows of access: the policy, tokens and revoked certificates, as a copy kept fresh by a watch.

Calls are let in from the copy, so that letting in costs no read. A change takes effect at once on the coordinator that
makes it, which reads the copy afresh before it answers, and on others with the watch.

A policy that cannot be read (somebody else wrote there) changes nothing: the one before stays, the log says so once,
and a gauge shows it. A token's record that cannot be read proves nothing; a mark of a revoked certificate counts by its
key.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from typing import Final

from prometheus_client import CollectorRegistry, Gauge

from holdfast_coordinator import keyspace
from holdfast_coordinator.records import parse
from holdfast_core.model.access.policy import DEFAULT_POLICY, Policy
from holdfast_core.model.errors import HoldfastError
from holdfast_core.runtime.logs import get_log
from holdfast_core.runtime.metadata.store import KeyValue, MetadataStore
from holdfast_proto.v1.access_pb2 import RevokedCertificate, TokenRecord

_PREFIX: Final = keyspace.ACCESS_PREFIX


class AccessView:
    """The copy. `run` keeps it fresh; `fresh` asks the store at once. Belongs to one event loop."""

    def __init__(self, store: MetadataStore, registry: CollectorRegistry) -> None:
        """Begin with no tokens and the policy that a new cluster has."""
        self._store = store
        self._log = get_log("coordinator")
        self._malformed = Gauge(
            "holdfast_policy_malformed",
            "1 while the metadata store holds a policy that cannot be read, and an older one is followed.",
            registry=registry,
        )
        self._known_to = 0
        self._version = 0
        self._policy = DEFAULT_POLICY
        self._policy_item: KeyValue | None = None
        self._tokens: dict[str, TokenRecord] = {}
        self._revoked: dict[str, RevokedCertificate] = {}

    @property
    def version(self) -> int:
        """A number that changes with the copy, for who keeps what it read of it."""
        return self._version

    @property
    def policy(self) -> Policy:
        """The policy that is followed."""
        return self._policy

    def revision_of(self, document: bytes) -> int | None:
        """Return the revision that the store has this policy document at, None if it has another one."""
        item = self._policy_item
        return item.mod_revision if item is not None and item.value == document else None

    @property
    def tokens(self) -> Mapping[str, TokenRecord]:
        """Records of tokens by id, with their hashes."""
        return self._tokens

    @property
    def revoked(self) -> Mapping[str, RevokedCertificate]:
        """Revoked certificates by fingerprint in hexadecimal."""
        return self._revoked

    def token(self, token_id: str) -> TokenRecord | None:
        """Return the record of a token, None for one that is not known."""
        return self._tokens.get(token_id)

    def is_revoked(self, fingerprint: bytes) -> bool:
        """Return whether a certificate is refused, by the SHA-256 of its DER form."""
        return fingerprint.hex() in self._revoked

    async def fresh(self) -> None:
        """Read everything at one revision and take it over."""
        snapshot = await self._store.snapshot([_PREFIX])
        if snapshot.revision >= self._known_to:
            self._relist(snapshot.revision, {item.key: item for item in snapshot.items})

    async def run(self) -> None:
        """Keep the copy fresh until cancelled or until the store is closed."""
        async with aclosing(self._store.watch(_PREFIX)) as batches:
            async for batch in batches:
                if batch.revision <= self._known_to:
                    continue  # `fresh` was ahead of the watch
                if batch.relisted:
                    self._relist(batch.revision, {item.key: item for item in batch.puts})
                    continue
                self._known_to = batch.revision
                self._version += 1
                for key in batch.deletes:
                    self._drop(key)
                for item in batch.puts:
                    self._take(item)

    def _relist(self, revision: int, items: Mapping[str, KeyValue]) -> None:
        self._known_to = revision
        self._version += 1
        self._tokens.clear()
        self._revoked.clear()
        if keyspace.ACCESS_POLICY not in items:
            self._drop(keyspace.ACCESS_POLICY)
        for item in items.values():
            self._take(item)

    def _drop(self, key: str) -> None:
        if key == keyspace.ACCESS_POLICY:
            self._policy, self._policy_item = DEFAULT_POLICY, None
            self._malformed.set(0)
        self._tokens.pop(key.removeprefix(keyspace.TOKENS_PREFIX), None)
        self._revoked.pop(key.removeprefix(keyspace.REVOKED_PREFIX), None)

    def _take(self, item: KeyValue) -> None:
        if item.key == keyspace.ACCESS_POLICY:
            self._take_policy(item)
        elif item.key.startswith(keyspace.TOKENS_PREFIX):
            self._take_token(item, item.key.removeprefix(keyspace.TOKENS_PREFIX))
        elif item.key.startswith(keyspace.REVOKED_PREFIX):
            self._take_revoked(item, item.key.removeprefix(keyspace.REVOKED_PREFIX))

    def _take_policy(self, item: KeyValue) -> None:
        if self._policy_item == item:
            return
        self._policy_item = item
        try:
            self._policy = Policy.parse(item.value.decode())
        except (UnicodeDecodeError, HoldfastError) as error:
            self._malformed.set(1)
            self._log.error("policy is malformed; the one before stays", revision=item.mod_revision, error=str(error))
        else:
            self._malformed.set(0)
            self._log.info("policy", revision=item.mod_revision, bindings=len(self._policy.bindings))

    def _take_token(self, item: KeyValue, token_id: str) -> None:
        self._tokens.pop(token_id, None)
        try:
            record = parse(item, TokenRecord).message
        except HoldfastError as error:
            self._log.error("token record cannot be read", key=item.key, error=error.message)
            return
        # A record under another token's key would let that token's secret end up with other rights.
        if record.token_id == token_id:
            self._tokens[token_id] = record

    def _take_revoked(self, item: KeyValue, fingerprint: str) -> None:
        try:
            self._revoked[fingerprint] = parse(item, RevokedCertificate).message
        except HoldfastError as error:
            self._log.error("mark of a revoked certificate cannot be read; it counts", error=error.message)
            self._revoked[fingerprint] = RevokedCertificate()
