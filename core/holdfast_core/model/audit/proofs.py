"""Verifies proofs about the audit log with nothing but public keys: that a record is in it, that it only ever grew."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from holdfast_core.model.audit.export import CONSISTENCY, INCLUSION, Fields
from holdfast_core.model.audit.heads import HeadVerifier
from holdfast_core.model.audit.locate import What
from holdfast_core.model.audit.merkle import check_consistency, leaf_hash, root_from_inclusion
from holdfast_core.model.audit.record import AuditRecord
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_proto.v1.audit_pb2 import SignedHead


@dataclass(frozen=True, slots=True, kw_only=True)
class Proven:
    """What a proof proves.

    Attributes:
        cluster_id: whose log it is about.
        head: the head that it is about; of two the later one.
        record: the record that is in the log; None for a proof about two heads.
        from_size: records of the earlier log that the later one begins with; None for a proof about a record.
        key: public key that the head was trusted by; 32 bytes.
        self_trusted: whether that key comes from the proof itself.
    """

    cluster_id: str
    head: SignedHead
    record: AuditRecord | None
    from_size: int | None
    key: bytes
    self_trusted: bool


def verify_proof(document: bytes, *, trusted: Iterable[bytes] = (), known_head: SignedHead | None = None) -> Proven:
    """Verify a proof, from its document.

    Args:
        document: the proof.
        trusted: public keys (32 bytes each) that heads are trusted by. If none is given, the proof's own are.
        known_head: a head that was kept elsewhere and must be one of those that the proof is about.

    Raises:
        HoldfastError: CORRUPT if it proves nothing; its facts are `sequence` and `what` as those of `verify_export`,
            and there are none if it is no proof at all. INVALID_ARGUMENT if the head at its beginning is missing, or
            `known_head` is none of its heads.
    """
    return _Proof(Fields.of(document, INCLUSION, CONSISTENCY), frozenset(trusted), known_head).verified()


class _Proof:
    def __init__(self, fields: Fields, trusted: frozenset[bytes], known_head: SignedHead | None) -> None:
        self._fields = fields
        self._cluster_id = fields.text("cluster_id")
        self._keys = fields.keys()
        self._self_trusted = not trusted
        keys = {key_id: key for key_id, key in self._keys.items() if self._self_trusted or key in trusted}
        self._verifier = HeadVerifier(self._cluster_id, keys)
        self._known = known_head

    def verified(self) -> Proven:
        if self._fields.kind == INCLUSION:
            return self._inclusion()
        return self._consistency()

    def _inclusion(self) -> Proven:
        head, line, sequence = self._fields.head("head"), self._fields.line(), self._fields.number("sequence")
        self._check(head, sequence)
        self._compare_known(head)
        try:
            root = root_from_inclusion(sequence, head.size, leaf_hash(line), self._fields.hashes("path"))
        except HoldfastError as error:
            raise _failure(What.ALTERED, sequence, error.message) from error
        if root != head.root:
            why = f"record {sequence} of the log at size {head.size} is not the one in the proof"
            raise _failure(What.ALTERED, sequence, why)
        record = AuditRecord.from_line(line)
        if record.sequence != sequence:
            raise _failure(What.ALTERED, sequence, f"record {sequence} says that it is record {record.sequence}")
        return self._proven(head, record=record)

    def _consistency(self) -> Proven:
        later, from_size = self._fields.head("to_head"), self._fields.number("from_size")
        self._check(later, later.size)
        earlier = self._earlier(from_size)
        if earlier.size != from_size:
            raise _failure(What.FORGED_HEAD, earlier.size, f"the earlier head is one over {earlier.size} records")
        self._check(earlier, from_size)
        self._compare_known(later, earlier)
        try:
            check_consistency(from_size, later.size, earlier.root, later.root, self._fields.hashes("path"))
        except HoldfastError as error:
            raise _failure(What.ALTERED, 0, error.message, last=max(from_size - 1, 0)) from error
        return self._proven(later, from_size=from_size)

    def _earlier(self, from_size: int) -> SignedHead:
        """Return the head at the beginning: the proof's own, or the known one where no batch ended just there."""
        if self._fields.has("from_head"):
            return self._fields.head("from_head")
        if self._known is None or self._known.size != from_size:
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT,
                f"the proof holds no head at size {from_size}, because none was signed there; give the one you have",
            )
        return self._known

    def _compare_known(self, *heads: SignedHead) -> None:
        if self._known is None:
            return
        same = [head for head in heads if head.size == self._known.size]
        if not same:
            sizes = " and ".join(str(head.size) for head in heads)
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT,
                f"the proof is about the log at size {sizes}, and the head to compare with is at {self._known.size}",
            )
        self._check(self._known, self._known.size)
        if same[0].root != self._known.root:
            why = f"the head at size {self._known.size} is not the one that the proof is about"
            raise _failure(What.ALTERED, 0, why, last=max(self._known.size - 1, 0))

    def _check(self, head: SignedHead, sequence: int) -> None:
        try:
            self._verifier.check(head)
        except HoldfastError as error:
            raise _failure(What.FORGED_HEAD, sequence, error.message) from error

    def _proven(self, head: SignedHead, *, record: AuditRecord | None = None, from_size: int | None = None) -> Proven:
        return Proven(
            cluster_id=self._cluster_id,
            head=head,
            record=record,
            from_size=from_size,
            key=self._keys[head.key_id],
            self_trusted=self._self_trusted,
        )


def _failure(what: What, at: int, why: str, *, last: int | None = None) -> HoldfastError:
    facts = {"sequence": str(at), "what": what.value}
    if last is not None:
        facts["last"] = str(last)
    return HoldfastError(ErrorCode.CORRUPT, f"the proof does not hold: {why}", facts=facts)
