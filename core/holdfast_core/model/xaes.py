"""XAES-256-GCM: AES-256-GCM with a 192-bit nonce, as C2SP publishes it (https://c2sp.org/XAES-256-GCM).

From the key and the first half of the nonce a subkey is derived by two AES-CMAC blocks; the subkey and the second half
go to AES-256-GCM. 192 bits let a nonce be a hash of what it protects, which synthetic nonces need (ADR 0001).
Safe to share between threads.
"""

from __future__ import annotations

import threading
from typing import Final, TypeAlias

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from holdfast_core.model.errors import ErrorCode, HoldfastError

Buffer: TypeAlias = bytes | bytearray | memoryview

KEY_BYTES: Final = 32
NONCE_BYTES: Final = 24
TAG_BYTES: Final = 16

_HALF: Final = 12
_COUNTER_1: Final = 0x00015800
_COUNTER_2: Final = 0x00025800
_CMAC_POLYNOMIAL: Final = 0x87


class _PerThread(threading.local):
    """An AES block cipher a thread: a cipher context must not be used by two threads at once."""

    def __init__(self, key: bytes) -> None:
        # ECB over single blocks is the raw AES permutation that CMAC is made of; nothing is encrypted with it. The
        # cipher keeps no state from one block to the next, so one context serves for good.
        self.aes = Cipher(algorithms.AES(key), modes.ECB()).encryptor()


class Xaes:
    """One XAES-256-GCM key."""

    __slots__ = ("_k1_tail", "_local", "_prefix_1", "_prefix_2")

    def __init__(self, key: bytes) -> None:
        """Take a key of 32 bytes."""
        if len(key) != KEY_BYTES:
            raise ValueError(f"an XAES-256-GCM key takes {KEY_BYTES} bytes, not {len(key)}")
        self._local = _PerThread(key)
        block_bits = 128
        doubled = int.from_bytes(self._local.aes.update(bytes(16)), "big") << 1
        carry, k1 = doubled >> block_bits, doubled & ((1 << block_bits) - 1)
        if carry:
            k1 ^= _CMAC_POLYNOMIAL
        tail_bits = _HALF * 8
        head = k1 >> tail_bits
        self._k1_tail = k1 & ((1 << tail_bits) - 1)
        self._prefix_1 = (head ^ _COUNTER_1).to_bytes(4, "big")
        self._prefix_2 = (head ^ _COUNTER_2).to_bytes(4, "big")

    def _subkey(self, nonce: bytes) -> AESGCM:
        tail = (int.from_bytes(nonce[:_HALF], "big") ^ self._k1_tail).to_bytes(_HALF, "big")
        return AESGCM(self._local.aes.update(b"".join((self._prefix_1, tail, self._prefix_2, tail))))

    def encrypt_into(self, nonce: bytes, plain: Buffer, associated: bytes, out: memoryview) -> None:
        """Write ciphertext and tag to `out`, which must have exactly `len(plain) + 16` bytes. Releases the GIL."""
        self._subkey(nonce).encrypt_into(nonce[_HALF:], plain, associated, out)

    def decrypt_into(self, nonce: bytes, sealed: Buffer, associated: bytes, out: memoryview) -> None:
        """Write the plaintext of `sealed` (ciphertext and tag) to `out`, exactly 16 bytes shorter. Releases the GIL.

        Raises:
            HoldfastError: CORRUPT if the tag does not fit. `out` is then worthless.
        """
        try:
            self._subkey(nonce).decrypt_into(nonce[_HALF:], sealed, associated, out)
        except InvalidTag:
            raise _bad_tag() from None

    def encrypt(self, nonce: bytes, plain: Buffer, associated: bytes) -> bytes:
        """Return ciphertext and tag; for small messages, as it allocates."""
        return self._subkey(nonce).encrypt(nonce[_HALF:], plain, associated)

    def decrypt(self, nonce: bytes, sealed: Buffer, associated: bytes) -> bytes:
        """Return the plaintext; for small messages, as it allocates.

        Raises:
            HoldfastError: CORRUPT if the tag does not fit.
        """
        try:
            return self._subkey(nonce).decrypt(nonce[_HALF:], sealed, associated)
        except InvalidTag:
            raise _bad_tag() from None


def _bad_tag() -> HoldfastError:
    return HoldfastError(ErrorCode.CORRUPT, "the bytes do not open under the key they should have been sealed with")
