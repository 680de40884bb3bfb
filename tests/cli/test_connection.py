"""Plain calls of the command line: the credential goes with them, and errors come back as ours."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from holdfast.background import LoopThread
from holdfast.cli.connection import Connection
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.credentials import new_token, write_token
from holdfast_core.runtime.server import ServiceHost
from holdfast_proto.v1 import audit_pb2, audit_pb2_grpc

TOKEN, OTHER = new_token(bytes), new_token(lambda count: bytes([1]) * count)


class Audit(audit_pb2_grpc.AuditServiceServicer):
    """Answers with what the caller sent beside its request."""

    def __init__(self) -> None:
        self.error: HoldfastError | None = None

    def _seen(self, context: grpc.aio.ServicerContext[Any, Any]) -> list[bytes]:
        if self.error is not None:
            raise self.error
        sent = {key: str(value) for key, value in context.invocation_metadata() or ()}
        return [sent.get(name, "-").encode() for name in ("authorization", "holdfast-tenant")]

    async def ListAuditRecords(
        self, request: audit_pb2.ListAuditRecordsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> audit_pb2.ListAuditRecordsResponse:
        return audit_pb2.ListAuditRecordsResponse(lines=self._seen(context))

    async def ExportAuditRecords(
        self, request: audit_pb2.ExportAuditRecordsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[audit_pb2.ExportAuditRecordsResponse]:
        for line in self._seen(context):
            yield audit_pb2.ExportAuditRecordsResponse(cluster_id=line.decode())


@pytest.fixture
def audit() -> Audit:
    return Audit()  # type: ignore[abstract]  # the calls left out are not made here


@pytest.fixture
def coordinator(audit: Audit) -> Iterator[str]:
    """A server with the audit service alone."""
    loop, stack = LoopThread(), AsyncExitStack()

    async def start() -> str:
        host = ServiceHost("test", bind="127.0.0.1:0")
        host.add(audit_pb2_grpc.add_AuditServiceServicer_to_server, audit, "holdfast.v1.AuditService")
        await host.start()
        stack.push_async_callback(host.stop, 0)
        return host.address

    yield loop.run(start())
    loop.close(stack.aclose())


def listed(connection: Connection) -> list[bytes]:
    request = audit_pb2.ListAuditRecordsRequest()
    return list(connection.call(lambda c: audit_pb2_grpc.AuditServiceStub(c).ListAuditRecords, request).lines)


def exported(connection: Connection) -> list[bytes]:
    request = audit_pb2.ExportAuditRecordsRequest()
    stream = connection.stream(lambda c: audit_pb2_grpc.AuditServiceStub(c).ExportAuditRecords, request)
    with closing(stream) as answers:
        return [answer.cluster_id.encode() for answer in answers]


def test_the_credential_is_found_and_sent(coordinator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOLDFAST_TOKEN", "HOLDFAST_TOKEN_FILE", "HOLDFAST_TENANT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOLDFAST_HOME", str(tmp_path))
    assert listed(Connection(coordinator)) == exported(Connection(coordinator)) == [b"-", b"-"]

    (tmp_path / "tokens").mkdir()
    write_token(tmp_path / "tokens" / coordinator, TOKEN)
    localhost = coordinator.replace("127.0.0.1", "localhost")
    for address in (coordinator, localhost):
        assert listed(Connection(address, tenant="north")) == [b"Bearer " + TOKEN.encode(), b"north"]

    given = tmp_path / "given"
    write_token(given, OTHER)
    monkeypatch.setenv("HOLDFAST_TOKEN", TOKEN)
    connection = Connection(coordinator).under(Connection(token_file=given, tenant="south"))
    assert listed(connection) == exported(connection) == [b"Bearer " + OTHER.encode(), b"south"]
    write_token(given, TOKEN)
    assert listed(connection)[0] == b"Bearer " + TOKEN.encode()


def test_errors_are_the_coordinators_own(coordinator: str, audit: Audit, tmp_path: Path) -> None:
    audit.error = HoldfastError(ErrorCode.DENIED, "not yours")
    for ask in (listed, exported):
        with pytest.raises(HoldfastError, match="not yours") as caught:
            ask(Connection(coordinator))
        assert caught.value.code is ErrorCode.DENIED
        with pytest.raises(HoldfastError, match="which cluster") as caught:
            ask(Connection())
        assert caught.value.code is ErrorCode.INVALID_ARGUMENT
        with pytest.raises(HoldfastError, match="cannot be read") as caught:
            ask(Connection(coordinator, token_file=tmp_path / "absent"))
        assert caught.value.code is ErrorCode.UNAUTHENTICATED
