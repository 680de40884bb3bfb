"""A proof about the audit log holds exactly if it proves what it says."""

from __future__ import annotations

import json

import pytest

from holdfast_core.model.audit.export import consistency_document, inclusion_document
from holdfast_core.model.audit.merkle import consistency_path, inclusion_path
from holdfast_core.model.audit.proofs import verify_proof
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_proto.v1.audit_pb2 import ProveConsistencyResponse, ProveInclusionResponse, SignedHead
from tests.model.audit_logs import CLUSTER_ID, Log, grown, record, signer

LOG = grown()
KEY = LOG.keys["audit-1"]


def inclusion(place: int, log: Log = LOG) -> bytes:
    """The proof that a record is in the log."""
    path = inclusion_path(place, log.size, log.subtree())
    answer = ProveInclusionResponse(cluster_id=CLUSTER_ID, line=log.lines[place], head=log.head(log.size), path=path)
    return inclusion_document(place, answer, log.keys)


def consistency(old: int, new: int, head: SignedHead | None = None) -> bytes:
    """The proof that the log of one head begins with that of another."""
    path = consistency_path(old, new, LOG.subtree())
    answer = ProveConsistencyResponse(
        cluster_id=CLUSTER_ID, from_head=head, to_head=LOG.head(new), path=path, from_size=old
    )
    return consistency_document(answer, LOG.keys)


def test_proofs_hold() -> None:
    for place in range(10):
        proven = verify_proof(inclusion(place), trusted=[KEY], known_head=LOG.head(10))
        assert (proven.record, proven.head, proven.self_trusted) == (record(place), LOG.head(10), False)
    for old in (3, 4, 8, 10):
        for new in (size for size in (3, 4, 8, 10) if size >= old):
            proven = verify_proof(consistency(old, new, LOG.head(old)), trusted=[KEY])
            assert (proven.from_size, proven.head.size, proven.record) == (old, new, None)
            assert verify_proof(consistency(old, new), known_head=LOG.head(old)).self_trusted


def refused(document: bytes, known_head: SignedHead | None = None) -> tuple[ErrorCode, str]:
    """The error about a proof, and what its facts say is wrong."""
    with pytest.raises(HoldfastError) as caught:
        verify_proof(document, trusted=[KEY], known_head=known_head)
    return caught.value.code, caught.value.facts.get("what", "")


def test_changed_proofs_do_not_hold() -> None:
    proof, between = json.loads(inclusion(4)), json.loads(consistency(3, 10, LOG.head(3)))
    forged_head = {**proof["head"], "root": bytes(32).hex()}
    for document, members, what in (
        (proof, {"line": record(4, principal="mallory").to_line().decode()}, "altered"),
        (proof, {"sequence": 5}, "altered"),
        (proof, {"sequence": 10}, "altered"),
        (proof, {"path": proof["path"][1:]}, "altered"),
        (proof, {"path": proof["path"][::-1]}, "altered"),
        (proof, {"head": forged_head}, "forged-head"),
        (proof, {"cluster_id": "d2" * 16}, "forged-head"),
        (proof, {"keys": []}, "forged-head"),
        (proof, {"line": 3}, ""),
        (proof, {"line": "é"}, ""),
        (proof, {"head": 3}, ""),
        (proof, {"type": "log"}, ""),
        (between, {"path": between["path"][1:]}, "altered"),
        (between, {"path": between["path"][::-1]}, "altered"),
        (between, {"from_size": 4}, "forged-head"),
        (between, {"from_head": forged_head}, "forged-head"),
        (between, {"to_head": forged_head}, "forged-head"),
        (between, {"from_head": between["to_head"], "from_size": 10, "to_head": between["from_head"]}, "altered"),
    ):
        changed = json.dumps({**document, **members}).encode()
        assert refused(changed) == (ErrorCode.CORRUPT, what)


def test_a_proof_is_about_the_record_it_says() -> None:
    log = Log()
    log.append(2, sequence=7)
    assert refused(inclusion(1, log)) == (ErrorCode.CORRUPT, "altered")


def test_only_what_may_be_several_records_has_a_last() -> None:
    for document, keys in (
        (inclusion(4), {"sequence", "what"}),
        (consistency(3, 10, LOG.head(3)), {"sequence", "what", "last"}),
    ):
        fields = json.loads(document)
        with pytest.raises(HoldfastError) as caught:
            verify_proof(json.dumps({**fields, "path": fields["path"][::-1]}).encode(), trusted=[KEY])
        assert caught.value.facts.keys() == keys


def test_a_proof_is_about_the_head_that_was_kept() -> None:
    other = LOG.signer.sign(size=10, root=bytes(32), time_unix_ms=1)
    foreign = signer("audit-9").sign(size=10, root=LOG.root(10), time_unix_ms=1)
    for head, code, what in (
        (other, ErrorCode.CORRUPT, "altered"),
        (foreign, ErrorCode.CORRUPT, "forged-head"),
        (LOG.head(4), ErrorCode.INVALID_ARGUMENT, ""),
    ):
        assert refused(inclusion(4), head) == (code, what)
    assert refused(consistency(3, 10)) == (ErrorCode.INVALID_ARGUMENT, "")
    assert refused(consistency(3, 10), LOG.head(4)) == (ErrorCode.INVALID_ARGUMENT, "")
