"""The metadata store on etcd, for clusters: what the interface means in etcd's requests.

Reads are linearizable. A listing is read in pages at the revision of its first one, because one answer may not exceed
the channel's message size. Transactions are sent at most once (`EtcdClient.call_once`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncGenerator, Sequence
from typing import Final

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.metadata.checks import (
    check_page,
    check_ttl,
    check_txn,
    covering_prefixes,
    key_bytes,
    prefix_bytes,
)
from holdfast_core.runtime.metadata.etcd_client import (
    ATTEMPT_TIMEOUT_S,
    CALL_TIMEOUT_S,
    EtcdClient,
    EtcdError,
    Exchange,
    Login,
    Unary,
)
from holdfast_core.runtime.metadata.etcd_watch import EtcdFollower, end_key, first_key, key_value
from holdfast_core.runtime.metadata.store import (
    Absent,
    Condition,
    CreateRevisionIs,
    Exists,
    KeyValue,
    ModRevisionIs,
    Operation,
    Put,
    Snapshot,
    TxnResult,
    WatchBatch,
)
from holdfast_core.runtime.options import TlsFiles
from holdfast_core.runtime.status import RpcFailure
from holdfast_proto.v1 import etcd_pb2 as pb

RANGE: Final[Unary[pb.RangeRequest, pb.RangeResponse]] = Unary("/etcdserverpb.KV/Range", pb.RangeResponse.FromString)
TXN: Final[Unary[pb.TxnRequest, pb.TxnResponse]] = Unary("/etcdserverpb.KV/Txn", pb.TxnResponse.FromString)
GRANT: Final[Unary[pb.LeaseGrantRequest, pb.LeaseGrantResponse]] = Unary(
    "/etcdserverpb.Lease/LeaseGrant", pb.LeaseGrantResponse.FromString
)
REVOKE: Final[Unary[pb.LeaseRevokeRequest, pb.LeaseRevokeResponse]] = Unary(
    "/etcdserverpb.Lease/LeaseRevoke", pb.LeaseRevokeResponse.FromString
)
TIME_TO_LIVE: Final[Unary[pb.LeaseTimeToLiveRequest, pb.LeaseTimeToLiveResponse]] = Unary(
    "/etcdserverpb.Lease/LeaseTimeToLive", pb.LeaseTimeToLiveResponse.FromString
)
KEEP_ALIVE: Final[Exchange[pb.LeaseKeepAliveRequest, pb.LeaseKeepAliveResponse]] = Exchange(
    "/etcdserverpb.Lease/LeaseKeepAlive", pb.LeaseKeepAliveResponse.FromString
)

# Keys asked for at once. Where they exceed the channel's message size, fewer are; 8 of the largest always fit.
_RANGE_KEYS: Final = 1000
_RANGE_KEYS_MIN: Final = 8
_COMPACTED_RETRIES: Final = 5


class EtcdStore:
    """The etcd engine as a `MetadataStore`; made by `open`."""

    def __init__(self, client: EtcdClient) -> None:
        """Take over the client; `close` closes it."""
        self._client = client

    @classmethod
    async def open(
        cls,
        endpoints: Sequence[str],
        *,
        tls: TlsFiles | None = None,
        user: str = "",
        password: str = "",
        call_timeout_s: float = CALL_TIMEOUT_S,
        attempt_timeout_s: float = ATTEMPT_TIMEOUT_S,
    ) -> EtcdStore:
        """Connect to the cluster with these members (HOST:PORT each) and check that it answers.

        `call_timeout_s` bounds every call, `attempt_timeout_s` what one member gets of it where another may be tried.

        Raises:
            HoldfastError: UNREACHABLE if no quorum answers in time; DENIED if etcd wants another login;
                INVALID_ARGUMENT for malformed endpoints or unreadable TLS files.
        """
        client = EtcdClient(
            endpoints,
            tls=tls,
            login=Login(user, password) if user else None,
            call_timeout_s=call_timeout_s,
            attempt_timeout_s=attempt_timeout_s,
        )
        try:
            await _check_access(client)
        except BaseException:
            await client.close()
            raise
        return cls(client)

    async def get(self, key: str) -> KeyValue | None:
        """See `MetadataStore.get`."""
        response = await self._client.call(RANGE, pb.RangeRequest(key=key_bytes(key)))
        return key_value(response.kvs[0]) if response.kvs else None

    async def snapshot(self, prefixes: Sequence[str]) -> Snapshot:
        """See `MetadataStore.snapshot`."""
        return await self._list(covering_prefixes(prefixes))

    async def page(self, prefix: str, *, after: str, limit: int) -> Snapshot:
        """See `MetadataStore.page`."""
        check_page(limit=limit)
        return await self._list([prefix_bytes(prefix)], after=prefix_bytes(after), limit=limit)

    async def scan(self, prefixes: Sequence[str], *, page_items: int) -> AsyncGenerator[Snapshot, None]:
        """See `MetadataStore.scan`."""
        check_page(limit=page_items)
        covering = covering_prefixes(prefixes)
        revision = 0
        for number, prefix in enumerate(covering, 1):
            start, more = first_key(prefix), True
            while more:
                try:
                    response = await self._range(start, end_key(prefix), revision=revision, limit=page_items)
                except EtcdError as error:
                    if error.failure is not RpcFailure.OUT_OF_RANGE:
                        raise
                    raise HoldfastError(
                        ErrorCode.CONFLICT, f"etcd compacted the revision {revision} while it was read; begin again"
                    ) from error
                revision = revision or response.header.revision
                more = response.more
                items = tuple(map(key_value, response.kvs))
                yield Snapshot(revision, items, more=more or number < len(covering))
                start = _behind(response.kvs[-1].key) if response.kvs else start

    async def txn(self, conditions: Sequence[Condition], operations: Sequence[Operation]) -> TxnResult:
        """See `MetadataStore.txn`."""
        check_txn(conditions, operations)
        request = pb.TxnRequest(
            compare=[_compare(condition) for condition in conditions],
            success=[_request_op(operation) for operation in operations],
        )
        response = await self._client.call_once(TXN, request)
        return TxnResult(response.succeeded, response.header.revision)

    async def watch(self, prefix: str) -> AsyncGenerator[WatchBatch, None]:
        """See `MetadataStore.watch`."""
        start = prefix_bytes(prefix)
        listing: Snapshot | None = await self._list([start])
        while listing is not None:
            yield WatchBatch(listing.revision, listing.items, (), relisted=True)
            follower = EtcdFollower(self._client, start, revision=listing.revision + 1)
            async with contextlib.aclosing(follower.batches()) as batches:
                async for batch in batches:
                    yield batch
            listing = await self._list_again(start)

    async def grant_lease(self, ttl_s: float) -> int:
        """See `MetadataStore.grant_lease`. A grant whose answer is lost is repeated; the first lease then lapses."""
        check_ttl(ttl_s)
        response = await self._client.call(GRANT, pb.LeaseGrantRequest(ttl=math.ceil(ttl_s)))
        return response.id

    async def keep_lease(self, lease_id: int) -> float:
        """See `MetadataStore.keep_lease`."""
        response = await self._client.call(KEEP_ALIVE, pb.LeaseKeepAliveRequest(id=lease_id))
        return _living_s(lease_id, response.ttl)

    async def lease_left(self, lease_id: int) -> float:
        """See `MetadataStore.lease_left`."""
        response = await self._client.call(TIME_TO_LIVE, pb.LeaseTimeToLiveRequest(id=lease_id))
        if response.granted_ttl == 0:
            return _living_s(lease_id, -1)
        return float(max(response.ttl, 0))

    async def revoke_lease(self, lease_id: int) -> None:
        """See `MetadataStore.revoke_lease`."""
        try:
            await self._client.call(REVOKE, pb.LeaseRevokeRequest(id=lease_id))
        except EtcdError as error:
            if error.failure is not RpcFailure.NOT_FOUND:
                raise

    async def close(self) -> None:
        """See `MetadataStore.close`."""
        await self._client.close()

    async def _list_again(self, start: bytes) -> Snapshot | None:
        """List for a watch that has begun, however long etcd is away; None once the store is closed."""
        attempts = 0
        while not self._client.closed:
            try:
                return await self._list([start])
            except HoldfastError as error:
                if error.code is not ErrorCode.UNREACHABLE:
                    raise
            await self._client.pause(attempts)
            attempts += 1
        return None

    async def _list(self, prefixes: Sequence[bytes], *, after: bytes = b"", limit: int | None = None) -> Snapshot:
        for _ in range(_COMPACTED_RETRIES):
            try:
                return await self._list_at_one_revision(prefixes, after=after, limit=limit)
            except EtcdError as error:
                if error.failure is not RpcFailure.OUT_OF_RANGE:
                    raise
        raise HoldfastError(ErrorCode.CONFLICT, "etcd is compacted faster than a listing can be read; try again")

    async def _list_at_one_revision(self, prefixes: Sequence[bytes], *, after: bytes, limit: int | None) -> Snapshot:
        """Raises EtcdError OUT_OF_RANGE if the revision is compacted on the way."""
        revision = 0
        items: list[KeyValue] = []
        more = False
        for prefix in prefixes:
            start, more = max(first_key(prefix), _behind(after)), True
            while more and (limit is None or len(items) < limit):
                wanted = _RANGE_KEYS if limit is None else min(_RANGE_KEYS, limit - len(items))
                response = await self._range(start, end_key(prefix), revision=revision, limit=wanted)
                revision = revision or response.header.revision
                items += map(key_value, response.kvs)
                more = response.more
                if response.kvs:
                    start = _behind(response.kvs[-1].key)
        return Snapshot(revision, tuple(items), more=more)

    async def _range(self, start: bytes, end: bytes, *, revision: int, limit: int) -> pb.RangeResponse:
        """Read some keys from `start` on: as many as `limit`, or fewer where their values are large."""
        while True:
            try:
                return await self._client.call(
                    RANGE, pb.RangeRequest(key=start, range_end=end, revision=revision, limit=limit)
                )
            except EtcdError as error:
                if error.failure is not RpcFailure.RESOURCE_EXHAUSTED or limit <= _RANGE_KEYS_MIN:
                    raise
            limit = max(limit // 4, _RANGE_KEYS_MIN)


async def _check_access(client: EtcdClient) -> None:
    """Read a key, whichever: raises what keeps this client from using the cluster at all."""
    try:
        await client.call(RANGE, pb.RangeRequest(key=b"holdfast", limit=1))
    except EtcdError as error:
        if error.failure is RpcFailure.INVALID_ARGUMENT:
            # The request has no flaw but that it comes without the login that this etcd asks for.
            raise EtcdError(RpcFailure.UNAUTHENTICATED, f"etcd wants a user and a password ({error})") from error
        if error.failure is not RpcFailure.PERMISSION_DENIED:
            raise  # Where only this one key is not for this user, the cluster has answered.


def _behind(key: bytes) -> bytes:
    """Return the first key that sorts behind `key`; b"" for b"", which stands for the start."""
    return key + b"\x00" if key else b""


def _living_s(lease_id: int, ttl_s: int) -> float:
    if ttl_s <= 0:
        raise HoldfastError(ErrorCode.NOT_FOUND, f"the lease {lease_id} has ended")
    return float(ttl_s)


def _compare(condition: Condition) -> pb.Compare:
    key = condition.key.encode()
    match condition:
        case Absent():
            return pb.Compare(key=key, target=pb.Compare.CREATE, result=pb.Compare.EQUAL, create_revision=0)
        case Exists():
            return pb.Compare(key=key, target=pb.Compare.CREATE, result=pb.Compare.NOT_EQUAL, create_revision=0)
        case CreateRevisionIs():
            return pb.Compare(
                key=key, target=pb.Compare.CREATE, result=pb.Compare.EQUAL, create_revision=condition.revision
            )
        case ModRevisionIs():
            return pb.Compare(key=key, target=pb.Compare.MOD, result=pb.Compare.EQUAL, mod_revision=condition.revision)


def _request_op(operation: Operation) -> pb.RequestOp:
    key = operation.key.encode()
    if isinstance(operation, Put):
        return pb.RequestOp(request_put=pb.PutRequest(key=key, value=operation.value, lease=operation.lease_id))
    return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key))
