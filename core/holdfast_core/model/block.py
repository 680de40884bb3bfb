"""Sealed blocks: the unit that nodes keep, and the only ways to hold one (DESIGN section 3, docs/formats.md).

A `SealedBlock` exists because it was sealed here or because its bytes were hashed and found to match its id, so wrong
bytes cannot be passed on as a block; a `SealedView` is the same for bytes that stay where they came in. Nodes use
`verify`, `verify_view` and `check_form` and need no key for any of them.

The nonce is synthetic: the same bytes under the same key give the same block, hence the same id, hence dedup; any
difference, the codec's included, gives another nonce.

Everything here is safe to share between threads, and the heavy parts (codec, cipher, hash) release the GIL.
Leaves out: fingerprints and keys (`keys`), what a block means (`tree`).
"""

from __future__ import annotations

import enum
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, NoReturn

from blake3 import blake3

from holdfast_core.model import codecs
from holdfast_core.model.codecs import Codec
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import BLOCK_ID_BYTES, KIB, MIB, PLAIN_BYTES_MAX, SEALED_BYTES_MAX
from holdfast_core.model.xaes import NONCE_BYTES, TAG_BYTES, Buffer, Xaes

__all__ = [
    "HEADER_BYTES",
    "SEALED_OVERHEAD_BYTES",
    "SEAM_BYTES",
    "BlockHeader",
    "Buffer",
    "Codec",
    "Kind",
    "Opener",
    "SealedBlock",
    "SealedView",
    "Sealer",
    "block_id",
    "check_form",
    "parse_header",
    "sealed_beside",
    "seam",
    "unchanging_view",
    "verify",
    "verify_view",
]

MAGIC: Final = b"HFB1"
SUITE_XAES_256_GCM: Final = 1

_ASSOCIATED = struct.Struct("<4sBBHII")
_ASSOCIATED_BYTES: Final = 16
HEADER_BYTES: Final = _ASSOCIATED_BYTES + NONCE_BYTES
SEAM_BYTES: Final = HEADER_BYTES + TAG_BYTES
SEALED_OVERHEAD_BYTES: Final = HEADER_BYTES + TAG_BYTES
_SCRATCH_KEPT_BYTES_MAX: Final = 1 * MIB


class Kind(enum.IntEnum):
    """What a block holds; nodes confine a capability by it."""

    VOLUME = 0
    APPLICATION = 1
    INDEX = 2


# Plain numbers: to name a member of an enumeration costs more than the comparison, and a node compares every block.
_CODEC_STORED: Final = int(Codec.STORED)
_CODEC_MAX: Final = int(Codec.ZSTD_DELTA)
_KIND_MAX: Final = int(Kind.INDEX)


class _Scratch(threading.local):
    """A buffer a thread to encrypt into, because a fresh one would be zeroed first. Large ones are not kept."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(128 * KIB))

    def take(self, size: int) -> memoryview:
        if size <= len(self.view):
            return self.view
        view = memoryview(bytearray(size))
        if size <= _SCRATCH_KEPT_BYTES_MAX:
            self.view = view
        return view


_scratch = _Scratch()


def block_id(data: Buffer) -> bytes:
    """Return the id of a sealed block: BLAKE3-256 of its bytes."""
    return blake3(data).digest()


@dataclass(frozen=True, slots=True, init=False)
class SealedBlock:
    """A sealed block whose id is known to be the hash of its bytes.

    Made by `Sealer.seal` and `verify` alone, and by `sealed_beside` for what another process of ours has sealed.

    Attributes:
        id: 32 bytes.
        data: the sealed bytes, header to tag.
    """

    id: bytes
    # The id says all that the bytes say, and hashing 64 KiB for a set is dear.
    data: bytes = field(compare=False)

    def __init__(self) -> None:
        raise TypeError("a SealedBlock is made by sealing or by verifying, not by hand")

    def __repr__(self) -> str:
        return f"SealedBlock({self.id.hex()}, {len(self.data)} bytes)"

    @property
    def codec(self) -> Codec:
        """How the block is in fact compressed, which may be less than was asked for."""
        return parse_header(self.data).codec


def _trusted(identity: bytes, data: bytes) -> SealedBlock:
    block = object.__new__(SealedBlock)
    object.__setattr__(block, "id", identity)
    object.__setattr__(block, "data", data)
    return block


def verify(block_id: bytes, data: Buffer) -> SealedBlock:
    """Return the block that `data` is, after hashing it. Says nothing of its form: see `parse_header`.

    Raises:
        HoldfastError: CORRUPT, naming the block, if the hash is not `block_id`.
    """
    # A buffer that someone else may still write is copied before it is hashed, never after.
    own = data if isinstance(data, bytes) else bytes(data)
    if blake3(own).digest() != block_id:
        raise _mismatch(block_id)
    return _trusted(block_id, own)


def seam(data: Buffer) -> bytes:
    """Return the first and the last bytes of a sealed block: its header with the nonce, and its tag."""
    return b"".join((data[:HEADER_BYTES], data[-TAG_BYTES:]))


def sealed_beside(block_id: bytes, data: Buffer, seam_there: bytes) -> SealedBlock:
    """Return the block that another process of this program has sealed, from memory that both share (ADR 0089).

    It is not hashed again: whoever stores it does that. `seam_there` is its `seam` as the other process has it, which
    tells bytes of another block, and of one that was half overwritten.

    Raises:
        HoldfastError: CORRUPT, naming the block, if the bytes have another seam.
    """
    # Copied first, as nobody can change what is looked at then.
    own = bytes(data)
    if seam(own) != seam_there:
        raise HoldfastError(
            ErrorCode.CORRUPT, f"block {block_id.hex()} is not where it was sealed to", block_ids=[block_id]
        )
    return _trusted(block_id, own)


@dataclass(frozen=True, slots=True, init=False)
class SealedView:
    """A sealed block whose id is known to be the hash of its bytes, in a message that keeps them. See `verify_view`.

    For those who pass a block on at once: it keeps the whole message alive.

    Attributes:
        id: 32 bytes.
        data: the sealed bytes, header to tag, which nobody can change.
    """

    id: bytes
    data: memoryview = field(compare=False)

    def __init__(self) -> None:
        raise TypeError("a SealedView is made by verifying, not by hand")

    def __repr__(self) -> str:
        return f"SealedView({self.id.hex()}, {len(self.data)} bytes)"


def unchanging_view(data: Buffer) -> memoryview:
    """Return a view of bytes that nobody can change: of `data` itself if it is `bytes`, else of a copy.

    That a view is read-only says nothing of what it looks at: a read-only view of a bytearray changes with it.
    """
    view = memoryview(data)
    return view if type(view.obj) is bytes and view.c_contiguous else memoryview(bytes(view))


def verify_view(block_id: bytes, data: Buffer) -> SealedView:
    """As `verify`, without a copy of what nobody can change (see `unchanging_view`).

    Raises:
        HoldfastError: CORRUPT, naming the block, if the hash is not `block_id`.
    """
    own = unchanging_view(data)
    if blake3(own).digest() != block_id:
        raise _mismatch(block_id)
    view = object.__new__(SealedView)
    object.__setattr__(view, "id", block_id)
    object.__setattr__(view, "data", own)
    return view


def _mismatch(block_id: bytes) -> HoldfastError:
    return HoldfastError(
        ErrorCode.CORRUPT, f"block {block_id.hex()} has bytes that do not match its id", block_ids=[block_id]
    )


@dataclass(frozen=True, slots=True)
class BlockHeader:
    """What a sealed block says of itself in the clear.

    Attributes:
        suite: cipher suite, always 1.
        codec: how the plaintext is compressed.
        kind: what the block holds.
        plain_bytes: length of the plaintext.
        key_epoch: epoch of the key that it is sealed under.
        nonce: 24 bytes.
    """

    suite: int
    codec: Codec
    kind: Kind
    plain_bytes: int
    key_epoch: int
    nonce: bytes


def parse_header(data: Buffer) -> BlockHeader:
    """Check the form of a sealed block and return its header. Needs no key, so it says nothing of the content.

    Raises:
        HoldfastError: as `check_form`.
    """
    suite, codec, kind, plain_bytes, key_epoch = _checked_fields(data)
    nonce = bytes(data[_ASSOCIATED_BYTES:HEADER_BYTES])
    return BlockHeader(suite, Codec(codec), Kind(kind), plain_bytes, key_epoch, nonce)


def check_form(data: Buffer) -> int:
    """Check the form of a sealed block and return the number of its kind: what a node asks of every block it takes.

    Raises:
        HoldfastError: CORRUPT if this is no well-formed sealed block: magic, suite, codec, flags, epoch or length are
            not what docs/formats.md allows.
    """
    return _checked_fields(data)[2]


def _checked_fields(data: Buffer) -> tuple[int, int, int, int, int]:
    """Return suite, codec, kind, plain bytes and key epoch of a block whose form is right."""
    size = len(data)
    if size < SEALED_OVERHEAD_BYTES or size > SEALED_BYTES_MAX:
        _malformed(f"it has {size} bytes")
    magic, suite, codec, flags, plain_bytes, key_epoch = _ASSOCIATED.unpack_from(data)
    if magic != MAGIC:
        _malformed("its magic is wrong")
    if suite != SUITE_XAES_256_GCM:
        _malformed(f"its cipher suite {suite} is unknown")
    if codec > _CODEC_MAX:
        _malformed(f"its codec {codec} is unknown")
    if flags > _KIND_MAX:
        _malformed(f"its flags {flags:#06x} are unknown")
    if key_epoch == 0:
        _malformed("its key epoch is 0")
    if plain_bytes > PLAIN_BYTES_MAX:
        _malformed(f"it claims {plain_bytes} plain bytes")
    payload_bytes = size - SEALED_OVERHEAD_BYTES
    if codec == _CODEC_STORED:
        if payload_bytes != plain_bytes:
            _malformed("its length is not what its header says")
    elif not 0 < payload_bytes < plain_bytes:
        _malformed("it is compressed to no less than its plain bytes")
    # No other flag is known, so the kind is all that is left of them.
    return suite, codec, flags, plain_bytes, key_epoch


def _malformed(reason: str) -> NoReturn:
    raise HoldfastError(ErrorCode.CORRUPT, f"this is no well-formed sealed block: {reason}")


class Sealer:
    """Seals plaintext of one kind under one key epoch."""

    __slots__ = ("_cipher", "_epoch", "_kind", "_nonce_key")

    def __init__(self, *, kind: Kind, epoch: int, cipher: Xaes, nonce_key: bytes) -> None:
        self._kind = kind
        self._epoch = epoch
        self._cipher = cipher
        self._nonce_key = nonce_key

    def seal(self, plain: Buffer, *, codec: Codec, base: tuple[bytes, Buffer] | None = None) -> SealedBlock:
        """Compress and seal `plain` (at most 4 MiB), which must not change meanwhile.

        A codec never grows a block: what does not shrink is stored. With ZSTD_DELTA, `base` is the id and plaintext
        of the block to code against; the delta is used if it is at most three quarters of plain Zstandard, else the
        block is plain Zstandard, or stored. `SealedBlock.codec` tells which came about. The base must not itself be
        a delta and must be of the same key epoch; that is the caller's to know.

        Raises:
            HoldfastError: LIMIT_EXCEEDED if `plain` is larger than a block may be.
            ValueError: ZSTD_DELTA without a base, or a base with another codec.
        """
        data = bytes(self._sealed(plain, codec, base, _scratch.take))
        return _trusted(blake3(data).digest(), data)

    def seal_into(self, plain: Buffer, out: memoryview, *, codec: Codec) -> tuple[bytes, int]:
        """As `seal`, into the beginning of `out`: returns the block's id and its length.

        `out` has `SEALED_OVERHEAD_BYTES` more than `plain`, and nobody else writes it meanwhile.

        Raises:
            HoldfastError: LIMIT_EXCEEDED if `plain` is larger than a block may be.
        """
        data = self._sealed(plain, codec, None, lambda _: out)
        return blake3(data).digest(), len(data)

    def _sealed(
        self, plain: Buffer, codec: Codec, base: tuple[bytes, Buffer] | None, room: Callable[[int], memoryview]
    ) -> memoryview:
        """Seal into the beginning of what `room` gives for a number of bytes."""
        size = len(plain)
        if size > PLAIN_BYTES_MAX:
            raise HoldfastError(
                ErrorCode.LIMIT_EXCEEDED, f"a block takes at most {PLAIN_BYTES_MAX} plain bytes, not {size}"
            )
        if (codec is Codec.ZSTD_DELTA) != (base is not None):
            raise ValueError("a base goes with the codec ZSTD_DELTA, and with no other")
        # Volumes are the most, and live as long as their VM. What outlives it is compressed as well as level 1 can.
        quick = self._kind is Kind.VOLUME
        used, payload = codecs.compress(plain, codec, base[1] if base is not None else None, quick=quick)
        associated = _ASSOCIATED.pack(MAGIC, SUITE_XAES_256_GCM, used, self._kind, size, self._epoch)
        bound = associated + base[0] if used is Codec.ZSTD_DELTA and base is not None else associated
        # One contiguous message: hashing in two parts misaligns BLAKE3's chunks, which costs more than the copy.
        message = b"".join((bound, payload))
        nonce = blake3(message, key=self._nonce_key).digest(NONCE_BYTES)
        total = SEALED_OVERHEAD_BYTES + len(payload)
        out = room(total)
        out[:_ASSOCIATED_BYTES] = associated
        out[_ASSOCIATED_BYTES:HEADER_BYTES] = nonce
        self._cipher.encrypt_into(nonce, memoryview(message)[len(bound) :], bound, out[HEADER_BYTES:total])
        return out[:total]


class Opener:
    """Opens blocks of every kind and epoch that it has keys for."""

    __slots__ = ("_data_ciphers", "_structure_ciphers")

    def __init__(self, *, data_ciphers: Mapping[int, Xaes], structure_ciphers: Mapping[int, Xaes]) -> None:
        """Take ciphers by key epoch; no data ciphers where the data secret is withheld."""
        self._data_ciphers = data_ciphers
        self._structure_ciphers = structure_ciphers

    def open(self, block: SealedBlock, *, base_plain: Buffer | None = None, base_id: bytes = b"") -> bytes:
        """Return the plaintext. The caller still compares its fingerprint: a delta opened over wrong base bytes
        decodes to wrong plaintext that nothing here can see.

        Args:
            block: the block.
            base_plain: plaintext of the base of a delta-coded block; not looked at for others.
            base_id: id of that base.

        Raises:
            HoldfastError: CORRUPT if the form is wrong, the tag does not fit, the payload does not decompress to
                exactly what the header says, or a delta's base is not given; KEY_MISMATCH if there is no key of its
                kind and epoch here.
        """
        data = block.data
        try:
            header = parse_header(data)
            cipher = self._cipher(header)
            associated = data[:_ASSOCIATED_BYTES]
            base: Buffer | None = None
            if header.codec is Codec.ZSTD_DELTA:
                if base_plain is None or len(base_id) != BLOCK_ID_BYTES:
                    _malformed("it is delta-coded, but no base is named for it")
                associated += base_id
                base = base_plain
            payload_bytes = len(data) - SEALED_OVERHEAD_BYTES
            payload = _scratch.take(payload_bytes)[:payload_bytes]
            cipher.decrypt_into(header.nonce, memoryview(data)[HEADER_BYTES:], associated, payload)
            return codecs.decompress(payload, header.codec, plain_bytes=header.plain_bytes, base=base)
        except HoldfastError as error:
            raise HoldfastError(
                error.code, f"block {block.id.hex()}: {error.message}", facts=error.facts, block_ids=[block.id]
            ) from None

    def _cipher(self, header: BlockHeader) -> Xaes:
        structure = header.kind is Kind.INDEX
        cipher = (self._structure_ciphers if structure else self._data_ciphers).get(header.key_epoch)
        if cipher is None:
            secret = "structure" if structure else "data"
            raise HoldfastError(
                ErrorCode.KEY_MISMATCH, f"there is no {secret} key of epoch {header.key_epoch} here to open it with"
            )
        return cipher
