"""`holdfast audit`: read the audit log, take it out of the cluster, and verify it without the cluster."""

from __future__ import annotations

import json as json_format
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from holdfast.cli.audit_files import read_head, read_keys, verify_file, write_lines
from holdfast.cli.connection import Connection, on_cluster
from holdfast.cli.exits import say
from holdfast.cli.output import format_time, print_json, print_line, print_table
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import AUDIT_LIST_MAX

if TYPE_CHECKING:
    from holdfast_core.model.audit.proofs import Proven
    from holdfast_core.model.audit.record import AuditRecord
    from holdfast_core.model.audit.verify import Verified
    from holdfast_proto.v1.audit_pb2 import GetAuditHeadResponse, ListAuditRecordsRequest

app = typer.Typer(help="Read, export and verify the audit log.")

# A coordinator may have to fetch old records from the nodes first.
_TIMEOUT_S: Final = 60.0
_LISTED: Final = 100

_OutputOption = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write to this file instead of the screen.")
]
_RecordOption = Annotated[
    int | None, typer.Option("--record", metavar="N", min=0, help="Prove that this record is in the log.")
]


@app.command("list")
@on_cluster
def list_records(
    connection: Connection,
    first: Annotated[int, typer.Option("--first", metavar="N", min=0, help="First record to list.")] = 0,
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", min=1, max=AUDIT_LIST_MAX, help="At most so many.")
    ] = _LISTED,
    newest: Annotated[bool, typer.Option("--newest", help="List the newest, newest first.")] = False,
    principal: Annotated[str, typer.Option("--principal", metavar="NAME", help="Only what this one asked for.")] = "",
    action: Annotated[str, typer.Option("--action", metavar="NAME", help="Only this action.")] = "",
) -> None:
    """List records of the audit log."""
    from holdfast_core.model.audit.record import AuditRecord
    from holdfast_proto.v1.audit_pb2 import ListAuditRecordsRequest

    request = ListAuditRecordsRequest(first=first, limit=limit, newest=newest, principal=principal, action=action)
    lines = list(_listed(connection, request))
    records = [AuditRecord.from_line(line) for line in lines]
    if connection.json:
        print_json([json_format.loads(line) for line in lines])
        return
    print_table(("SEQ", "TIME", "PRINCIPAL", "TENANT", "ACTION", "RESOURCE", "OUTCOME"), [*map(_row, records)])


@app.command("export")
@on_cluster
def export(
    connection: Connection,
    first: Annotated[
        int, typer.Option("--first", metavar="N", min=0, help="First record, or one shortly before it.")
    ] = 0,
    output: _OutputOption = None,
) -> None:
    """Take all records out, with the signed heads that prove them: a file for `holdfast audit verify`."""
    from holdfast_core.model.audit.export import export_lines, is_record
    from holdfast_proto.v1.audit_pb2 import ExportAuditRecordsRequest
    from holdfast_proto.v1.audit_pb2_grpc import AuditServiceStub

    counted = 0

    def counting(lines: Iterable[bytes]) -> Iterator[bytes]:
        nonlocal counted
        for line in lines:
            counted += is_record(line)
            yield line

    request = ExportAuditRecordsRequest(first=first)
    answers = connection.stream(
        lambda channel: AuditServiceStub(channel).ExportAuditRecords, request, timeout_s=_TIMEOUT_S
    )
    with closing(answers):
        _write(counting(export_lines(answers)), output)
    if output is not None:
        _print(connection, {"records": counted, "file": output}, f"{counted} records in {output}")


@app.command("head")
@on_cluster
def head(connection: Connection, output: _OutputOption = None) -> None:
    """Take out the newest signed head: kept elsewhere, it shows later that nothing before it was changed."""
    from holdfast_core.model.audit.export import head_document

    _write([head_document(_newest_head(connection))], output)
    if output is not None:
        _print(connection, {"file": output}, str(output))


@app.command("prove")
@on_cluster
def prove(
    connection: Connection,
    record: _RecordOption = None,
    from_size: Annotated[
        int | None,
        typer.Option("--from", metavar="SIZE", min=0, help="Prove that the log of this size was never changed."),
    ] = None,
    to_size: Annotated[
        int | None, typer.Option("--to", metavar="SIZE", min=1, help="Size of the later log; the newest if not given.")
    ] = None,
    output: _OutputOption = None,
) -> None:
    """Prove that a record is in the log, or that the log begins with an earlier one: for `holdfast audit verify`."""
    if (record is None) == (from_size is None) or (to_size is not None and from_size is None):
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "prove what? give --record N, or --from SIZE and maybe --to")
    proof = (
        _record_proof(connection, record) if record is not None else _growth_proof(connection, from_size or 0, to_size)
    )
    _write([proof], output)
    if output is not None:
        _print(connection, {"file": output}, str(output))


@app.command("verify")
def verify(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `audit export` or `audit prove` wrote.")],
    key: Annotated[
        list[str] | None,
        typer.Option(
            "--key", metavar="HEX-OR-FILE", help="Public key to trust, or a file of one or of a head. Repeatable."
        ),
    ] = None,
    head: Annotated[
        Path | None, typer.Option("--head", metavar="FILE", help="A head, kept from before, that the log must contain.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Verify an export or a proof, offline; of an export, name the first record that is not what was signed."""
    known, beside = read_head(head) if head is not None else (None, [])
    # Keys that somebody kept beside a head are worth more than those which the file brings along.
    trusted = read_keys(key) if key else beside
    found = verify_file(file, trusted=trusted, known_head=known)
    if found.self_trusted:
        say(
            f"the key {found.key.hex()} comes from {file} itself: "
            "compare it with the one that you have from elsewhere, or give that with --key"
        )
    outer = context.obj if isinstance(context.obj, Connection) else Connection()
    signed = found.head
    root = f"head {signed.size} {signed.root.hex()} of {format_time(signed.time_unix_ms)} is right"
    facts = {
        "cluster_id": found.cluster_id,
        **_facts(found),
        "size": signed.size,
        "root": signed.root,
        "time_unix_ms": signed.time_unix_ms,
        "key_id": signed.key_id,
        "key": found.key,
        "self_trusted": found.self_trusted,
    }
    _print(Connection(json=json).under(outer), facts, f"{_told(found)}, {root}")


def _told(found: Verified | Proven) -> str:
    from holdfast_core.model.audit.verify import Verified

    if isinstance(found, Verified):
        return f"{found.records} records from {found.first} on"
    if found.record is not None:
        return f"record {found.record.sequence} is in the log ({' '.join(_row(found.record)[1:])})"
    return f"the log begins with the {found.from_size} records of the earlier one"


def _facts(found: Verified | Proven) -> dict[str, Any]:
    from holdfast_core.model.audit.verify import Verified

    if isinstance(found, Verified):
        return {"first": found.first, "records": found.records}
    if found.record is not None:
        return {"record": json_format.loads(found.record.to_line())}
    return {"from_size": found.from_size}


def _listed(connection: Connection, request: ListAuditRecordsRequest) -> Iterator[bytes]:
    """Yield the lines that a request asks for; a coordinator may look through the log in several steps."""
    from holdfast_proto.v1.audit_pb2_grpc import AuditServiceStub

    while True:
        answer = connection.call(
            lambda channel: AuditServiceStub(channel).ListAuditRecords, request, timeout_s=_TIMEOUT_S
        )
        lines = answer.lines[: request.limit]
        yield from lines
        request.limit -= len(lines)
        # The newest come at once; a further step would begin at records that have come in since.
        if not answer.next or not request.limit or request.newest:
            return
        request.first = answer.next


def _row(record: AuditRecord) -> tuple[str, ...]:
    texts = (record.principal, record.tenant, record.action, record.resource, record.outcome)
    return (str(record.sequence), format_time(record.time_unix_ms), *map(_shown, texts))


def _shown(text: str) -> str:
    """Return a text that somebody else chose so that it cannot steer the terminal."""
    return "".join(sign if sign.isprintable() else "?" for sign in text) or "-"


def _newest_head(connection: Connection) -> GetAuditHeadResponse:
    from holdfast_proto.v1.audit_pb2 import GetAuditHeadRequest
    from holdfast_proto.v1.audit_pb2_grpc import AuditServiceStub

    return connection.call(lambda channel: AuditServiceStub(channel).GetAuditHead, GetAuditHeadRequest())


def _record_proof(connection: Connection, sequence: int) -> bytes:
    from holdfast_core.model.audit.export import inclusion_document, keys_of
    from holdfast_proto.v1.audit_pb2 import ProveInclusionRequest
    from holdfast_proto.v1.audit_pb2_grpc import AuditServiceStub

    request = ProveInclusionRequest(sequence=sequence)
    answer = connection.call(lambda channel: AuditServiceStub(channel).ProveInclusion, request, timeout_s=_TIMEOUT_S)
    return inclusion_document(sequence, answer, keys_of(_newest_head(connection).keys))


def _growth_proof(connection: Connection, from_size: int, to_size: int | None) -> bytes:
    from holdfast_core.model.audit.export import consistency_document, keys_of
    from holdfast_proto.v1.audit_pb2 import ProveConsistencyRequest
    from holdfast_proto.v1.audit_pb2_grpc import AuditServiceStub

    request = ProveConsistencyRequest(from_size=from_size, to_size=to_size or 0)
    answer = connection.call(lambda channel: AuditServiceStub(channel).ProveConsistency, request, timeout_s=_TIMEOUT_S)
    return consistency_document(answer, keys_of(_newest_head(connection).keys))


def _write(lines: Iterable[bytes], output: Path | None) -> None:
    """Write lines to the file or, byte for byte, to stdout."""
    if output is not None:
        write_lines(output, lines)
        return
    sys.stdout.flush()
    for line in lines:
        sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


def _print(connection: Connection, facts: dict[str, Any], text: str) -> None:
    if connection.json:
        print_json(facts)
    else:
        print_line(text)
