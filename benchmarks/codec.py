"""Which codec should be the default: yield and cost of each on 64 KiB blocks of the benchmark's image, on one core.

Sealing and opening are measured whole (codec, nonce, cipher, hash), since that is what a client does with a block; the
codec alone is measured beside it. Zstandard-3 is measured too, to show what it would give; blocks never use it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import lz4.block
import zstandard

from benchmarks.spans import data_blocks
from holdfast_core.model.block import Codec, Kind
from holdfast_core.model.keys import KeyRing, generate_secrets

BLOCK_BYTES: Final = 64 * 1024
_Step = Callable[[bytes], bytes]


@dataclass(frozen=True, slots=True)
class CodecFigures:
    """What one codec does with the sample; rates in MB of plaintext a second and core, 0 where it was not measured.

    Attributes:
        name: of the codec.
        ratio: plaintext bytes a stored byte, blocks that do not shrink stored as they are.
        compress_mb_s: the codec alone.
        decompress_mb_s: the codec alone.
        seal_mb_s: compress, derive the nonce, encrypt, hash.
        open_mb_s: parse, decrypt, decompress.
    """

    name: str
    ratio: float
    compress_mb_s: float
    decompress_mb_s: float
    seal_mb_s: float
    open_mb_s: float


def sample_blocks(image: Path, *, every: int) -> list[bytes]:
    """Every so-many-th block of the image that is not zero."""
    return [block for at, (_, block) in enumerate(data_blocks(image, BLOCK_BYTES)) if at % every == 0]


def measure_codecs(blocks: Sequence[bytes]) -> list[CodecFigures]:
    """Measure every codec on `blocks`, with keys made up for it."""
    ring = KeyRing(generate_secrets(0, lambda count: bytes(range(count))))
    fast, better = zstandard.ZstdCompressor(level=1), zstandard.ZstdCompressor(level=3)
    unpack = zstandard.ZstdDecompressor()

    def lz4_pack(block: bytes) -> bytes:
        packed: bytes = lz4.block.compress(block, store_size=False)
        return packed

    def lz4_unpack(packed: bytes) -> bytes:
        plain: bytes = lz4.block.decompress(packed, uncompressed_size=BLOCK_BYTES)
        return plain

    return [
        _measure("stored", blocks, ring, Codec.STORED, None, None),
        _measure("lz4", blocks, ring, Codec.LZ4, lz4_pack, lz4_unpack),
        _measure("zstd-1", blocks, ring, Codec.ZSTD, fast.compress, unpack.decompress),
        _measure("zstd-3", blocks, ring, None, better.compress, unpack.decompress),
    ]


def _measure(
    name: str, blocks: Sequence[bytes], ring: KeyRing, codec: Codec | None, pack: _Step | None, unpack: _Step | None
) -> CodecFigures:
    # Results are dropped block by block: kept, their fresh memory would cost more than the codec.
    clocks = {step: _Stopwatch() for step in ("compress", "decompress", "seal", "open")}
    sealer, opener = ring.sealer(Kind.VOLUME, 1), ring.opener()
    stored = 0
    for block in blocks:
        small = block
        if pack is not None and unpack is not None:
            with clocks["compress"]:
                small = pack(block)
            if len(small) < len(block):
                with clocks["decompress"]:
                    unpack(small)
        stored += min(len(small), len(block))
        if codec is not None:
            with clocks["seal"]:
                sealed = sealer.seal(block, codec=codec)
            with clocks["open"]:
                opener.open(sealed)
    plain = sum(len(block) for block in blocks)
    rates = {step: plain / 1e6 / clock.seconds if clock.seconds else 0.0 for step, clock in clocks.items()}
    return CodecFigures(
        name=name,
        ratio=plain / stored,
        compress_mb_s=rates["compress"],
        decompress_mb_s=rates["decompress"],
        seal_mb_s=rates["seal"],
        open_mb_s=rates["open"],
    )


class _Stopwatch:
    """Adds up the CPU seconds of this thread inside its `with` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.thread_time()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.thread_time() - self._start
