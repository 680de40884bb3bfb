"""Audit logs from anywhere: no line, export or proof but the ones that were signed ever verifies as what was signed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from holdfast_core.model.audit.export import HeadLine, LogLine, consistency_document, inclusion_document
from holdfast_core.model.audit.merkle import consistency_path, inclusion_path
from holdfast_core.model.audit.proofs import verify_proof
from holdfast_core.model.audit.record import AuditRecord
from holdfast_core.model.audit.verify import verify_export
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_proto.v1.audit_pb2 import ProveConsistencyResponse, ProveInclusionResponse
from tests.fuzz.mutations import mutated, outcome
from tests.model.audit_logs import CLUSTER_ID, grown, record, rotated, signer

LOG = rotated()
OTHER = grown((2, 3))
TRUSTED = [signer("audit-1").public_key]
EXPORT = b"\n".join(LOG.export()) + b"\n"
LINES = LOG.lines
LINE = record(3).to_line()

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=6) | st.just("ab" * 32),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def proofs() -> list[bytes]:
    """A proof that record 5 is in the log, and one that the log at its end begins with the one of its first batch."""
    first, last = LOG.batches[0].head, LOG.batches[-1].head
    inclusion = ProveInclusionResponse(
        cluster_id=CLUSTER_ID, line=LINES[5], head=last, path=inclusion_path(5, last.size, LOG.subtree())
    )
    consistency = ProveConsistencyResponse(
        cluster_id=CLUSTER_ID,
        from_size=first.size,
        from_head=first,
        to_head=last,
        path=consistency_path(first.size, last.size, LOG.subtree()),
    )
    return [inclusion_document(5, inclusion, LOG.keys), consistency_document(consistency, LOG.keys)]


PROOFS = proofs()
# A proof is about one head, whose key has to be trusted: here the one that signed at the log's end, and the first.
PROOF_KEYS = list(LOG.keys.values())


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(line=st.binary(max_size=120) | mutated(LINE, LINES[0]) | JSON.map(lambda value: json.dumps(value).encode()))
@example(line=b"[" * 100_000)
@example(line=b'{"sequence":' + b"1" * 5000 + b"}")
@example(line=b"\xff\xfe" + LINE)
def test_a_line_is_refused_or_a_record_that_can_be_written_again(line: bytes) -> None:
    read = outcome(lambda: AuditRecord.from_line(line), ErrorCode.CORRUPT)
    if not isinstance(read, HoldfastError):
        # Texts are cut when they are written, so what was read may be longer; after one writing it is stable.
        again = AuditRecord.from_line(read.to_line())
        assert again.to_line() == read.to_line()
        assert again.sequence == read.sequence


@settings(max_examples=200, deadline=None)
@given(field=st.sampled_from(sorted(json.loads(LINE))), value=JSON)
def test_a_record_with_a_field_of_another_form(field: str, value: Any) -> None:
    line = json.dumps(json.loads(LINE) | {field: value}).encode()
    read = outcome(lambda: AuditRecord.from_line(line), ErrorCode.CORRUPT)
    assert isinstance(read, HoldfastError) or read.to_line()


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_a_changed_export_is_found_out_or_tells_the_same_records(data: st.DataObject) -> None:
    bad = data.draw(mutated(EXPORT, b"\n".join(OTHER.export())))
    found = outcome(
        lambda: verify_export(bad.splitlines(keepends=False), trusted=TRUSTED),
        ErrorCode.CORRUPT,
    )
    if isinstance(found, HoldfastError):
        return
    # Names of keys that signed nothing, the hashes beside a head, and heads at the end may go; no record may.
    lines = [line for line in bad.splitlines() if not line.startswith(b'{"type":')]
    assert lines == LINES[found.first : found.first + found.records]
    assert found.head.root == LOG.root(found.head.size)


@settings(max_examples=150, deadline=None)
@given(lines=st.lists(st.binary(max_size=40) | st.sampled_from([*LOG.export(), *OTHER.export()]), max_size=14))
def test_lines_in_any_order_with_any_between(lines: list[bytes]) -> None:
    found = outcome(lambda: verify_export(lines, trusted=TRUSTED), ErrorCode.CORRUPT)
    if not isinstance(found, HoldfastError):
        records = [line.removesuffix(b"\n") for line in lines if not line.startswith(b'{"type":')]
        assert records in (LINES[: found.records], OTHER.lines[: found.records])


@settings(max_examples=200, deadline=None)
@given(
    number=st.integers(0, 1),
    field=st.sampled_from(["cluster_id", "first", "frontier", "keys", "size", "root", "key_id", "signature", "leaves"]),
    value=JSON,
)
def test_a_log_or_head_line_with_a_field_of_another_form(number: int, field: str, value: Any) -> None:
    lines = LOG.export()
    at = 0 if number == 0 else len(lines) - 1
    line = json.dumps(json.loads(lines[at]) | {field: value}).encode()
    parse = (LogLine if number == 0 else HeadLine).from_line
    read = outcome(lambda: parse(line), ErrorCode.CORRUPT)
    if not isinstance(read, HoldfastError):
        assert parse(read.to_line()) == read
    lines[at] = line
    found = outcome(lambda: verify_export(lines, trusted=TRUSTED), ErrorCode.CORRUPT)
    assert isinstance(found, HoldfastError) or found.records == len(LINES)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), number=st.integers(0, 1))
def test_a_changed_proof_proves_nothing_else(data: st.DataObject, number: int) -> None:
    bad = data.draw(mutated(PROOFS[number], PROOFS[1 - number]))
    found = outcome(lambda: verify_proof(bad, trusted=PROOF_KEYS), ErrorCode.CORRUPT, ErrorCode.INVALID_ARGUMENT)
    if isinstance(found, HoldfastError):
        return
    assert found.head.root == LOG.root(found.head.size)
    assert found.record is None or found.record.to_line() == LINES[found.record.sequence]
    assert found.from_size in (None, LOG.batches[0].head.size)


@settings(max_examples=200, deadline=None)
@given(document=st.binary(max_size=150) | JSON.map(lambda value: json.dumps(value).encode()))
def test_arbitrary_bytes_prove_nothing(document: bytes) -> None:
    assert isinstance(outcome(lambda: verify_proof(document, trusted=PROOF_KEYS), ErrorCode.CORRUPT), HoldfastError)
    assert isinstance(outcome(lambda: verify_export([document]), ErrorCode.CORRUPT), HoldfastError)
