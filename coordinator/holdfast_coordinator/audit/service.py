"""AuditService: the gRPC shell around reading the audit log. Only a binding for all tenants lets anybody in."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, Final, TypeAlias

import grpc.aio

from holdfast_coordinator.access.call import current_call
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.audit.reader import AuditReader, area_of
from holdfast_coordinator.records import ANSWER_BYTES_MAX
from holdfast_core.model.audit.heads import HeadSigner
from holdfast_core.model.audit.merkle import EMPTY_ROOT, consistency_ranges, inclusion_ranges
from holdfast_core.model.audit.record import AuditRecord
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import AUDIT_LIST_MAX, AUDIT_SEGMENT_RECORDS, MIB
from holdfast_core.runtime.clock import Clock
from holdfast_proto.v1 import audit_pb2 as pb
from holdfast_proto.v1.audit_pb2_grpc import AuditServiceServicer

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

RESOURCE: Final = "audit"
# A filter that matches little makes a call look at many records; so many at most, then the caller goes on with `next`.
SCAN_RECORDS_MAX: Final = 16 * AUDIT_SEGMENT_RECORDS
_EXPORT_MESSAGE_BYTES: Final = 1 * MIB


class AuditService(AuditServiceServicer):
    """Records, heads and proofs."""

    def __init__(
        self, cluster_id: str, reader: AuditReader, ledger: Ledger, *, signer: Callable[[], HeadSigner], clock: Clock
    ) -> None:
        """Bind to the log; `signer` signs the head of a log that has no record yet."""
        self._cluster_id = cluster_id
        self._reader = reader
        self._ledger = ledger
        self._signer = signer
        self._clock = clock

    async def ListAuditRecords(
        self, request: pb.ListAuditRecordsRequest, context: Context
    ) -> pb.ListAuditRecordsResponse:
        """List records, oldest first from one on, or newest first."""
        current_call().require(RESOURCE)
        found = _Found(request)
        size = (await self._reader.head()).size
        if request.newest:
            await self._newest(found, size)
        else:
            await self._from(found, size)
        return found.response

    async def ExportAuditRecords(
        self, request: pb.ExportAuditRecordsRequest, context: Context
    ) -> AsyncIterator[pb.ExportAuditRecordsResponse]:
        """Stream the log as it is now, this call's own record included; `first` is rounded down to its batch."""
        call = current_call()
        call.require(RESOURCE)
        first, newest = request.first, await self._reader.head()
        if first:
            first = (await self._reader.batch_of(first, newest.size)).first
        # From here on messages leave, so the log must have the call.
        await self._ledger.record(call.entry)
        size = (await self._reader.head()).size
        frontier = await self._reader.frontier(first)
        message = pb.ExportAuditRecordsResponse(
            cluster_id=self._cluster_id, keys=await self._reader.keys(), frontier=frontier.hashes
        )
        filled = 0
        async for batch in self._reader.batches(first, size):
            batch_bytes = batch.ByteSize()
            if filled and filled + batch_bytes > _EXPORT_MESSAGE_BYTES:
                yield message
                message, filled = pb.ExportAuditRecordsResponse(), 0
            message.batches.append(batch)
            filled += batch_bytes
        yield message

    async def GetAuditHead(self, request: pb.GetAuditHeadRequest, context: Context) -> pb.GetAuditHeadResponse:
        """Return the newest head and the public keys."""
        current_call().require(RESOURCE)
        head = (await self._reader.head()).signed
        if not head.size:
            head = self._signer().sign(size=0, root=EMPTY_ROOT, time_unix_ms=self._clock.now_unix_ms())
        return pb.GetAuditHeadResponse(cluster_id=self._cluster_id, head=head, keys=await self._reader.keys())

    async def ProveInclusion(self, request: pb.ProveInclusionRequest, context: Context) -> pb.ProveInclusionResponse:
        """Prove that a record is in the log."""
        current_call().require(RESOURCE)
        head = await self._reader.head()
        batch = await self._reader.batch_of(request.sequence, head.size)
        return pb.ProveInclusionResponse(
            cluster_id=self._cluster_id,
            line=batch.lines[request.sequence - batch.first],
            head=head.signed,
            path=await self._reader.path(inclusion_ranges(request.sequence, head.size)),
        )

    async def ProveConsistency(
        self, request: pb.ProveConsistencyRequest, context: Context
    ) -> pb.ProveConsistencyResponse:
        """Prove that the log of a later head begins with the log of an earlier size."""
        current_call().require(RESOURCE)
        newest = await self._reader.head()
        to_head = newest.signed if request.to_size in (0, newest.size) else await self._head_at(request.to_size)
        if request.from_size > to_head.size:
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT,
                f"a log of {to_head.size} records does not begin with one of {request.from_size}",
            )
        response = pb.ProveConsistencyResponse(
            cluster_id=self._cluster_id,
            to_head=to_head,
            path=await self._reader.path(consistency_ranges(request.from_size, to_head.size)),
            from_size=request.from_size,
        )
        from_head = await self._reader.head_at(request.from_size)
        if from_head is not None:
            response.from_head.CopyFrom(from_head)
        return response

    async def _head_at(self, size: int) -> pb.SignedHead:
        head = await self._reader.head_at(size)
        if head is not None:
            return head
        newest = (await self._reader.head()).size
        if size > newest:
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"the audit log has {newest} records, not {size}")
        batch = await self._reader.batch_of(size - 1, newest)
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT,
            f"no head was signed at {size} records; the nearest are at {batch.first} and {batch.head.size}",
            facts={"before": str(batch.first), "behind": str(batch.head.size)},
        )

    async def _from(self, found: _Found, size: int) -> None:
        at = found.request.first
        end = min(size, at + SCAN_RECORDS_MAX)
        while at < end:
            for batch in await self._reader.area(area_of(at), size):
                for sequence, line in enumerate(batch.lines, batch.first):
                    if sequence < at or sequence >= end:
                        continue
                    if not found.take(line):
                        found.response.next = sequence
                        return
            at = area_of(at) + AUDIT_SEGMENT_RECORDS
        if end < size:
            found.response.next = end

    async def _newest(self, found: _Found, size: int) -> None:
        """Look at the newest records, down to `first`, and no further back than one call may."""
        oldest = max(found.request.first, size - SCAN_RECORDS_MAX)
        end = size
        while end > oldest:
            start = area_of(end - 1)
            for batch in reversed(await self._reader.area(start, size)):
                for sequence in range(batch.first + len(batch.lines) - 1, batch.first - 1, -1):
                    if sequence < oldest or not found.take(batch.lines[sequence - batch.first]):
                        return
            end = start


class _Found:
    """Records that a request asked for, up to what it and one message take."""

    def __init__(self, request: pb.ListAuditRecordsRequest) -> None:
        self.request = request
        self.response = pb.ListAuditRecordsResponse()
        self._left = min(request.limit or AUDIT_LIST_MAX, AUDIT_LIST_MAX)
        self._bytes_left = ANSWER_BYTES_MAX
        self._filtered = bool(request.principal or request.action or request.tenant_name)

    def take(self, line: bytes) -> bool:
        """Keep the record if it was asked for; False if it was and does not fit any more."""
        if self._filtered and not self._matches(AuditRecord.from_line(line)):
            return True
        if not self._left or self._bytes_left < len(line):
            return False
        self._left -= 1
        self._bytes_left -= len(line)
        self.response.lines.append(line)
        return True

    def _matches(self, record: AuditRecord) -> bool:
        wanted = self.request
        return (
            wanted.principal in ("", record.principal)
            and wanted.action in ("", record.action)
            and wanted.tenant_name in ("", record.tenant)
        )
