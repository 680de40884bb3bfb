"""How blocks are compressed: stored, LZ4 block, Zstandard level 1, Zstandard with a predecessor as dictionary.

A codec never grows a block, and a decoder never makes more bytes than the block's header promised: the size that a
Zstandard frame declares is read before anything is decompressed, because a declared size overrides every other bound.
Compression contexts are not thread-safe, so each thread has its own. All of it releases the GIL.
"""

from __future__ import annotations

import enum
import functools
import threading
from typing import Final

import lz4.block
import zstandard

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.xaes import Buffer

ZSTD_LEVEL: Final = 1
# The shortest repetition that is worth a reference where speed counts most: what level 1 itself takes above 256 KiB; it
# takes 6 below (ADR 0136).
_QUICK_MATCH_BYTES_MIN: Final = 7
# The table of positions has an entry for each 8 bytes of a base: with half of them, half of the base is forgotten; with
# twice as many, filling the table takes a third longer and finds nothing more (measured on pages of a database, noise).
_DELTA_BYTES_A_POSITION_LOG: Final = 3
_DELTA_HASH_LOG_MIN: Final = 11


class Codec(enum.IntEnum):
    """How the payload of a block is coded."""

    STORED = 0
    LZ4 = 1
    ZSTD = 2
    ZSTD_DELTA = 3


class _Contexts(threading.local):
    """Zstandard contexts of one thread."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=False)
        # What is not named is the level's own, as the length of what is compressed has it.
        self.quick_compressor = zstandard.ZstdCompressor(
            compression_params=zstandard.ZstdCompressionParameters(
                compression_level=ZSTD_LEVEL,
                min_match=_QUICK_MATCH_BYTES_MIN,
                write_content_size=True,
                write_checksum=False,
            )
        )
        self.decompressor = zstandard.ZstdDecompressor()


_contexts = _Contexts()


def compress(plain: Buffer, codec: Codec, base: Buffer | None, *, quick: bool = False) -> tuple[Codec, Buffer]:
    """Return the codec that came about and the payload; stored where `codec` would not make it shorter.

    `quick` has Zstandard take a fifteenth less time, for some 2 % more bytes.
    """
    if codec is Codec.STORED or len(plain) == 0:
        return Codec.STORED, plain
    if codec is Codec.LZ4:
        payload: bytes = lz4.block.compress(plain, store_size=False)
    else:
        compressor = _contexts.quick_compressor if quick else _contexts.compressor
        payload = compressor.compress(plain)
        if codec is Codec.ZSTD_DELTA and base is not None:
            codec = Codec.ZSTD
            delta = _compress_delta(plain, base)
            # A delta costs a second read when it is opened, so it has to save at least a quarter of what is stored.
            if 4 * len(delta) <= 3 * min(len(payload), len(plain)):
                codec, payload = Codec.ZSTD_DELTA, delta
    if len(payload) >= len(plain):
        return Codec.STORED, plain
    return codec, payload


def _compress_delta(plain: Buffer, base: Buffer) -> bytes:
    dictionary = zstandard.ZstdCompressionDict(bytes(base), dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    parameters = _delta_parameters(len(plain), len(base))
    return zstandard.ZstdCompressor(dict_data=dictionary, compression_params=parameters).compress(plain)


@functools.lru_cache(maxsize=64)
def _delta_parameters(plain_bytes: int, base_bytes: int) -> zstandard.ZstdCompressionParameters:
    # Level 1 is made for small windows: both its reach and its table of positions must grow with the base, or most of a
    # large base is forgotten before it is looked at.
    return zstandard.ZstdCompressionParameters.from_level(
        ZSTD_LEVEL,
        source_size=plain_bytes,
        dict_size=base_bytes,
        window_log=max(zstandard.WINDOWLOG_MIN, (plain_bytes + base_bytes).bit_length()),
        hash_log=max(_DELTA_HASH_LOG_MIN, (base_bytes - 1).bit_length() - _DELTA_BYTES_A_POSITION_LOG),
        write_content_size=True,
        write_checksum=False,
        write_dict_id=False,
    )


def decompress(payload: memoryview, codec: Codec, *, plain_bytes: int, base: Buffer | None) -> bytes:
    """Return the plaintext, exactly `plain_bytes` long; `base` is the dictionary of a delta.

    Raises:
        HoldfastError: CORRUPT if the payload does not decode to exactly that many bytes.
    """
    try:
        if codec is Codec.STORED:
            plain = bytes(payload)
        elif codec is Codec.LZ4:
            plain = lz4.block.decompress(payload, uncompressed_size=plain_bytes)
        else:
            plain = _decompress_zstd(payload, plain_bytes=plain_bytes, base=base)
    except (zstandard.ZstdError, lz4.block.LZ4BlockError) as error:
        raise HoldfastError(ErrorCode.CORRUPT, f"its payload does not decompress: {error}") from error
    if len(plain) != plain_bytes:
        raise HoldfastError(
            ErrorCode.CORRUPT, f"its payload decompresses to {len(plain)} bytes instead of {plain_bytes}"
        )
    return plain


def _decompress_zstd(payload: memoryview, *, plain_bytes: int, base: Buffer | None) -> bytes:
    declared = zstandard.frame_content_size(payload)
    if declared != plain_bytes:
        raise HoldfastError(ErrorCode.CORRUPT, f"its payload declares {declared} bytes instead of {plain_bytes}")
    if base is None:
        decompressor = _contexts.decompressor
    else:
        dictionary = zstandard.ZstdCompressionDict(bytes(base), dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        decompressor = zstandard.ZstdDecompressor(dict_data=dictionary)
    return decompressor.decompress(payload, max_output_size=plain_bytes, allow_extra_data=False)
