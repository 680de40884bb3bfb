"""How far scrubbing came, and where that is kept. Docs: `docs/formats.md`, "scrub.json"."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final, Protocol

from holdfast_core.model.errors import ErrorCode, HoldfastError

_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class ScrubPlace:
    """How far scrubbing came.

    Attributes:
        tenant: the tenant whose blocks are being read.
        after: the last block of it that was read, b"" for none.
        read_blocks: blocks that the round has read.
        corrupt_blocks: those of them that were found corrupt.
        began_unix_ms: Unix time at which the round began, milliseconds; 0 where none is under way.
        ended_unix_ms: Unix time at which the last whole round ended, milliseconds; 0 for never.
        last_began_unix_ms: Unix time at which that round began; 0 for never.
    """

    tenant: int = 0
    after: bytes = b""
    read_blocks: int = 0
    corrupt_blocks: int = 0
    began_unix_ms: int = 0
    ended_unix_ms: int = 0
    last_began_unix_ms: int = 0


class ScrubHome(Protocol):
    """Where the place is kept over restarts."""

    def load_scrub(self) -> ScrubPlace:
        """Return what was saved last, the beginning if nothing was."""
        ...

    def save_scrub(self, place: ScrubPlace) -> None:
        """Save a place, durably."""
        ...


def encode_place(place: ScrubPlace) -> bytes:
    """Return a place as it is saved."""
    fields = {
        "version": _VERSION,
        "tenant": place.tenant,
        "after": place.after.hex(),
        "read_blocks": place.read_blocks,
        "corrupt_blocks": place.corrupt_blocks,
        "began_unix_ms": place.began_unix_ms,
        "ended_unix_ms": place.ended_unix_ms,
        "last_began_unix_ms": place.last_began_unix_ms,
    }
    return json.dumps(fields).encode()


def decode_place(data: bytes) -> ScrubPlace:
    """Read a place that was saved.

    Raises:
        HoldfastError: CORRUPT if it cannot be read.
    """
    try:
        fields = json.loads(data)
        if fields["version"] != _VERSION:
            raise ValueError("another version")
        return ScrubPlace(
            tenant=int(fields["tenant"]),
            after=bytes.fromhex(fields["after"]),
            read_blocks=int(fields["read_blocks"]),
            corrupt_blocks=int(fields["corrupt_blocks"]),
            began_unix_ms=int(fields["began_unix_ms"]),
            ended_unix_ms=int(fields["ended_unix_ms"]),
            last_began_unix_ms=int(fields["last_began_unix_ms"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise HoldfastError(ErrorCode.CORRUPT, "the place of scrubbing cannot be read") from error
