"""The part of a tenant's keys that sealing takes: what a process gets that seals for another one.

It can fingerprint and seal blocks of one kind under one epoch. It derives nothing, so it holds neither the tenant's
secrets nor what opens, cuts or authenticates anything else. This module loads without the messages that `keys` needs:
a process that seals is started for a single backup, and half of its loading would be theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

from blake3 import blake3

from holdfast_core.model.block import Buffer, Kind, Sealer
from holdfast_core.model.xaes import Xaes


def fingerprint_of(key: bytes, plain: Buffer) -> bytes:
    """Return the 32 bytes that tell whether this plaintext is already known, under a fingerprint key of 32 bytes."""
    return blake3(plain, key=key).digest()


@dataclass(frozen=True, slots=True, repr=False)
class SealingKeys:
    """What seals and fingerprints blocks of one kind. Never log it; its representation names kind and epoch only.

    Attributes:
        kind: of the blocks.
        epoch: of the key.
        cipher_key: 32 bytes.
        nonce_key: 32 bytes.
        fingerprint_key: 32 bytes.
    """

    kind: Kind
    epoch: int
    cipher_key: bytes
    nonce_key: bytes
    fingerprint_key: bytes

    def __repr__(self) -> str:
        return f"SealingKeys(kind={self.kind.name}, epoch={self.epoch})"

    def fingerprint(self, plain: Buffer) -> bytes:
        """Return the fingerprint of a plaintext, as the key ring gives it."""
        return fingerprint_of(self.fingerprint_key, plain)

    def sealer(self) -> Sealer:
        """Return a sealer that makes the blocks that the key ring's would make."""
        return Sealer(kind=self.kind, epoch=self.epoch, cipher=Xaes(self.cipher_key), nonce_key=self.nonce_key)
