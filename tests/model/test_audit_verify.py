"""An export passes exactly if it is what was signed, and the first record that is not is named."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast_core.model.audit.export import HeadLine, LogLine, export_lines, is_record
from holdfast_core.model.audit.merkle import Frontier, leaf_hash
from holdfast_core.model.audit.record import AuditRecord
from holdfast_core.model.audit.verify import verify_export
from holdfast_core.model.errors import ErrorCode, HoldfastError
from tests.model.audit_logs import CLUSTER_ID, Log, grown, record, rotated, signer

LOG = grown()
EXPORT = LOG.export()
KEY = LOG.keys["audit-1"]
ROTATED = rotated()

# Lines of EXPORT, without the first: a record's place, or None for a head.
PLACES = [None if not is_record(line) else AuditRecord.from_line(line).sequence for line in EXPORT[1:]]


def named(lines: Iterable[bytes], **options: Any) -> tuple[str, str]:
    """The first record that is not right and what is wrong with it, as the error says."""
    error = failure(lines, **options)
    assert error.code is ErrorCode.CORRUPT
    assert f"record {error.facts['sequence']}" in error.message
    return error.facts["sequence"], error.facts["what"]


def failure(lines: Iterable[bytes], **options: Any) -> HoldfastError:
    """The error that verification ends with."""
    options.setdefault("trusted", [KEY])
    with pytest.raises(HoldfastError) as caught:
        verify_export(lines, **options)
    return caught.value


def at(place: int) -> int:
    """Where a record's line stands in EXPORT."""
    return 1 + PLACES.index(place)


def head_of(place: int) -> int:
    """Where the line of the head over a record's batch stands in EXPORT."""
    return 1 + PLACES.index(None, PLACES.index(place))


def batch_first(place: int) -> int:
    """The first record of a record's batch."""
    return max(batch.first for batch in LOG.batches if batch.first <= place)


def batch_last(place: int) -> int:
    """The last record of a record's batch."""
    return min(batch.head.size for batch in LOG.batches if batch.head.size > place) - 1


def without(lines: list[bytes], *places: int) -> list[bytes]:
    """The lines but for those."""
    return [line for number, line in enumerate(lines) if number not in places]


def replaced(lines: list[bytes], place: int, line: bytes) -> list[bytes]:
    """The lines with one replaced."""
    return [*lines[:place], line, *lines[place + 1 :]]


def test_what_was_signed_passes() -> None:
    for end in ("", "\n"):
        found = verify_export([line + end.encode() for line in EXPORT], trusted=[KEY, bytes(32)])
        assert (found.first, found.records, found.head, found.key) == (0, 10, LOG.head(10), KEY)
        assert (found.self_trusted, found.cluster_id) == (False, CLUSTER_ID)
    assert verify_export(EXPORT).self_trusted
    for number, batch in enumerate(LOG.batches):
        part = verify_export(LOG.export(number), trusted=[KEY])
        assert (part.first, part.records) == (batch.first, 10 - batch.first)


@pytest.mark.parametrize("place", range(10))
def test_every_byte_of_a_record_counts(place: int) -> None:
    line = EXPORT[at(place)]
    for byte in range(len(line)):
        changed = line[:byte] + bytes([line[byte] ^ 1]) + line[byte + 1 :]
        assert named(replaced(EXPORT, at(place), changed)) == (str(place), "altered")
    assert named(replaced(EXPORT, at(place), line + b" ")) == (str(place), "altered")
    assert failure(replaced(EXPORT, at(place), b"")).facts.keys() == {"sequence", "what"}


@pytest.mark.parametrize("place", range(10))
def test_every_removed_record_is_named(place: int) -> None:
    for count in range(1, 10 - place):
        lines = without(EXPORT, *(at(each) for each in range(place, place + count)))
        assert named(lines) == (str(place), "missing")
        assert named(lines, trusted=()) == (str(place), "missing")


def test_every_swap_of_two_records_is_named() -> None:
    for one in range(10):
        for other in range(one + 1, 10):
            lines = list(EXPORT)
            lines[at(one)], lines[at(other)] = lines[at(other)], lines[at(one)]
            assert named(lines) == (str(one), "reordered")


def test_every_moved_record_is_named() -> None:
    for one in range(10):
        for other in range(10):
            if one != other:
                lines = without(EXPORT, at(one))
                lines.insert(at(other), EXPORT[at(one)])
                assert named(lines) == (str(min(one, other)), "reordered")


@pytest.mark.parametrize("place", range(10))
def test_every_inserted_line_is_named(place: int) -> None:
    for line in (record(place, principal="mallory").to_line(), b"", b"{", *(EXPORT[at(each)] for each in range(10))):
        lines = [*EXPORT[: at(place)], line, *EXPORT[at(place) :]]
        # Of a record and its copy beside it, the second is the one too many.
        assert named(lines) == (str(place + (line == EXPORT[at(place)])), "inserted")


def test_batches_taken_out_or_swapped() -> None:
    one, other = EXPORT[1 : head_of(0) + 1], EXPORT[head_of(0) + 1 : head_of(3) + 1]
    rest = EXPORT[head_of(3) + 1 :]
    assert named([EXPORT[0], *other, *rest]) == ("0", "missing")
    assert named([EXPORT[0], *one, *rest]) == ("3", "missing")
    assert named([EXPORT[0], *other, *one, *rest]) == ("0", "reordered")
    assert named([EXPORT[0], *one, *one, *other, *rest]) == ("3", "inserted")
    assert named([EXPORT[0], *one, *other, *one, *rest]) == ("4", "forged-head")


def test_a_head_may_be_taken_out_unless_it_is_the_last() -> None:
    heads = [1 + number for number, place in enumerate(PLACES) if place is None]
    for head in heads[:-1]:
        assert verify_export(without(EXPORT, head), trusted=[KEY]).records == 10
    assert verify_export(without(EXPORT, *heads[:-1]), trusted=[KEY]).records == 10
    assert named(without(EXPORT, heads[-1])) == ("8", "unsigned")
    assert named(EXPORT[:1]) == ("0", "unsigned")
    # Without its head a record's hashes are not vouched for, and yet the record is named by the places in the lines.
    for place in range(8):
        lines = without(EXPORT, head_of(place))
        assert named(without(lines, at(place))) == (str(place), "missing")
        assert named([*lines[: at(place)], b"{}", *lines[at(place) :]]) == (str(place), "inserted")
        assert named(replaced(lines, at(place), b"{}")) == (str(place), "altered")


def test_a_file_that_was_cut_off() -> None:
    whole = b"\n".join(EXPORT)
    ends = {len(b"\n".join(EXPORT[: head_of(batch.first) + 1])): batch.head.size for batch in LOG.batches}
    for length in range(len(EXPORT[0]) + 1, len(whole) + 1, 7):
        lines = whole[:length].split(b"\n")
        size = max((size for end, size in ends.items() if end <= length), default=0)
        if length not in ends and length - 1 not in ends:
            assert named(lines)[0] == str(size)
    for end, size in ends.items():
        lines = whole[:end].split(b"\n")
        assert verify_export(lines, trusted=[KEY]).records == size
        if size < 10:
            assert named(lines, known_head=LOG.head(10)) == (str(size), "missing")


def changed_head(line: bytes, **members: Any) -> bytes:
    """A head's line with members replaced."""
    fields = json.loads(line)
    fields.update(members)
    return json.dumps(fields, separators=(",", ":")).encode()


@pytest.mark.parametrize("place", [0, 3, 4, 8])
def test_forged_heads_are_named(place: int) -> None:
    line = EXPORT[head_of(place)]
    older, fields = LOG.batches[0].head, json.loads(line)
    for members in (
        {"size": fields["size"] + 1},
        {"root": bytes(32).hex()},
        {"time_unix_ms": fields["time_unix_ms"] + 1},
        {"signature": bytes(64).hex()},
        {"signature": "00"},
        {"size": True},
        {"size": -1},
        {"size": 2**70},
        {"key_id": "audit-2"},
        {"key_id": "\ud800"},
        {"leaves": 7},
        {"leaves": ["00"]},
        {"leaves": ["0 " * 32]},
        {"type": "tail"},
    ):
        assert named(replaced(EXPORT, head_of(place), changed_head(line, **members))) == (str(place), "forged-head")
    for other in (signer("audit-1", 1), signer("audit-9")):
        fields["signature"] = other.sign(size=10, root=bytes(32), time_unix_ms=1).signature.hex()
        forged = changed_head(line, signature=fields["signature"], key_id=other.key_id)
        assert named(replaced(EXPORT, head_of(place), forged)) == (str(place), "forged-head")
    if place:
        back = HeadLine(older, [leaf_hash(each) for each in LOG.batches[0].lines]).to_line()
        what = "inserted" if older.size == place else "forged-head"
        assert named(replaced(EXPORT, head_of(place), back)) == (str(place), what)


def test_what_stands_beside_a_head_proves_nothing() -> None:
    for place in range(10):
        line = EXPORT[head_of(place)]
        wrong = changed_head(line, leaves=[bytes(32).hex()])
        assert verify_export(replaced(EXPORT, head_of(place), wrong), trusted=[KEY]).records == 10
        # A record that is replaced together with its hash: that it is one of its batch is all that can be told.
        forged = record(place, principal="mallory").to_line()
        leaves = json.loads(line)["leaves"]
        leaves[place - batch_first(place)] = leaf_hash(forged).hex()
        lines = replaced(replaced(EXPORT, at(place), forged), head_of(place), changed_head(line, leaves=leaves))
        assert named(lines) == (str(batch_first(place)), "altered")
        assert failure(lines).facts["last"] == str(batch_last(place))
        other = record(place + 1, principal="mallory").to_line()
        assert named(replaced(lines, at(place), other))[0] == str(place)


def test_time_does_not_run_backwards() -> None:
    log = Log()
    log.append(2)
    log.append(2)
    tree = log.frontiers[2]
    log.batches[1].head.CopyFrom(log.signer.sign(size=4, root=tree.root, time_unix_ms=1))
    assert named(log.export()) == ("2", "forged-head")


def test_signed_records_stand_where_they_say() -> None:
    for wrong in (record(1).to_line(), record(3).to_line(), b"no record"):
        tree = Frontier().extended(map(leaf_hash, (record(0).to_line(), wrong)))
        log = grown((2,))
        log.batches[0].lines[1] = wrong
        log.batches[0].head.CopyFrom(log.signer.sign(size=2, root=tree.root, time_unix_ms=1))
        if wrong == record(1).to_line():
            assert verify_export(log.export(), trusted=[KEY]).records == 2
        else:
            assert named(log.export()) == ("1", "altered")


def test_keys_follow_one_another_in_the_log() -> None:
    export, first = ROTATED.export(), ROTATED.keys["audit-1"]
    assert verify_export(export, trusted=[first]).records == ROTATED.size
    assert verify_export(export).key == first
    assert verify_export(ROTATED.export(2)).key == ROTATED.keys["audit-2"]
    assert verify_export(ROTATED.export(2), trusted=[ROTATED.keys["audit-2"]]).first == 4
    assert named(ROTATED.export(2), trusted=[first]) == ("4", "forged-head")
    assert named(export, trusted=[ROTATED.keys["audit-2"]]) == ("0", "forged-head")
    # A key that no record introduces is not trusted, whatever the file's first line says.
    log = rotated()
    log.signer = signer("audit-9")
    log.append(2)
    assert named(log.export(), trusted=[first]) == (str(ROTATED.size), "forged-head")


@pytest.mark.parametrize(
    ("outcome", "key_id", "key", "place"),
    [
        ("OK", "audit-2", signer("audit-2").public_key, ""),
        ("DENIED", "audit-2", signer("audit-2").public_key, "1"),
        ("OK", "", signer("audit-2").public_key, "1"),
        ("OK", "audit-2", b"short", "1"),
        ("OK", "audit-1", signer("audit-2").public_key, "0"),
    ],
)
def test_what_introduces_a_key(outcome: str, key_id: str, key: bytes, place: str) -> None:
    """A record does that was not denied, names a whole key, and does not take the id of another."""
    log = Log()
    details = {"key_id": key_id, "public_key": key.hex()}
    log.append(1, action="keys.rotate-audit", outcome=outcome, details=details)
    log.signer = signer("audit-2")
    log.append(1)
    if place:
        assert named(log.export()) == (place, "forged-head")
    else:
        assert verify_export(log.export(), trusted=[KEY]).records == 2


@pytest.mark.parametrize("details", [{}, {"key_id": "audit-2"}, {"key_id": "audit-2", "public_key": "no"}])
def test_a_record_that_introduces_nothing_is_no_fault(details: dict[str, str]) -> None:
    log = Log()
    log.append(1, action="keys.rotate-audit", details=details)
    assert verify_export(log.export(), trusted=[KEY]).records == 1


def test_a_whole_log_made_anew_passes_only_where_its_own_key_is_trusted() -> None:
    log = Log(signer("audit-1", 5))
    log.append(10)
    assert verify_export(log.export()).self_trusted
    assert named(log.export()) == ("0", "forged-head")
    assert named(log.export(), trusted=(), known_head=LOG.head(4)) == ("4", "forged-head")


def test_another_clusters_log_is_refused() -> None:
    opening = LogLine("d2" * 16, Frontier(), LOG.keys).to_line()
    assert named([opening, *EXPORT[1:]]) == ("0", "forged-head")


def test_the_log_contains_heads_that_were_kept() -> None:
    for batch in LOG.batches:
        assert verify_export(EXPORT, trusted=[KEY], known_head=batch.head).records == 10
    for size in range(11):
        head = LOG.signer.sign(size=size, root=LOG.root(size), time_unix_ms=1)
        assert verify_export(EXPORT, trusted=[KEY], known_head=head).records == 10
        other = LOG.signer.sign(size=size, root=bytes(32), time_unix_ms=1)
        assert named(EXPORT, known_head=other) == ("0", "altered")
    assert named(LOG.export(1), known_head=LOG.signer.sign(size=3, root=bytes(32), time_unix_ms=1)) == ("3", "altered")
    later = grown((3, 1, 4, 2, 5)).head(15)
    assert named(EXPORT, known_head=later) == ("10", "missing")
    with pytest.raises(HoldfastError) as caught:
        verify_export(LOG.export(2), trusted=[KEY], known_head=LOG.head(3))
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT


def opening_with(**members: Any) -> bytes:
    """An export's first line with members replaced."""
    return changed_head(EXPORT[0], **members)


@pytest.mark.parametrize(
    "opening",
    [
        b"",
        b"[]",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        EXPORT[1],
        EXPORT[head_of(0)],
        opening_with(format=2),
        opening_with(first=-1),
        opening_with(first=1),
        opening_with(first=1.5),
        opening_with(frontier=[bytes(32).hex()]),
        opening_with(frontier="00"),
        opening_with(keys=["x"]),
        opening_with(keys=[{"key_id": "audit-1", "public_key": "00"}]),
        opening_with(keys=[{"key_id": "audit-1", "public_key": "é" * 64}]),
        opening_with(cluster_id="a\0b"),
        opening_with(cluster_id="\ud800"),
    ],
)
def test_what_is_no_export(opening: bytes) -> None:
    with pytest.raises(HoldfastError) as caught:
        verify_export([opening, *EXPORT[1:]], trusted=[KEY])
    assert (caught.value.code, caught.value.facts) == (ErrorCode.CORRUPT, {})


def test_an_export_of_another_beginning_is_named() -> None:
    part = LOG.export(1)
    moved = changed_head(part[0], first=5)
    assert json.loads(part[0])["first"] == 3
    assert named([moved, *part[1:]]) == ("5", "forged-head")
    assert named([changed_head(part[0], frontier=[bytes(32).hex()] * 2), *part[1:]]) == ("3", "altered")
    with pytest.raises(HoldfastError) as caught:
        list(export_lines(LOG.messages()[:1]))
    assert caught.value.code is ErrorCode.NOT_FOUND


@given(st.data())
def test_no_change_of_records_passes(data: st.DataObject) -> None:
    lines = list(EXPORT)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(lines) - 1))
        line = lines[place]
        start = data.draw(st.integers(0, len(line)))
        end = data.draw(st.integers(start, min(len(line), start + 8)))
        lines[place] = line[:start] + data.draw(st.binary(max_size=8)) + line[end:]
    flat = b"\n".join(lines).split(b"\n")
    same = [line for line in flat if is_record(line)] == LOG.lines
    assert outcome(flat) in (None if same else ErrorCode.CORRUPT, ErrorCode.CORRUPT)


def outcome(lines: Iterable[bytes]) -> ErrorCode | None:
    """The code of the error about an export, None if it passes."""
    try:
        verify_export(lines, trusted=[KEY])
    except HoldfastError as error:
        return error.code
    return None
