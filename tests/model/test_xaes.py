"""XAES-256-GCM against the vectors that C2SP publishes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.xaes import Xaes

NONCE = b"ABCDEFGHIJKLMNOPQRSTUVWX"
PLAIN = b"XAES-256-GCM"
ACCUMULATED_10_000 = "e6b9edf2df6cec60c8cbd864e2211b597fb69a529160cd040d56c0c210081939"


@pytest.mark.parametrize(
    ("key", "associated", "sealed"),
    [
        (b"\x01" * 32, b"", "ce546ef63c9cc60765923609b33a9a1974e96e52daf2fcf7075e2271"),
        (b"\x03" * 32, b"c2sp.org/XAES-256-GCM", "986ec1832593df5443a179437fd083bf3fdb41abd740a21f71eb769d"),
    ],
    ids=["most significant bit of L clear", "most significant bit of L set"],
)
def test_published_vector(key: bytes, associated: bytes, sealed: str) -> None:
    cipher = Xaes(key)
    assert cipher.encrypt(NONCE, PLAIN, associated).hex() == sealed
    assert cipher.decrypt(NONCE, bytes.fromhex(sealed), associated) == PLAIN
    out = bytearray(len(PLAIN) + 16)
    cipher.encrypt_into(NONCE, PLAIN, associated, memoryview(out))
    assert out.hex() == sealed
    plain = bytearray(len(PLAIN))
    cipher.decrypt_into(NONCE, out, associated, memoryview(plain))
    assert plain == PLAIN


def shake_stream() -> Iterator[int]:
    """The bytes of SHAKE-128 over an empty input, which hashlib can only give all at once."""
    yield from hashlib.shake_128(b"").digest(4_000_000)


def test_accumulated_vector_of_10_000_iterations() -> None:
    source = shake_stream()

    def take(count: int) -> bytes:
        return bytes(next(source) for _ in range(count))

    digest = hashlib.shake_128()
    for _ in range(10_000):
        key, nonce = take(32), take(24)
        plain = take(take(1)[0])
        associated = take(take(1)[0])
        cipher = Xaes(key)
        sealed = cipher.encrypt(nonce, plain, associated)
        digest.update(sealed)
        assert cipher.decrypt(nonce, sealed, associated) == plain
    assert digest.hexdigest(32) == ACCUMULATED_10_000


def test_a_key_has_32_bytes() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Xaes(b"short")


def test_a_wrong_tag_is_corrupt() -> None:
    cipher = Xaes(b"\x01" * 32)
    sealed = bytearray(cipher.encrypt(NONCE, PLAIN, b""))
    sealed[-1] ^= 1
    with pytest.raises(HoldfastError) as allocating:
        cipher.decrypt(NONCE, sealed, b"")
    with pytest.raises(HoldfastError) as into:
        cipher.decrypt_into(NONCE, sealed, b"", memoryview(bytearray(len(PLAIN))))
    assert allocating.value.code is into.value.code is ErrorCode.CORRUPT
