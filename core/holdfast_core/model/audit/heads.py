"""Signed heads of the audit log: what they sign, who signs and who checks (docs/formats.md, "Audit log").

A head says that the log of a cluster had so many records with such a root at such a time. It is signed with Ed25519.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from holdfast_core.model.audit.merkle import HASH_BYTES
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_proto.v1.audit_pb2 import SignedHead

PUBLIC_KEY_BYTES: Final = 32

_PURPOSE: Final = b"holdfast v1 audit head\0"
_NUMBERS: Final = struct.Struct("<QQ")
_NUMBER_MAX: Final = 2**64 - 1


def head_input(cluster_id: str, size: int, time_unix_ms: int, root: bytes) -> bytes:
    """Return the bytes that a head's signature is over.

    Args:
        cluster_id: name of the cluster, so that one cluster's head is not another's.
        size: records below the head.
        time_unix_ms: when it was signed.
        root: 32 bytes.

    Raises:
        HoldfastError: CORRUPT if no head can have these values.
    """
    if not (0 <= size <= _NUMBER_MAX and 0 <= time_unix_ms <= _NUMBER_MAX) or len(root) != HASH_BYTES:
        raise HoldfastError(ErrorCode.CORRUPT, f"no head of an audit log can have size {size} and this time and root")
    # The root has a fixed length and an id never holds a zero byte, so no two heads share these bytes.
    return _PURPOSE + cluster_id.encode() + b"\0" + _NUMBERS.pack(size, time_unix_ms) + root


class HeadSigner:
    """Signs heads of one cluster's log.

    Attributes:
        key_id: name of the key, in every head.
    """

    def __init__(self, key_id: str, private_key: bytes, cluster_id: str) -> None:
        """`private_key` is 32 raw bytes of an Ed25519 seed; it is never shown."""
        self.key_id = key_id
        self._key = Ed25519PrivateKey.from_private_bytes(private_key)
        self._cluster_id = cluster_id

    def __repr__(self) -> str:
        return f"HeadSigner({self.key_id!r})"

    @property
    def public_key(self) -> bytes:
        """32 raw bytes of the Ed25519 public key, for `HeadVerifier`."""
        return self._key.public_key().public_bytes_raw()

    def sign(self, *, size: int, root: bytes, time_unix_ms: int) -> SignedHead:
        """Return the signed head over the first `size` records, whose tree has `root` (32 bytes).

        Raises:
            HoldfastError: CORRUPT if no head can have these values.
        """
        signature = self._key.sign(head_input(self._cluster_id, size, time_unix_ms, root))
        return SignedHead(size=size, root=root, time_unix_ms=time_unix_ms, key_id=self.key_id, signature=signature)


class HeadVerifier:
    """Checks heads of one cluster's log against the keys that are trusted."""

    def __init__(self, cluster_id: str, keys: Mapping[str, bytes]) -> None:
        """`keys` are raw Ed25519 public keys of 32 bytes by key id.

        Raises:
            HoldfastError: CORRUPT if one of them is no key.
        """
        self._cluster_id = cluster_id
        self._keys: dict[str, Ed25519PublicKey] = {}
        for key_id, public_key in keys.items():
            self.trust(key_id, public_key)

    def trust(self, key_id: str, public_key: bytes) -> None:
        """Accept heads that this key signs, from now on.

        Raises:
            HoldfastError: CORRUPT if it is no key, or another key has this id already.
        """
        try:
            key = Ed25519PublicKey.from_public_bytes(public_key)
        except ValueError as error:
            raise HoldfastError(ErrorCode.CORRUPT, f"the public key {key_id} is no Ed25519 key of 32 bytes") from error
        if self._keys.setdefault(key_id, key) != key:
            raise HoldfastError(ErrorCode.CORRUPT, f"there are two public keys with the id {key_id}")

    def trusts(self, key_id: str) -> bool:
        """Whether heads that name this key are accepted if their signature is right."""
        return key_id in self._keys

    def check(self, head: SignedHead) -> None:
        """Check a head's signature.

        Raises:
            HoldfastError: CORRUPT if its key is not trusted or did not sign it for this cluster.
        """
        key = self._keys.get(head.key_id)
        if key is None:
            raise HoldfastError(
                ErrorCode.CORRUPT, f"the head at size {head.size} is signed with the key {head.key_id!r}, not trusted"
            )
        covered = head_input(self._cluster_id, head.size, head.time_unix_ms, head.root)
        try:
            key.verify(head.signature, covered)
        except InvalidSignature as error:
            raise HoldfastError(
                ErrorCode.CORRUPT,
                f"the signature of the head at size {head.size} is not that of the key {head.key_id!r} "
                f"for the cluster {self._cluster_id}",
            ) from error
