"""Every error that Holdfast tells a caller, with a stable code and whether trying again can help.

Missing, corrupt, unreachable and refused are different answers; nobody has to read the message to tell them apart.
How a code crosses the wire is `holdfast_core.runtime.status`'s business, how it becomes an exit code the command's.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence


class ErrorCode(enum.Enum):
    """Stable names of errors. The name is what travels."""

    INVALID_ARGUMENT = "the request itself is wrong"
    NOT_FOUND = "there is no such thing in this tenant"
    ALREADY_EXISTS = "the name is taken by something different"
    MISMATCH = "the things named do not belong together"
    NO_PARENT = "no living point descends from the snapshot"
    BUSY = "another session holds the VM"
    SESSION_LAPSED = "the session has ended or was taken over"
    VOLUME_CHANGED = "the source changed while it was read"
    SOURCE_UNREADABLE = "the source could not be read"
    TARGET_EXISTS = "the restore target is not empty"
    TARGET_UNWRITABLE = "the restore target could not be written"
    CONFLICT = "something else changed first"
    WRONG_EPOCH = "the layout is older than the newest one known"
    NOT_DURABLE = "blocks that were named are not on enough owners"
    MISSING = "no owner that answered has the block"
    CORRUPT = "bytes do not match their hash or their key"
    UNREACHABLE = "too few nodes or no coordinator answered"
    NO_QUORUM = "fewer owners than the write quorum took the block"
    NOT_READY = "the cluster is not ready for this yet"
    DISK_FULL = "a node has no space left for blocks"
    UNAUTHENTICATED = "no valid credential came with the call"
    DENIED = "the credential does not allow this"
    QUOTA_EXCEEDED = "the tenant's quota does not allow this"
    LIMIT_EXCEEDED = "a limit of holdfast_core.model.limits was passed"
    KEY_MISMATCH = "the key does not fit what it should open"
    CANCELLED = "the caller gave up"
    INTERNAL = "a fault of Holdfast"


_RETRYABLE = frozenset(
    {
        ErrorCode.BUSY,
        ErrorCode.CONFLICT,
        ErrorCode.WRONG_EPOCH,
        ErrorCode.UNREACHABLE,
        ErrorCode.NO_QUORUM,
        ErrorCode.NOT_READY,
    }
)


class HoldfastError(Exception):
    """Base of all errors a caller may see.

    Attributes:
        code: what kind of error it is.
        message: one plain sentence that says what happened and, where that helps, what to do.
        retryable: whether the same call may succeed later without a change by the caller.
        facts: details for programs, text to text.
        block_ids: blocks that the error is about, as 32 raw bytes each.
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        *,
        facts: Mapping[str, str] | None = None,
        block_ids: Sequence[bytes] = (),
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retryable = code in _RETRYABLE
        self.facts: dict[str, str] = dict(facts or {})
        self.block_ids: tuple[bytes, ...] = tuple(block_ids)

    def __str__(self) -> str:
        return self.message

    def __repr__(self) -> str:
        return f"HoldfastError({self.code.name}, {self.message!r})"
