"""Codecs on payloads that are not what they claim: refused before memory is spent, and never wrong in length."""

from __future__ import annotations

import random

import lz4.block
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast_core.model.codecs import Codec, compress, decompress
from holdfast_core.model.errors import ErrorCode, HoldfastError
from tests.model.strategies import stream

TEXT = b"what a payload decodes to " * 40
ZSTD = zstandard.ZstdCompressor(level=1).compress(TEXT)
LZ4 = lz4.block.compress(TEXT, store_size=False)


def refused(payload: bytes, codec: Codec, plain_bytes: int, base: bytes | None = None) -> str:
    """The message with which a payload is refused."""
    with pytest.raises(HoldfastError) as caught:
        decompress(memoryview(payload), codec, plain_bytes=plain_bytes, base=base)
    assert caught.value.code is ErrorCode.CORRUPT
    return caught.value.message


def test_a_frame_that_declares_another_size_is_not_decompressed() -> None:
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(200_000_000))
    assert len(bomb) < 20_000
    assert "declares 200000000 bytes instead of 65536" in refused(bomb, Codec.ZSTD, 65_536)
    assert "declares" in refused(ZSTD, Codec.ZSTD, len(TEXT) - 1)
    assert "declares" in refused(ZSTD, Codec.ZSTD_DELTA, len(TEXT) + 1, b"base")


def test_a_frame_without_a_size_is_refused() -> None:
    unsized = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(TEXT)
    assert "declares" in refused(unsized, Codec.ZSTD, len(TEXT))


def test_a_frame_with_something_after_it_is_refused() -> None:
    assert "does not decompress" in refused(ZSTD + b"x", Codec.ZSTD, len(TEXT))
    assert "does not decompress" in refused(ZSTD + ZSTD, Codec.ZSTD, len(TEXT))


def test_what_is_compressed_quickly_is_an_ordinary_frame_and_hardly_longer() -> None:
    words = [b"block", b"volume", b"snapshot", b"of", b"the", b"a", b"restore", b"node"]
    draw = random.Random(7)
    plain = b" ".join(draw.choices(words, k=10_000))
    for size in (1, 1000, 16 << 10, len(plain)):
        codec, payload = compress(plain[:size], Codec.ZSTD, None, quick=True)
        assert decompress(memoryview(payload), codec, plain_bytes=size, base=None) == plain[:size]
    quick, best = (compress(plain[:65_536], Codec.ZSTD, None, quick=quick)[1] for quick in (True, False))
    assert quick != best
    assert len(quick) < 1.05 * len(best)


def test_an_lz4_block_of_another_size_is_refused() -> None:
    assert "does not decompress" in refused(LZ4, Codec.LZ4, len(TEXT) - 1)
    assert "instead of" in refused(LZ4, Codec.LZ4, len(TEXT) + 1)


def test_a_stored_payload_of_another_size_is_refused() -> None:
    assert "instead of 3" in refused(b"ab", Codec.STORED, 3)


@settings(max_examples=300)
@given(
    junk=st.binary(max_size=200),
    prefix=st.sampled_from([b"", ZSTD[:6], LZ4[:6], ZSTD[:30]]),
    codec=st.sampled_from([Codec.LZ4, Codec.ZSTD, Codec.ZSTD_DELTA]),
    plain_bytes=st.integers(1, 2000),
)
def test_arbitrary_payloads_decode_to_the_right_length_or_are_refused(
    junk: bytes, prefix: bytes, codec: Codec, plain_bytes: int
) -> None:
    base = b"some base" if codec is Codec.ZSTD_DELTA else None
    outcome: ErrorCode | int
    try:
        outcome = len(decompress(memoryview(prefix + junk), codec, plain_bytes=plain_bytes, base=base))
    except HoldfastError as error:
        outcome = error.code
    assert outcome in (plain_bytes, ErrorCode.CORRUPT)


def test_a_delta_that_saves_less_than_a_quarter_is_not_used() -> None:
    base = stream("base", 8000)
    for kept, expected in ((7000, Codec.ZSTD_DELTA), (2500, Codec.ZSTD_DELTA), (1500, Codec.STORED)):
        plain = base[:kept] + stream("new", 8000 - kept)
        assert compress(plain, Codec.ZSTD_DELTA, base)[0] is expected
