"""How the command ends: an exit code that scripts can rely on, and one plain line on stderr."""

from __future__ import annotations

import sys
from types import MappingProxyType
from typing import Final

from holdfast_core.model.errors import ErrorCode, HoldfastError

DONE: Final = 0
FAILED: Final = 1
USAGE: Final = 2
NOT_FOUND: Final = 3
REFUSED: Final = 4
UNAVAILABLE: Final = 5
DAMAGED: Final = 6
NO_ACCESS: Final = 7
INTERRUPTED: Final = 130

EXIT_BY_CODE: Final = MappingProxyType(
    {
        ErrorCode.INVALID_ARGUMENT: USAGE,
        ErrorCode.LIMIT_EXCEEDED: USAGE,
        ErrorCode.NOT_FOUND: NOT_FOUND,
        ErrorCode.ALREADY_EXISTS: REFUSED,
        ErrorCode.MISMATCH: REFUSED,
        ErrorCode.NO_PARENT: REFUSED,
        ErrorCode.BUSY: REFUSED,
        ErrorCode.SESSION_LAPSED: REFUSED,
        ErrorCode.CONFLICT: REFUSED,
        ErrorCode.TARGET_EXISTS: REFUSED,
        ErrorCode.VOLUME_CHANGED: REFUSED,
        ErrorCode.WRONG_EPOCH: REFUSED,
        ErrorCode.UNREACHABLE: UNAVAILABLE,
        ErrorCode.NO_QUORUM: UNAVAILABLE,
        ErrorCode.NOT_READY: UNAVAILABLE,
        ErrorCode.DISK_FULL: UNAVAILABLE,
        ErrorCode.CORRUPT: DAMAGED,
        ErrorCode.MISSING: DAMAGED,
        ErrorCode.NOT_DURABLE: DAMAGED,
        ErrorCode.QUOTA_EXCEEDED: REFUSED,
        ErrorCode.UNAUTHENTICATED: NO_ACCESS,
        ErrorCode.DENIED: NO_ACCESS,
        ErrorCode.KEY_MISMATCH: NO_ACCESS,
        ErrorCode.SOURCE_UNREADABLE: FAILED,
        ErrorCode.TARGET_UNWRITABLE: FAILED,
        ErrorCode.CANCELLED: FAILED,
        ErrorCode.INTERNAL: FAILED,
    }
)


def exit_code(error: HoldfastError) -> int:
    """Return the exit code that tells a script what kind of error it was."""
    return EXIT_BY_CODE[error.code]


def say(text: str) -> None:
    """Write one line to stderr, marked as ours; line breaks within `text` become spaces."""
    sys.stderr.write(f"holdfast: {' '.join(text.split())}\n")
    sys.stderr.flush()
