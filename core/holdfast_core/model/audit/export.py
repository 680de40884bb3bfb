"""The documents of the audit log that leave a cluster: exports, heads and proofs (docs/formats.md, "Audit log").

An export is a file of lines: one that describes the log, then the lines of the records, byte for byte as they were
hashed, and after those of each batch one with the signed head over all records so far. Heads and proofs are single
JSON objects. Everything that is no record is an object whose first member is `type`, which no record has; bytes are
hexadecimal.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from holdfast_core.model.audit.heads import PUBLIC_KEY_BYTES
from holdfast_core.model.audit.merkle import HASH_BYTES, Frontier, leaf_hash
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import ACCESS_TEXT_CHARS_MAX
from holdfast_proto.v1.audit_pb2 import (
    AuditBatch,
    AuditKey,
    ExportAuditRecordsResponse,
    GetAuditHeadResponse,
    ProveConsistencyResponse,
    ProveInclusionResponse,
    SignedHead,
)

FORMAT: Final = 1
LOG: Final = "log"
HEAD: Final = "head"
INCLUSION: Final = "inclusion"
CONSISTENCY: Final = "consistency"

_MARK: Final = b'{"type":'
_SIGNATURE_BYTES: Final = 64
_NUMBER_MAX: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class LogLine:
    """The first line of an export.

    Attributes:
        cluster_id: name of the cluster.
        frontier: the tree before the export's first record; its size is that record's sequence number.
        keys: public keys that heads were signed with, by key id; a claim of the file, not to be trusted as such.
    """

    cluster_id: str
    frontier: Frontier
    keys: Mapping[str, bytes]

    def to_line(self) -> bytes:
        """Return the line, without its end."""
        return document_line(
            LOG,
            format=FORMAT,
            cluster_id=self.cluster_id,
            first=self.frontier.size,
            frontier=_hexadecimal(self.frontier.hashes),
            keys=_keys_written(self.keys),
        )

    @classmethod
    def from_line(cls, line: bytes) -> LogLine:
        """Parse the line.

        Raises:
            HoldfastError: CORRUPT if it is no first line of an export of this format.
        """
        fields = Fields.of(line, LOG)
        frontier = Frontier(fields.number("first"), tuple(fields.hashes("frontier")))
        return cls(fields.text("cluster_id"), frontier, fields.keys())


@dataclass(frozen=True, slots=True)
class HeadLine:
    """A head in an export.

    Attributes:
        head: the head.
        leaves: leaf hashes of the records since the head before, in order. They prove nothing; with them a record that
            was changed is found among those of its batch.
    """

    head: SignedHead
    leaves: Sequence[bytes]

    def to_line(self) -> bytes:
        """Return the line, without its end."""
        return document_line(HEAD, **_head_written(self.head), leaves=_hexadecimal(self.leaves))

    @classmethod
    def from_line(cls, line: bytes) -> HeadLine:
        """Parse the line.

        Raises:
            HoldfastError: CORRUPT if it is no head.
        """
        fields = Fields.of(line, HEAD)
        return cls(fields.head(), fields.hashes("leaves"))


def is_record(line: bytes) -> bool:
    """Whether a line of an export stands where a record does, however damaged; all others have a `type`."""
    return not line.startswith(_MARK)


def batch_lines(batch: AuditBatch) -> Iterator[bytes]:
    """Return the lines of one batch: its records verbatim, and the head over them."""
    yield from batch.lines
    yield HeadLine(batch.head, [leaf_hash(line) for line in batch.lines]).to_line()


def export_lines(messages: Iterable[ExportAuditRecordsResponse]) -> Iterator[bytes]:
    """Return the lines of the export that a coordinator streams as messages, as they come.

    Raises:
        HoldfastError: NOT_FOUND if there is no record in it; CORRUPT if its frontier does not fit its first record.
    """
    opening: ExportAuditRecordsResponse | None = None
    begun = False
    for message in messages:
        opening = opening or message
        for batch in message.batches:
            if not begun:
                frontier = Frontier(batch.first, tuple(opening.frontier))
                yield LogLine(opening.cluster_id, frontier, keys_of(opening.keys)).to_line()
                begun = True
            yield from batch_lines(batch)
    if not begun:
        raise HoldfastError(ErrorCode.NOT_FOUND, "the audit log holds no record from there on")


def keys_of(keys: Iterable[AuditKey]) -> dict[str, bytes]:
    """Return keys as they come from a coordinator by key id."""
    return {key.key_id: key.public_key for key in keys}


def head_document(answer: GetAuditHeadResponse) -> bytes:
    """Return the document of the newest head: one line, without its end."""
    return document_line(
        HEAD,
        format=FORMAT,
        cluster_id=answer.cluster_id,
        **_head_written(answer.head),
        keys=_keys_written(keys_of(answer.keys)),
    )


def inclusion_document(sequence: int, answer: ProveInclusionResponse, keys: Mapping[str, bytes]) -> bytes:
    """Return the document that proves that a record is in the log: one line, without its end."""
    return document_line(
        INCLUSION,
        format=FORMAT,
        cluster_id=answer.cluster_id,
        sequence=sequence,
        line=answer.line.decode("ascii", errors="replace"),
        head=_head_written(answer.head),
        path=_hexadecimal(answer.path),
        keys=_keys_written(keys),
    )


def consistency_document(answer: ProveConsistencyResponse, keys: Mapping[str, bytes]) -> bytes:
    """Return the document that proves that a later log begins with an earlier one: one line, without its end."""
    earlier = {"from_head": _head_written(answer.from_head)} if answer.HasField("from_head") else {}
    return document_line(
        CONSISTENCY,
        format=FORMAT,
        cluster_id=answer.cluster_id,
        from_size=answer.from_size,
        **earlier,
        to_head=_head_written(answer.to_head),
        path=_hexadecimal(answer.path),
        keys=_keys_written(keys),
    )


def document_line(kind: str, **members: Any) -> bytes:
    """Return an object of this type as one line of JSON in ASCII."""
    return json.dumps({"type": kind, **members}, separators=(",", ":"), ensure_ascii=True).encode("ascii")


@dataclass(frozen=True, slots=True)
class Fields:
    """The members of a document, each asked for with the form that it must have.

    All methods raise CORRUPT for a member that is missing or of another form.
    """

    kind: str
    members: Mapping[str, Any]

    @classmethod
    def of(cls, text: bytes, *kinds: str) -> Fields:
        """Parse a document of one of these types.

        Raises:
            HoldfastError: CORRUPT if it is none.
        """
        try:
            members = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _malformed(kinds[0], "it is no JSON") from error
        if not isinstance(members, dict) or members.get("type") not in kinds:
            raise _malformed(kinds[0], f"it is no object of the type {' or '.join(kinds)}")
        if members.get("format", FORMAT) != FORMAT:
            raise _malformed(kinds[0], f"it has the format {members['format']!r}, and only {FORMAT} is known")
        return cls(members["type"], members)

    def text(self, name: str) -> str:
        """Return a short text of printable ASCII."""
        value = self.members.get(name)
        if not isinstance(value, str) or not (value.isascii() and value.isprintable()):
            raise self._wrong(name)
        if len(value) > ACCESS_TEXT_CHARS_MAX:
            raise self._wrong(name)
        return value

    def line(self) -> bytes:
        """Return a record's line."""
        value = self.members.get("line")
        if not isinstance(value, str) or not value.isascii():
            raise self._wrong("line")
        return value.encode("ascii")

    def number(self, name: str) -> int:
        """Return a size or time."""
        value = self.members.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _NUMBER_MAX:
            raise self._wrong(name)
        return value

    def raw(self, name: str, length: int) -> bytes:
        """Return so many bytes."""
        return self._raw(name, self.members.get(name), length)

    def hashes(self, name: str) -> list[bytes]:
        """Return a list of hashes."""
        return [self._raw(name, each, HASH_BYTES) for each in self._items(name)]

    def keys(self) -> dict[str, bytes]:
        """Return the public keys by id."""
        found: dict[str, bytes] = {}
        for each in self._items("keys"):
            if not isinstance(each, dict):
                raise self._wrong("keys")
            one = Fields(self.kind, each)
            found[one.text("key_id")] = one.raw("public_key", PUBLIC_KEY_BYTES)
        return found

    def head(self, name: str = "") -> SignedHead:
        """Return a head: the member of this name, or the document itself."""
        value = self.members.get(name) if name else self.members
        if not isinstance(value, Mapping):
            raise self._wrong(name)
        one = Fields(self.kind, value)
        return SignedHead(
            size=one.number("size"),
            root=one.raw("root", HASH_BYTES),
            time_unix_ms=one.number("time_unix_ms"),
            key_id=one.text("key_id"),
            signature=one.raw("signature", _SIGNATURE_BYTES),
        )

    def has(self, name: str) -> bool:
        """Whether there is such a member."""
        return name in self.members

    def _items(self, name: str) -> list[Any]:
        value = self.members.get(name)
        if not isinstance(value, list):
            raise self._wrong(name)
        return value

    def _raw(self, name: str, value: object, length: int) -> bytes:
        # No fromhex alone: it takes spaces, and so would read one document in two spellings.
        if not isinstance(value, str) or len(value) != 2 * length:
            raise self._wrong(name)
        try:
            raw = bytes.fromhex(value)
        except ValueError as error:
            raise self._wrong(name) from error
        if len(raw) != length:
            raise self._wrong(name)
        return raw

    def _wrong(self, name: str) -> HoldfastError:
        return _malformed(self.kind, f"{name!r} is missing or of another form")


def _head_written(head: SignedHead) -> dict[str, Any]:
    return {
        "size": head.size,
        "root": head.root.hex(),
        "time_unix_ms": head.time_unix_ms,
        "key_id": head.key_id,
        "signature": head.signature.hex(),
    }


def _keys_written(keys: Mapping[str, bytes]) -> list[dict[str, str]]:
    return [{"key_id": key_id, "public_key": public_key.hex()} for key_id, public_key in sorted(keys.items())]


def _hexadecimal(values: Iterable[bytes]) -> list[str]:
    return [value.hex() for value in values]


_WHAT: Final = {
    LOG: "export of an audit log",
    HEAD: "head of an audit log",
    INCLUSION: "proof about an audit log",
    CONSISTENCY: "proof about an audit log",
}


def _malformed(kind: str, why: str) -> HoldfastError:
    return HoldfastError(ErrorCode.CORRUPT, f"this is no {_WHAT[kind]}: {why}")
