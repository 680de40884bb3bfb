"""Verifies an export of the audit log with nothing but public keys, and names the first record that is not right.

Works on a stream and holds what it takes of the records since the last head. All that is known to be right lies below
the last head that passed; the first failure ends the verification. What was cut off behind the last head of the file
cannot be seen from the file alone: a head that was kept elsewhere tells.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from holdfast_core.model.audit.export import HeadLine, LogLine, is_record
from holdfast_core.model.audit.heads import PUBLIC_KEY_BYTES, HeadVerifier
from holdfast_core.model.audit.locate import What, first_difference, what_differs
from holdfast_core.model.audit.merkle import Frontier, leaf_hash
from holdfast_core.model.audit.record import OK, ROTATE_AUDIT_ACTION, AuditRecord
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_proto.v1.audit_pb2 import SignedHead

_SENTENCES: Final = {
    What.ALTERED: "record {at} was altered: its line is not the one that was signed",
    What.MISSING: "record {at} is missing",
    What.REORDERED: "record {at} is not in its place: another stands there",
    What.INSERTED: "a line was inserted at the place of record {at}",
    What.UNSIGNED: "from record {at} on nothing is signed: the export ends without a head",
    What.FORGED_HEAD: "the head over record {at} is forged",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What was verified.

    Attributes:
        cluster_id: whose log it is.
        first: sequence number of the export's first record.
        records: records that the export holds.
        head: the newest head; all records below it are what was signed.
        key: public key that everything else was trusted by; 32 bytes.
        self_trusted: whether that key comes from the export itself. Then the export is whole in itself, but somebody
            who made all of it anew with a key of his own would not be found out.
    """

    cluster_id: str
    first: int
    records: int
    head: SignedHead
    key: bytes
    self_trusted: bool


def verify_export(
    lines: Iterable[bytes], *, trusted: Iterable[bytes] = (), known_head: SignedHead | None = None
) -> Verified:
    """Verify an export, from its lines with or without their ends.

    Args:
        lines: the export.
        trusted: public keys (32 bytes each) that heads are trusted by. Keys that a record under such a head introduces
            are trusted from there on. If none is given, the key that the export names for its first head is.
        known_head: an earlier or later head of the same log, which the log must contain.

    Raises:
        HoldfastError: CORRUPT if anything is not what was signed. Its facts are `sequence`, the first record that is
            not right, and `what`: altered, missing, reordered, inserted, unsigned or forged-head; and `last` where it
            may be any record from `sequence` to that. A file that is no export at all has no facts. INVALID_ARGUMENT
            if the export begins after the known head.
    """
    stream = (line.removesuffix(b"\n") for line in lines)
    opening = LogLine.from_line(next(stream, b""))
    log = _Log(opening, frozenset(trusted), known_head)
    batch = _Batch()
    for line in stream:
        if is_record(line):
            batch.add(line)
        else:
            log.close(batch, line, stream)
            batch = _Batch()
    return log.end(batch)


@dataclass(slots=True)
class _Batch:
    """The records since the last head.

    Attributes:
        hashes: leaf hashes of the lines.
        sequences: the places that the lines themselves name; None for a line that is no record.
        introduced: keys that the records introduce.
    """

    hashes: list[bytes] = field(default_factory=list)
    sequences: list[int | None] = field(default_factory=list)
    introduced: list[tuple[str, bytes]] = field(default_factory=list)

    def add(self, line: bytes) -> None:
        self.hashes.append(leaf_hash(line))
        record = _parsed(line)
        self.sequences.append(None if record is None else record.sequence)
        key = None if record is None else _introduced(record)
        if key is not None:
            self.introduced.append(key)


class _Log:
    """How far the log is verified."""

    def __init__(self, opening: LogLine, trusted: frozenset[bytes], known_head: SignedHead | None) -> None:
        self._opening = opening
        self._frontier = opening.frontier
        self._head: SignedHead | None = None
        self._known = known_head
        self._known_root: bytes | None = None
        self._self_trusted = not trusted
        keys = {key_id: key for key_id, key in opening.keys.items() if key in trusted}
        self._verifier = HeadVerifier(opening.cluster_id, keys)
        self._key = b""

    def close(self, batch: _Batch, line: bytes, rest: Iterator[bytes]) -> None:
        """Verify the records of a batch by the head after them; `rest` is what follows."""
        closing = self._head_of(line)
        head, grown = closing.head, self._frontier.extended(batch.hashes)
        if not _is_at(grown, head):
            raise self._located(batch, closing, rest)
        places = range(self._frontier.size, head.size)
        misnamed = first_difference(places, batch.sequences)
        if misnamed is not None:
            raise _failure(What.ALTERED, places[misnamed], "it is signed, but does not say that this is its place")
        self._see_known(grown, batch.hashes)
        for key_id, public_key in batch.introduced:
            self._trust(key_id, public_key)
        self._frontier, self._head = grown, head

    def end(self, batch: _Batch) -> Verified:
        """Verify that nothing is left over, and that the log contains the head that is known."""
        if batch.hashes or self._head is None:
            raise _failure(What.UNSIGNED, self._frontier.size)
        self._check_known()
        first = self._opening.frontier.size
        return Verified(
            cluster_id=self._opening.cluster_id,
            first=first,
            records=self._frontier.size - first,
            head=self._head,
            key=self._key,
            self_trusted=self._self_trusted,
        )

    def _head_of(self, line: bytes) -> HeadLine:
        """Parse a head and check all of it but its root."""
        next_record = self._frontier.size
        try:
            closing = HeadLine.from_line(line)
            head = closing.head
            if self._head is None:
                self._trust_first(head.key_id)
            self._verifier.check(head)
        except HoldfastError as error:
            raise _failure(What.FORGED_HEAD, next_record, error.message) from error
        if head.size < next_record:
            raise _failure(What.FORGED_HEAD, next_record, f"it is one over {head.size} records, from before")
        if self._head is not None and head.time_unix_ms < self._head.time_unix_ms:
            raise _failure(What.FORGED_HEAD, next_record, "it is older than the head before it")
        return closing

    def _trust_first(self, key_id: str) -> None:
        public_key = self._opening.keys.get(key_id, b"")
        if self._self_trusted and public_key:
            self._verifier.trust(key_id, public_key)
        self._key = public_key

    def _trust(self, key_id: str, public_key: bytes) -> None:
        try:
            self._verifier.trust(key_id, public_key)
        except HoldfastError as error:
            raise _failure(What.FORGED_HEAD, self._frontier.size, error.message) from error

    def _located(self, batch: _Batch, closing: HeadLine, rest: Iterator[bytes]) -> HoldfastError:
        """Return the error that names the first record which is not what the head was signed over."""
        first, head = self._frontier.size, closing.head
        if _is_at(self._frontier.extended(closing.leaves), head):
            # What the head line says its records hash to is what was signed: each line can be told right from wrong.
            at = first_difference(closing.leaves, batch.hashes) or 0
            return _failure(what_differs(closing.leaves, batch.hashes, at, _marks_by_hash(rest)), first + at)
        places = range(first, head.size)
        misplaced = first_difference(places, batch.sequences)
        if misplaced is not None:
            what = what_differs(places, batch.sequences, misplaced, _marks_by_place(rest))
            return _failure(what, first + misplaced)
        # Hashes that were altered could lay it at the door of any record of the batch, so they name none.
        return _failure(
            What.ALTERED,
            first,
            f"it, or another up to record {head.size - 1}; the hashes in the file were altered with it",
            last=head.size - 1,
        )

    def _see_known(self, grown: Frontier, hashes: Sequence[bytes]) -> None:
        if self._known is not None and self._frontier.size <= self._known.size <= grown.size:
            self._known_root = self._frontier.extended(hashes[: self._known.size - self._frontier.size]).root

    def _check_known(self) -> None:
        known, first = self._known, self._opening.frontier.size
        if known is None:
            return
        if known.size < first:
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT,
                f"the export begins with record {first}, after the head at size {known.size}; export from before it",
            )
        try:
            self._verifier.check(known)
        except HoldfastError as error:
            raise _failure(What.FORGED_HEAD, known.size, f"it is the one to compare with: {error.message}") from error
        if self._known_root is None:
            why = f"the export ends before the head at size {known.size}"
            raise _failure(What.MISSING, self._frontier.size, why, last=known.size - 1)
        if self._known_root != known.root:
            why = f"or another up to record {known.size - 1}: the log does not contain the head at size {known.size}"
            raise _failure(What.ALTERED, first, why, last=known.size - 1)


def _is_at(tree: Frontier, head: SignedHead) -> bool:
    return tree.size == head.size and tree.root == head.root


def _parsed(line: bytes) -> AuditRecord | None:
    try:
        return AuditRecord.from_line(line)
    except HoldfastError:
        return None


def _introduced(record: AuditRecord) -> tuple[str, bytes] | None:
    """Return the key that a record introduces, None for any other record."""
    if record.action != ROTATE_AUDIT_ACTION or record.outcome != OK:
        return None
    try:
        public_key = bytes.fromhex(record.details.get("public_key", ""))
    except ValueError:
        return None
    key_id = record.details.get("key_id", "")
    return (key_id, public_key) if key_id and len(public_key) == PUBLIC_KEY_BYTES else None


def _marks_by_hash(rest: Iterable[bytes]) -> Iterator[tuple[bool, bytes]]:
    for line in rest:
        if is_record(line):
            yield True, leaf_hash(line)
        else:
            yield from ((False, leaf) for leaf in _leaves(line))


def _marks_by_place(rest: Iterable[bytes]) -> Iterator[tuple[bool, int]]:
    for line in rest:
        record = _parsed(line) if is_record(line) else None
        if record is not None:
            yield True, record.sequence


def _leaves(line: bytes) -> Sequence[bytes]:
    try:
        return HeadLine.from_line(line).leaves
    except HoldfastError:
        return ()


def _failure(what: What, at: int, why: str = "", *, last: int | None = None) -> HoldfastError:
    sentence = _SENTENCES[what].format(at=at)
    facts = {"sequence": str(at), "what": what.value}
    if last is not None:
        facts["last"] = str(last)
    return HoldfastError(ErrorCode.CORRUPT, f"{sentence}: {why}" if why else sentence, facts=facts)
