"""Sealed blocks: whatever goes in comes out, and nothing that was changed ever does."""

from __future__ import annotations

import dataclasses
import itertools
import struct
import threading

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast_core.model import codecs
from holdfast_core.model.block import (
    SEALED_OVERHEAD_BYTES,
    Codec,
    Kind,
    SealedBlock,
    SealedView,
    block_id,
    check_form,
    parse_header,
    sealed_beside,
    seam,
    unchanging_view,
    verify,
    verify_view,
)
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.keys import KeyRing, TenantSecrets
from holdfast_core.model.limits import PLAIN_BYTES_MAX
from tests.model.strategies import contents, ring_of, secrets_of, stream

RING = ring_of("blocks")
OPENER = RING.opener()
PLAIN_CODECS = [Codec.STORED, Codec.LZ4, Codec.ZSTD]
BASE_ID = bytes(range(32))


def seal(plain: bytes, codec: Codec = Codec.ZSTD, kind: Kind = Kind.VOLUME) -> SealedBlock:
    """Seal under epoch 1 of the tests' tenant."""
    return RING.sealer(kind, 1).seal(plain, codec=codec)


def refuse(data: bytes) -> HoldfastError:
    """The error with which bytes are refused that were changed together with their id."""
    with pytest.raises(HoldfastError) as caught:
        OPENER.open(verify(block_id(data), data))
    return caught.value


@settings(max_examples=150, deadline=None)
@given(plain=contents(), codec=st.sampled_from(PLAIN_CODECS), kind=st.sampled_from(Kind))
def test_any_bytes_survive(plain: bytes, codec: Codec, kind: Kind) -> None:
    block = seal(plain, codec, kind)
    assert OPENER.open(verify(block.id, block.data)) == plain
    header = parse_header(block.data)
    assert (header.kind, header.plain_bytes, header.key_epoch) == (kind, len(plain), 1)
    assert header.codec in (codec, Codec.STORED)
    assert len(block.data) <= len(plain) + SEALED_OVERHEAD_BYTES
    assert block.id == blake3(block.data).digest()


@settings(max_examples=60, deadline=None)
@given(plain=contents(), codec=st.sampled_from(PLAIN_CODECS), beyond=st.integers(0, 100))
def test_a_block_is_the_same_wherever_it_is_sealed_to(plain: bytes, codec: Codec, beyond: int) -> None:
    room = memoryview(bytearray(b"x" * (len(plain) + SEALED_OVERHEAD_BYTES + beyond)))
    identity, length = RING.sealer(Kind.VOLUME, 1).seal_into(plain, room, codec=codec)
    block = seal(plain, codec)
    assert (identity, bytes(room[:length])) == (block.id, block.data)
    assert bytes(room[length:]).strip(b"x") == b""
    assert sealed_beside(identity, room[:length], seam(block.data)) == block
    if plain:
        with pytest.raises(ValueError, match="buffer"):
            RING.sealer(Kind.VOLUME, 1).seal_into(plain, room[: length - 1], codec=codec)


@settings(max_examples=60, deadline=None)
@given(plain=contents(), edit=st.binary(min_size=1, max_size=30), place=st.integers(0, 2**20))
def test_any_bytes_survive_as_a_delta(plain: bytes, edit: bytes, place: int) -> None:
    at = place % (len(plain) + 1)
    base = plain[:at] + edit + plain[at:]
    block = RING.sealer(Kind.VOLUME, 1).seal(plain, codec=Codec.ZSTD_DELTA, base=(BASE_ID, base))
    assert OPENER.open(block, base_plain=base, base_id=BASE_ID) == plain
    if block.codec is not Codec.ZSTD_DELTA:
        assert OPENER.open(block) == plain


@settings(max_examples=200, deadline=None)
@given(data=st.data(), codec=st.sampled_from([Codec.STORED, Codec.LZ4, Codec.ZSTD]))
def test_any_flipped_bit_is_refused(data: st.DataObject, codec: Codec) -> None:
    block = seal(b"some text, " * 30 + stream("flip", 100), codec)
    bit = data.draw(st.integers(0, 8 * len(block.data) - 1))
    flipped = bytearray(block.data)
    flipped[bit // 8] ^= 1 << bit % 8
    with pytest.raises(HoldfastError) as caught:
        verify(block.id, flipped)
    assert caught.value.code is ErrorCode.CORRUPT
    assert caught.value.block_ids == (block.id,)
    # Even if the id is made to fit, the bytes do not open.
    assert refuse(bytes(flipped)).code in (ErrorCode.CORRUPT, ErrorCode.KEY_MISMATCH)


@settings(max_examples=100, deadline=None)
@given(junk=st.binary(max_size=200))
def test_arbitrary_bytes_are_no_block(junk: bytes) -> None:
    with pytest.raises(HoldfastError) as caught:
        parse_header(b"HFB1\x01" + junk)
    assert caught.value.code is ErrorCode.CORRUPT


@pytest.mark.parametrize("size", [1, 16 * 1024, 65_536, 1_000_003, PLAIN_BYTES_MAX])
@pytest.mark.parametrize("codec", PLAIN_CODECS)
def test_every_size_and_codec(size: int, codec: Codec) -> None:
    for plain in (stream("size", size), bytes(size)):
        assert OPENER.open(seal(plain, codec)) == plain


def test_an_empty_block_is_stored() -> None:
    block = seal(b"")
    assert block.codec is Codec.STORED
    assert OPENER.open(block) == b""


def test_a_block_above_the_limit_is_refused() -> None:
    with pytest.raises(HoldfastError) as caught:
        seal(bytes(PLAIN_BYTES_MAX + 1))
    assert caught.value.code is ErrorCode.LIMIT_EXCEEDED


def test_a_codec_never_grows_a_block() -> None:
    noise = stream("incompressible", 65_536)
    stored = seal(noise, Codec.STORED)
    for codec in (Codec.LZ4, Codec.ZSTD):
        assert seal(noise, codec) == stored
        assert seal(bytes(65_536), codec).codec is codec


def test_the_same_bytes_make_the_same_block() -> None:
    plain = b"the same " * 1000
    assert seal(plain) == seal(plain)
    assert seal(memoryview(bytearray(plain))) == seal(plain)  # type: ignore[arg-type]


def test_any_difference_makes_another_nonce() -> None:
    secrets = secrets_of("nonces")
    ring = KeyRing(
        dataclasses.replace(
            secrets,
            data_epochs={**secrets.data_epochs, 2: bytes(32)},
            structure_epochs={**secrets.structure_epochs, 2: bytes(32)},
        )
    )
    plain = b"a line of text\n" * 500
    kinds, epochs, codecs = list(Kind), [1, 2], PLAIN_CODECS
    blocks = [
        ring.sealer(kind, epoch).seal(plain, codec=codec)
        for kind, epoch, codec in itertools.product(kinds, epochs, codecs)
    ]
    blocks.append(ring.sealer(Kind.VOLUME, 1).seal(plain + b"x", codec=Codec.ZSTD))
    blocks.append(ring_of("another").sealer(Kind.VOLUME, 1).seal(plain, codec=Codec.ZSTD))
    assert len({parse_header(block.data).nonce for block in blocks}) == len(blocks)


def test_the_nonce_is_the_keyed_hash_of_all_that_is_protected() -> None:
    plain = stream("nonce", 100)
    secrets = secrets_of("blocks")
    nonce_key = blake3(secrets.data_epochs[1], derive_key_context="holdfast v1 data nonce key").digest()
    block = seal(plain, Codec.STORED)
    assert parse_header(block.data).nonce == blake3(block.data[:16] + plain, key=nonce_key).digest(24)


@pytest.mark.parametrize("kind", list(Kind))
def test_volumes_are_compressed_quickly_and_all_else_well(kind: Kind) -> None:
    plain = b" ".join(b"%d times a word" % (number * number % 1009) for number in range(5000))[:65_536]
    wanted = codecs.compress(plain, Codec.ZSTD, None, quick=kind is Kind.VOLUME)[1]
    other = codecs.compress(plain, Codec.ZSTD, None, quick=kind is not Kind.VOLUME)[1]
    assert len(wanted) != len(other)
    assert len(seal(plain, kind=kind).data) == len(wanted) + SEALED_OVERHEAD_BYTES


def test_a_delta_is_used_only_where_it_saves_a_quarter() -> None:
    sealer = RING.sealer(Kind.VOLUME, 1)
    base = stream("base", 65_536)
    edited = base[:30_000] + stream("edit", 4096) + base[34_096:]
    block = sealer.seal(edited, codec=Codec.ZSTD_DELTA, base=(BASE_ID, base))
    assert block.codec is Codec.ZSTD_DELTA
    assert len(block.data) < 6000
    unrelated = sealer.seal(edited, codec=Codec.ZSTD_DELTA, base=(BASE_ID, stream("other", 65_536)))
    assert unrelated == seal(edited, Codec.STORED)


def test_a_delta_reaches_back_over_the_whole_of_a_large_base() -> None:
    base = stream("large base", PLAIN_BYTES_MAX)
    edited = stream("fresh", 1000) + base[1000:]
    block = RING.sealer(Kind.VOLUME, 1).seal(edited, codec=Codec.ZSTD_DELTA, base=(BASE_ID, base))
    assert len(block.data) < 100_000
    assert OPENER.open(block, base_plain=base, base_id=BASE_ID) == edited


def test_the_same_edit_over_two_bases_has_two_ids() -> None:
    sealer = RING.sealer(Kind.VOLUME, 1)
    base = stream("base", 10_000)
    blocks = [sealer.seal(base + b"x", codec=Codec.ZSTD_DELTA, base=(name * 32, base)) for name in (b"a", b"b")]
    assert blocks[0].codec is Codec.ZSTD_DELTA
    assert blocks[0].id != blocks[1].id
    assert OPENER.open(blocks[0], base_plain=base, base_id=b"a" * 32) == base + b"x"
    for base_id in (b"b" * 32, b"", b"a" * 31):
        with pytest.raises(HoldfastError) as caught:
            OPENER.open(blocks[0], base_plain=base, base_id=base_id)
        assert caught.value.code is ErrorCode.CORRUPT
        assert caught.value.block_ids == (blocks[0].id,)


def test_a_base_goes_with_the_delta_codec_alone() -> None:
    sealer = RING.sealer(Kind.VOLUME, 1)
    with pytest.raises(ValueError, match="ZSTD_DELTA"):
        sealer.seal(b"x", codec=Codec.ZSTD_DELTA)
    with pytest.raises(ValueError, match="ZSTD_DELTA"):
        sealer.seal(b"x", codec=Codec.ZSTD, base=(BASE_ID, b"x"))


def test_a_block_is_not_made_by_hand() -> None:
    with pytest.raises(TypeError, match="by hand"):
        SealedBlock()
    block = seal(b"x")
    with pytest.raises(dataclasses.FrozenInstanceError):
        block.data = b"y"  # type: ignore[misc]


def test_a_buffer_that_is_verified_is_copied_first() -> None:
    block = seal(b"stays as it was")
    shared = bytearray(block.data)
    held = verify(block.id, memoryview(shared))
    shared[50] ^= 1
    assert held == block


def test_a_view_is_kept_of_bytes_and_of_nothing_else() -> None:
    block = seal(b"stays where it is")
    message = b"before" + block.data + b"after"
    held = verify_view(block.id, memoryview(message)[6:-5])
    assert held.data.obj is message
    assert held.id == block.id
    assert held.data == block.data


@pytest.mark.parametrize("read_only", [False, True])
def test_what_may_change_is_copied_before_it_is_hashed(read_only: bool) -> None:
    block = seal(b"stays as it was")
    shared = bytearray(block.data)
    given = memoryview(shared).toreadonly() if read_only else memoryview(shared)
    held = verify_view(block.id, given)
    kept = unchanging_view(given)
    shared[50] ^= 1
    assert held.data == kept == block.data
    assert held.data.readonly


def test_bytes_that_do_not_lie_together_are_copied() -> None:
    block = seal(b"every other byte")
    spread = bytes(byte for byte in block.data for _ in range(2))
    held = verify_view(block.id, memoryview(spread)[::2])
    assert held.data == block.data
    assert held.data.c_contiguous


def test_a_view_of_other_bytes_is_refused() -> None:
    block = seal(b"this and nothing else")
    with pytest.raises(HoldfastError) as caught:
        verify_view(block.id, block.data[:-1] + b"?")
    assert (caught.value.code, caught.value.block_ids) == (ErrorCode.CORRUPT, (block.id,))


def test_a_view_is_not_made_by_hand() -> None:
    with pytest.raises(TypeError, match="by hand"):
        SealedView()
    block = seal(b"x")
    with pytest.raises(dataclasses.FrozenInstanceError):
        verify_view(block.id, block.data).data = memoryview(b"y")  # type: ignore[misc]


@given(kind=st.sampled_from(Kind))
def test_the_form_tells_the_kind(kind: Kind) -> None:
    assert check_form(memoryview(seal(b"of a kind", kind=kind).data)) == kind


@pytest.mark.parametrize(
    ("what", "offset", "value"),
    [
        ("magic", 0, b"HFB2"),
        ("suite", 4, b"\x02"),
        ("codec", 5, b"\x04"),
        ("compressed to no less", 5, b"\x01"),
        ("kind", 6, b"\x03"),
        ("flag", 6, b"\x04"),
        ("high flag", 7, b"\x80"),
        ("plain bytes", 8, struct.pack("<I", 99)),
        ("too many plain bytes", 8, struct.pack("<I", PLAIN_BYTES_MAX + 1)),
        ("epoch", 12, bytes(4)),
    ],
)
def test_malformed_headers_are_refused(what: str, offset: int, value: bytes) -> None:
    good = seal(bytes(100), Codec.STORED).data
    assert parse_header(good).plain_bytes == 100, what
    bad = good[:offset] + value + good[offset + len(value) :]
    for look in (parse_header, check_form):
        with pytest.raises(HoldfastError) as caught:
            look(bad)
        assert caught.value.code is ErrorCode.CORRUPT


@pytest.mark.parametrize("size", [0, 4, 55, PLAIN_BYTES_MAX + 5 * 1024])
def test_impossible_lengths_are_refused(size: int) -> None:
    for look in (parse_header, check_form):
        with pytest.raises(HoldfastError) as caught:
            look(seal(bytes(100)).data.ljust(size, b"\0")[:size])
        assert caught.value.code is ErrorCode.CORRUPT


def test_unknown_epochs_and_withheld_secrets_do_not_open() -> None:
    secrets = secrets_of("blocks")
    later = TenantSecrets(7, bytes(32), {2: bytes(32)}, bytes(32), {2: bytes(32)})
    for ring in (KeyRing(secrets.without_data()), KeyRing(later)):
        with pytest.raises(HoldfastError) as caught:
            ring.opener().open(seal(b"x"))
        assert caught.value.code is ErrorCode.KEY_MISMATCH
        with pytest.raises(HoldfastError) as caught:
            ring.sealer(Kind.VOLUME, 1)
        assert caught.value.code is ErrorCode.KEY_MISMATCH
    assert KeyRing(secrets.without_data()).opener().open(seal(b"node", kind=Kind.INDEX)) == b"node"


def test_another_tenants_key_does_not_open() -> None:
    with pytest.raises(HoldfastError) as caught:
        ring_of("another").opener().open(seal(b"x"))
    assert caught.value.code is ErrorCode.CORRUPT


@pytest.mark.slow
def test_threads_do_not_disturb_each_other() -> None:
    failures: list[int] = []

    def work(number: int) -> None:
        for turn in range(60):
            plain = stream(f"{number} {turn}", 3000) + bytes(number * 1000)
            codec = PLAIN_CODECS[turn % 3]
            if OPENER.open(seal(plain, codec)) != plain:
                failures.append(turn)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
