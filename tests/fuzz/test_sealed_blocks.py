"""Sealed blocks from anywhere: only what was sealed ever opens, and nothing worse than CORRUPT happens."""

from __future__ import annotations

import struct

from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from holdfast_core.model.block import HEADER_BYTES, Codec, Kind, block_id, check_form, parse_header, verify, verify_view
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import PLAIN_BYTES_MAX
from tests.fuzz.mutations import mutated, outcome
from tests.model.strategies import ring_of, stream

RING = ring_of("fuzz")
OPENER = RING.opener()
BASE_ID, BASE = bytes(range(32)), stream("base", 2000)
ALLOWED = (ErrorCode.CORRUPT, ErrorCode.KEY_MISMATCH)
"""KEY_MISMATCH: a block of a key epoch that is not here."""

PLAINS = [b"", b"x", b"holdfast " * 200, stream("noise", 700), bytes(1024)]
SEALED = [
    RING.sealer(kind, 1).seal(plain, codec=codec)
    for kind in Kind
    for codec in (Codec.STORED, Codec.LZ4, Codec.ZSTD)
    for plain in PLAINS
]
DELTA = RING.sealer(Kind.VOLUME, 1).seal(BASE[:900] + b"!" + BASE[901:], codec=Codec.ZSTD_DELTA, base=(BASE_ID, BASE))
ALL = [*SEALED, DELTA]


def opened(data: bytes) -> bytes | HoldfastError:
    """What comes out of bytes whose id was made to fit them, which anybody can do."""
    block = verify(block_id(data), data)
    return outcome(lambda: OPENER.open(block, base_plain=BASE, base_id=BASE_ID), *ALLOWED)


def test_all_of_them_open_as_they_are() -> None:
    assert [opened(block.data) for block in SEALED] == PLAINS * (len(SEALED) // len(PLAINS))
    assert DELTA.codec is Codec.ZSTD_DELTA
    assert opened(DELTA.data) == BASE[:900] + b"!" + BASE[901:]


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=400), lead=st.sampled_from([b"", b"HFB1", b"HFB1\x01\x00\x00\x00", DELTA.data[:40]]))
@example(data=b"", lead=b"")
@example(data=bytes(16), lead=b"HFB1")
def test_arbitrary_bytes_never_open(data: bytes, lead: bytes) -> None:
    whole = lead + data
    assert isinstance(opened(whole), HoldfastError)
    for view in (whole, bytearray(whole), memoryview(whole)):
        kind = outcome(lambda view=view: check_form(view), ErrorCode.CORRUPT)  # type: ignore[misc]
        header = outcome(lambda view=view: parse_header(view), ErrorCode.CORRUPT)  # type: ignore[misc]
        assert isinstance(kind, HoldfastError) == isinstance(header, HoldfastError)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(data=st.data(), number=st.integers(0, len(ALL) - 1), donor=st.integers(0, len(ALL) - 1))
def test_a_changed_block_never_opens(data: st.DataObject, number: int, donor: int) -> None:
    good = ALL[number]
    bad = data.draw(mutated(good.data, ALL[donor].data))
    # Splicing may make a whole other block, and that is one.
    assume(all(bad != block.data for block in ALL))
    assert isinstance(opened(bad), HoldfastError)
    for check in (verify, verify_view):
        error = outcome(lambda check=check: check(good.id, bad), ErrorCode.CORRUPT)  # type: ignore[misc]
        assert isinstance(error, HoldfastError)
        assert list(error.block_ids) == [good.id]


@settings(max_examples=150, deadline=None)
@given(
    number=st.integers(0, len(ALL) - 1),
    codec=st.integers(0, 255),
    flags=st.integers(0, 65535),
    plain_bytes=st.sampled_from([0, 1, 699, 700, 701, PLAIN_BYTES_MAX, PLAIN_BYTES_MAX + 1, 2**32 - 1]),
    epoch=st.sampled_from([0, 1, 2, 2**32 - 1]),
)
def test_no_header_but_its_own_opens_a_block(number: int, codec: int, flags: int, plain_bytes: int, epoch: int) -> None:
    good = ALL[number].data
    forged = struct.pack("<4sBBHII", b"HFB1", 1, codec, flags, plain_bytes, epoch) + good[16:]
    assume(forged != good)
    assert isinstance(opened(forged), HoldfastError)
    assert len(forged) >= HEADER_BYTES


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_a_delta_opens_over_the_base_that_it_names_alone(data: st.DataObject) -> None:
    base_id = data.draw(mutated(BASE_ID))
    assume(base_id != BASE_ID)
    error = outcome(lambda: OPENER.open(DELTA, base_plain=BASE, base_id=base_id), ErrorCode.CORRUPT)
    assert isinstance(error, HoldfastError)
    # A wrong base under the right name is the caller's to find, by the fingerprint: only no other exception may come.
    base = data.draw(mutated(BASE))
    plain = outcome(lambda: OPENER.open(DELTA, base_plain=base, base_id=BASE_ID), ErrorCode.CORRUPT)
    assert isinstance(plain, bytes | HoldfastError)
