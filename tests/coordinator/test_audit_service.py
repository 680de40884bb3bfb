"""The audit service over gRPC: what a coordinator did is listed, exported and proven, and only to whom it may be."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc.aio
import pytest

from holdfast_coordinator import keyspace
from holdfast_coordinator.audit import service
from holdfast_core.model.audit.export import consistency_document, export_lines, inclusion_document, keys_of
from holdfast_core.model.audit.proofs import verify_proof
from holdfast_core.model.audit.record import AuditRecord
from holdfast_core.model.audit.verify import verify_export
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.channels import open_channel
from holdfast_core.runtime.clock import ManualClock
from holdfast_core.runtime.credentials import Credential
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import OUTCOME_FACT, OUTCOME_UNAPPLIED, Condition, Operation, TxnResult
from holdfast_core.runtime.status import error_from_rpc
from holdfast_proto.v1 import audit_pb2 as pb
from holdfast_proto.v1.audit_pb2_grpc import AuditServiceStub
from tests.coordinator.faults import FaultyStore
from tests.coordinator.rig import ADMIN_TOKEN, Client, coordinator, refused

VMS = 20


class Auditor:
    """Calls the audit service of one coordinator."""

    def __init__(self, address: str, token: str = ADMIN_TOKEN) -> None:
        self.address = address
        self._metadata = Credential(token=token).metadata()
        self._channel = open_channel(address)
        self._stub = AuditServiceStub(self._channel)

    async def call(self, name: str, request: Any) -> Any:
        """Make a call with one answer."""
        try:
            return await getattr(self._stub, name)(request, metadata=self._metadata, timeout=20)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, peer=self.address) from error

    async def listed(self, **fields: Any) -> tuple[list[AuditRecord], int]:
        """List records; returns where to go on too."""
        answer = await self.call("ListAuditRecords", pb.ListAuditRecordsRequest(**fields))
        return [AuditRecord.from_line(line) for line in answer.lines], answer.next

    async def head(self) -> pb.GetAuditHeadResponse:
        """Return the newest head."""
        answer: pb.GetAuditHeadResponse = await self.call("GetAuditHead", pb.GetAuditHeadRequest())
        return answer

    async def export(self, first: int = 0) -> list[pb.ExportAuditRecordsResponse]:
        """Return all messages of an export."""
        call = self._stub.ExportAuditRecords(pb.ExportAuditRecordsRequest(first=first), metadata=self._metadata)
        try:
            return [message async for message in call]
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error, peer=self.address) from error

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


class Refusing(FaultyStore):
    """A store that takes no more appends to the audit log once it is full."""

    full = False

    async def txn(self, conditions: Sequence[Condition], operations: Sequence[Operation]) -> TxnResult:
        if self.full and any(operation.key == keyspace.AUDIT_HEAD for operation in operations):
            raise HoldfastError(ErrorCode.UNREACHABLE, "full", facts={OUTCOME_FACT: OUTCOME_UNAPPLIED})
        return await super().txn(conditions, operations)


@pytest.fixture
def refusing(store: SqliteStore) -> Refusing:
    return Refusing(store)


@pytest.fixture
async def client(refusing: Refusing, clock: ManualClock) -> AsyncIterator[Client]:
    """A coordinator that has registered some VMs, all at once and then one by one."""
    async with coordinator(refusing, clock=clock) as running:
        await asyncio.gather(*(running.register_vm(f"vm-{number}") for number in range(VMS // 2)))
        for number in range(VMS // 2, VMS):
            await running.register_vm(f"vm-{number}")
        yield running


@pytest.fixture
async def auditor(client: Client) -> AsyncIterator[Auditor]:
    opened = Auditor(client.address)
    yield opened
    await opened.close()


async def test_what_was_done_is_listed_in_order_page_by_page(auditor: Auditor) -> None:
    records, at = await auditor.listed(action="vm.register")
    assert sorted(record.resource for record in records) == sorted(f"vm/vm-{number}" for number in range(VMS))
    assert at == 0
    assert {(record.principal, record.tenant, record.outcome) for record in records} == {("admin", "default", "OK")}

    pages: list[AuditRecord] = []
    at = 0
    while True:
        page, at = await auditor.listed(
            first=at, limit=7, tenant_name="default", principal="admin", action="vm.register"
        )
        assert len(page) <= 7
        pages += page
        if not at:
            break
    assert pages == records
    assert [record.sequence for record in pages] == sorted(record.sequence for record in pages)
    # Listing is an operation too: one record for each call so far.
    listed, _ = await auditor.listed(action="audit.read")
    assert len(listed) == 1 + -(-VMS // 7)
    assert {record.resource for record in listed} == {"audit"}


async def test_the_newest_come_first(auditor: Auditor) -> None:
    everything, _ = await auditor.listed()
    newest, at = await auditor.listed(newest=True, limit=5, action="vm.register")
    registered = [record for record in everything if record.action == "vm.register"]
    assert (newest, at) == (registered[:-6:-1], 0)
    since, _ = await auditor.listed(newest=True, first=registered[-3].sequence, action="vm.register")
    assert since == registered[:-4:-1]
    assert await auditor.listed(first=10_000) == ([], 0)


async def test_a_call_looks_at_so_many_records_and_says_where_to_go_on(
    auditor: Auditor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = await auditor.listed(action="vm.register")
    monkeypatch.setattr(service, "SCAN_RECORDS_MAX", 6)
    found: list[AuditRecord] = []
    at, calls = 0, 0
    while calls == 0 or at:
        page, at = await auditor.listed(first=at, action="vm.register")
        found += page
        calls += 1
        assert calls < 100
    assert found == expected
    assert calls > VMS // 6


async def test_an_export_verifies_offline_and_holds_its_own_record(auditor: Auditor) -> None:
    head = await auditor.head()
    messages = await auditor.export()
    lines = list(export_lines(messages))
    trusted = keys_of(head.keys).values()
    verified = verify_export(lines, trusted=trusted, known_head=head.head)
    assert verified.cluster_id == head.cluster_id
    assert verified.head == (await auditor.head()).head
    records = [json.loads(line) for line in lines if b'"type"' not in line]
    assert records[-1]["action"] == "audit.read"
    assert sum(record["action"] == "vm.register" for record in records) == VMS


async def test_an_export_that_begins_later_proves_itself_from_there(auditor: Auditor) -> None:
    size = (await auditor.head()).head.size
    for first in (1, size // 2, size - 1):
        messages = await auditor.export(first)
        begins = messages[0].batches[0].first
        assert begins <= first < begins + len(messages[0].batches[0].lines)
        verified = verify_export(export_lines(messages), trusted=keys_of(messages[0].keys).values())
        assert verified.first == begins
    await refused(ErrorCode.NOT_FOUND, auditor.export(10_000))


async def test_nothing_is_exported_or_listed_that_the_log_does_not_know_of(
    auditor: Auditor, refusing: Refusing
) -> None:
    refusing.full = True
    await refused(ErrorCode.UNREACHABLE, auditor.export())
    await refused(ErrorCode.UNREACHABLE, auditor.listed())
    refusing.full = False
    assert (await auditor.listed(action="audit.read"))[0] == []


async def test_every_record_is_proven_to_be_in_the_log(auditor: Auditor) -> None:
    head = await auditor.head()
    keys = keys_of(head.keys)
    records, _ = await auditor.listed()
    for record in records:
        answer = await auditor.call("ProveInclusion", pb.ProveInclusionRequest(sequence=record.sequence))
        proven = verify_proof(inclusion_document(record.sequence, answer, keys), trusted=keys.values())
        assert proven.record == record
    size = (await auditor.head()).head.size
    await refused(ErrorCode.NOT_FOUND, auditor.call("ProveInclusion", pb.ProveInclusionRequest(sequence=size)))


async def test_every_earlier_log_is_proven_to_be_the_beginning_of_a_later_one(auditor: Auditor) -> None:
    head = await auditor.head()
    keys = keys_of(head.keys)
    size = head.head.size
    signed = 0
    for earlier in range(size + 1):
        request = pb.ProveConsistencyRequest(from_size=earlier, to_size=size)
        answer = await auditor.call("ProveConsistency", request)
        assert answer.to_head == head.head
        if not answer.HasField("from_head"):
            continue
        signed += 1
        proven = verify_proof(consistency_document(answer, keys), trusted=keys.values(), known_head=head.head)
        assert proven.from_size == earlier
    assert VMS // 2 < signed <= size
    newest = await auditor.call("ProveConsistency", pb.ProveConsistencyRequest(from_size=size))
    assert newest.to_head.size > size


async def test_a_proof_ends_at_a_size_that_was_signed(auditor: Auditor, client: Client) -> None:
    await asyncio.gather(*(client.register_vm(f"more-{number}") for number in range(30)))
    heads = {batch.head.size for message in await auditor.export() for batch in message.batches}
    unsigned = next(size for size in range(1, max(heads)) if size not in heads)
    request = pb.ProveConsistencyRequest(from_size=0, to_size=unsigned)
    error = await refused(ErrorCode.INVALID_ARGUMENT, auditor.call("ProveConsistency", request))
    before, behind = int(error.facts["before"]), int(error.facts["behind"])
    assert before < unsigned < behind
    assert behind in heads
    assert before in {0, *heads}
    for wrong in (
        pb.ProveConsistencyRequest(from_size=1, to_size=100_000),
        pb.ProveConsistencyRequest(from_size=behind + 1, to_size=behind),
    ):
        await refused(ErrorCode.INVALID_ARGUMENT, auditor.call("ProveConsistency", wrong))


async def test_only_a_binding_for_all_tenants_lets_anybody_read(auditor: Auditor, client: Client) -> None:
    eve = Auditor(client.address, await client.new_token("eve"))
    try:
        for tenant, code in (("default", ErrorCode.DENIED), ("*", None)):
            await client.bind(("eve", "auditor", "*"), tenant=tenant)
            for call in (eve.listed, eve.head, eve.export):
                if code is not None:
                    await refused(code, call())
                else:
                    assert await call()
        records, _ = await auditor.listed(principal="eve")
        assert [record.outcome for record in records] == ["DENIED"] * 3 + ["OK"] * 2
    finally:
        await eve.close()
