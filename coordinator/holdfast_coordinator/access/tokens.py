"""API tokens as the metadata store keeps them: made, listed, ended. Their secrets never come here, only hashes.

Who asks for a token draws it and sends its id and hash, so that the same request sent again makes one token. A token
ends with its record: deleting the record revokes it. Records that ended long ago are deleted by later requests for
tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from holdfast_coordinator import keyspace
from holdfast_coordinator.access.identity import RESERVED_PRINCIPALS
from holdfast_coordinator.access.view import AccessView
from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.records import check_fits_answer, load, parse
from holdfast_coordinator.transactions import ATTEMPTS_MAX, Outcome, contention
from holdfast_core.model.access.policy import check_principal
from holdfast_core.model.access.tokens import TOKEN_HASH_BYTES
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import TOKEN_TTL_S_MAX, TOKENS_MAX
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.metadata.store import Absent, Delete, MetadataStore, Put
from holdfast_proto.v1 import access_pb2 as pb

_TOKEN_ID = re.compile(r"[0-9a-f]{16}\Z", re.ASCII)
# Whoever wonders why a token no longer works finds it in the list for a week.
_KEPT_AFTER_END_MS: Final = 7 * 86_400_000
_SWEPT_AT_ONCE: Final = 16


class Tokens:
    """The store's tokens."""

    def __init__(self, store: MetadataStore, ledger: Ledger, view: AccessView, clock: Clock) -> None:
        """Bind to where they are kept and to the copy that calls are let in from."""
        self._store = store
        self._ledger = ledger
        self._view = view
        self._clock = clock

    async def create(self, request: pb.CreateTokenRequest, entry: Entry) -> pb.TokenRecord:
        """Keep a token that the caller has drawn; return its record without the hash.

        Raises:
            HoldfastError: INVALID_ARGUMENT for a malformed request; ALREADY_EXISTS if the id is taken by another token;
                LIMIT_EXCEEDED for too many tokens.
        """
        _check(request)
        entry.details |= {"token": request.token_id, "for": request.principal}
        for _ in range(ATTEMPTS_MAX):
            stored = await load(self._store, keyspace.token(request.token_id), pb.TokenRecord)
            if stored is not None:
                if not _is_of(stored.message, request):
                    raise HoldfastError(
                        ErrorCode.ALREADY_EXISTS, f"there is another token {request.token_id}; draw a new one"
                    )
                entry.repeated()
                return without_hash(stored.message)
            record = self._record(request, entry.principal)
            if await self._put(record, entry) is Outcome.APPLIED:
                await self._view.fresh()
                return without_hash(record)
        raise contention("the list of tokens")

    async def list(self) -> Sequence[pb.TokenRecord]:
        """Return the tokens by id, without hashes; those that have ended too, until they are swept."""
        snapshot = await self._store.snapshot([keyspace.TOKENS_PREFIX])
        items = check_fits_answer(snapshot.items, "the list of tokens")
        return [without_hash(parse(item, pb.TokenRecord).message) for item in items]

    async def revoke(self, token_id: str, entry: Entry) -> None:
        """End a token at once.

        Raises:
            HoldfastError: INVALID_ARGUMENT for a malformed id; NOT_FOUND.
        """
        if not _TOKEN_ID.match(token_id):
            raise _malformed_id()
        entry.details["token"] = token_id
        for _ in range(ATTEMPTS_MAX):
            stored = await load(self._store, keyspace.token(token_id), pb.TokenRecord)
            if stored is None:
                raise HoldfastError(ErrorCode.NOT_FOUND, f"there is no token {token_id}; it may have been revoked")
            entry.details["for"] = stored.message.principal
            if await self._ledger.apply(entry, [stored.unchanged], [Delete(stored.key)]) is Outcome.APPLIED:
                await self._view.fresh()
                return
        raise contention(f"token {token_id}")

    def _record(self, request: pb.CreateTokenRequest, created_by: str) -> pb.TokenRecord:
        now_unix_ms = self._clock.now_unix_ms()
        return pb.TokenRecord(
            token_id=request.token_id,
            principal=request.principal,
            secret_hash=request.secret_hash,
            created_unix_ms=now_unix_ms,
            expires_unix_ms=now_unix_ms + request.ttl_s * 1000,
            created_by=created_by,
        )

    async def _put(self, record: pb.TokenRecord, entry: Entry) -> Outcome:
        """Write a token, and sweep some that ended long ago by the same transaction."""
        long_ago_ms = record.created_unix_ms - _KEPT_AFTER_END_MS
        tokens = self._view.tokens
        swept = [name for name, each in tokens.items() if each.expires_unix_ms < long_ago_ms][:_SWEPT_AT_ONCE]
        if len(tokens) - len(swept) >= TOKENS_MAX:
            raise HoldfastError(
                ErrorCode.LIMIT_EXCEEDED, f"there are {TOKENS_MAX} tokens already; revoke some that nobody needs"
            )
        key = keyspace.token(record.token_id)
        deletes = [Delete(keyspace.token(token_id)) for token_id in swept]
        return await self._ledger.apply(entry, [Absent(key)], [Put(key, record.SerializeToString()), *deletes])


def without_hash(record: pb.TokenRecord) -> pb.TokenRecord:
    """Return the record as it may leave the coordinator."""
    shown = pb.TokenRecord()
    shown.CopyFrom(record)
    shown.ClearField("secret_hash")
    return shown


def _check(request: pb.CreateTokenRequest) -> None:
    check_principal(request.principal)
    if request.principal in RESERVED_PRINCIPALS:
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT,
            f"{request.principal} stands for the cluster's own in the audit log; name another principal",
        )
    if not _TOKEN_ID.match(request.token_id):
        raise _malformed_id()
    if len(request.secret_hash) != TOKEN_HASH_BYTES:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"the hash of a token's secret has {TOKEN_HASH_BYTES} bytes")
    if not 0 < request.ttl_s <= TOKEN_TTL_S_MAX:
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT, f"a token lives 1 to {TOKEN_TTL_S_MAX} seconds, not {request.ttl_s}"
        )


def _is_of(record: pb.TokenRecord, request: pb.CreateTokenRequest) -> bool:
    """Return whether an earlier sending of this request made the record."""
    return (
        record.principal == request.principal
        and record.secret_hash == request.secret_hash
        and record.expires_unix_ms - record.created_unix_ms == request.ttl_s * 1000
    )


def _malformed_id() -> HoldfastError:
    return HoldfastError(ErrorCode.INVALID_ARGUMENT, "a token's id has 16 hexadecimal digits in lower case")
