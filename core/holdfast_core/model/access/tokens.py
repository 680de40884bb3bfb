"""What is kept of an API token: a hash, from which nobody gets back to the token.

The secret is 32 random bytes, so one pass of a fast hash is enough; nothing is there to be guessed.
"""

from __future__ import annotations

import hmac
from typing import Final

from blake3 import blake3

CONTEXT_TOKEN: Final = "holdfast v1 api token"
TOKEN_HASH_BYTES: Final = 32


def token_hash(secret: bytes) -> bytes:
    """Return what is kept of a token's secret bytes: 32 bytes."""
    return blake3(secret, derive_key_context=CONTEXT_TOKEN).digest()


def proves(secret: bytes, kept: bytes) -> bool:
    """Return whether a secret is the one that a hash was kept of; takes the same time wherever they differ."""
    return hmac.compare_digest(token_hash(secret), kept)
