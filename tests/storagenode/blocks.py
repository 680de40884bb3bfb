"""Real sealed blocks to store, the same ones for the same arguments."""

from __future__ import annotations

import functools
import hashlib

from holdfast_core.model.block import Codec, Kind, SealedBlock, Sealer
from holdfast_core.model.keys import KeyRing, generate_secrets

KINDS = frozenset({0, 1, 2})


@functools.cache
def _sealer(kind: Kind) -> Sealer:
    ring = KeyRing(generate_secrets(1, lambda size: hashlib.shake_128(b"test secrets").digest(size)))
    return ring.sealer(kind, 1)


def make_block(number: int, size: int = 1000, kind: Kind = Kind.VOLUME) -> SealedBlock:
    """Return a block of `size` incompressible plain bytes."""
    plain = hashlib.shake_128(f"block {number}".encode()).digest(size)
    return _sealer(kind).seal(plain, codec=Codec.STORED)


def make_blocks(count: int, size: int = 1000, first: int = 0) -> list[SealedBlock]:
    """Return `count` blocks, numbered from `first`."""
    return [make_block(first + number, size) for number in range(count)]


def partition_of(block_id: bytes) -> int:
    """Return the partition of an id among 16: enough to have several, few enough to share them."""
    return block_id[0] >> 4


def flip(path_bytes: bytes, needle: bytes, *, at: int = 0) -> bytes:
    """Return `path_bytes` with one bit flipped in every place where `needle` stands, `at` bytes into it."""
    changed = bytearray(path_bytes)
    position = path_bytes.find(needle)
    assert position >= 0, "what is to be damaged is not there"
    while position >= 0:
        changed[position + at] ^= 1
        position = path_bytes.find(needle, position + 1)
    return bytes(changed)
