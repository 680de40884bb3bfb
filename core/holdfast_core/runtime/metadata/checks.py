"""The rules every metadata store applies to what it is given, so that both engines refuse the same things.

etcd's defaults set the limits (128 operations a transaction, 1.5 MiB a request); the embedded engine could take more,
but a deployment must be able to move from one to the other.
"""

from __future__ import annotations

from collections.abc import Sequence

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import (
    METADATA_KEY_BYTES_MAX,
    METADATA_LEASE_TTL_S_MAX,
    METADATA_PAGE_ITEMS_MAX,
    METADATA_PREFIXES_MAX,
    METADATA_TXN_BYTES_MAX,
    METADATA_TXN_OPERATIONS_MAX,
    METADATA_VALUE_BYTES_MAX,
)
from holdfast_core.runtime.metadata.store import (
    Absent,
    Condition,
    CreateRevisionIs,
    Exists,
    ModRevisionIs,
    Operation,
    Put,
)


def key_bytes(key: str) -> bytes:
    """Return the key as it is stored.

    Raises:
        HoldfastError: INVALID_ARGUMENT if it is empty or not text; LIMIT_EXCEEDED above `METADATA_KEY_BYTES_MAX` bytes.
    """
    if not key:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "a metadata key is empty")
    return prefix_bytes(key)


def prefix_bytes(prefix: str) -> bytes:
    """Return the prefix as bytes; it may be empty. Raises as `key_bytes`."""
    try:
        data = prefix.encode()
    except UnicodeEncodeError as error:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"the metadata key {prefix!r} is not Unicode text") from error
    if len(data) > METADATA_KEY_BYTES_MAX:
        raise HoldfastError(
            ErrorCode.LIMIT_EXCEEDED, f"a metadata key has {len(data)} bytes; {METADATA_KEY_BYTES_MAX} are allowed"
        )
    return data


def range_end(prefix: bytes) -> bytes:
    """Return the smallest byte string above everything that begins with `prefix`, b"" if there is none.

    UTF-8 never holds the byte 0xff, so raising the last byte always works, except for the empty prefix.
    """
    return prefix[:-1] + bytes([prefix[-1] + 1]) if prefix else b""


def covering_prefixes(prefixes: Sequence[str]) -> list[bytes]:
    """Return the prefixes sorted and without those that another one covers, so that each key is met once.

    Raises:
        HoldfastError: INVALID_ARGUMENT for none at all; LIMIT_EXCEEDED for more than `METADATA_PREFIXES_MAX`;
            as `key_bytes`.
    """
    if not prefixes:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "a snapshot of the metadata store names no prefix")
    if len(prefixes) > METADATA_PREFIXES_MAX:
        raise HoldfastError(
            ErrorCode.LIMIT_EXCEEDED, f"a snapshot names {len(prefixes)} prefixes; {METADATA_PREFIXES_MAX} are allowed"
        )
    covering: list[bytes] = []
    for prefix in sorted(map(prefix_bytes, prefixes)):
        if not covering or not prefix.startswith(covering[-1]):
            covering.append(prefix)
    return covering


def check_page(*, limit: int) -> None:
    """Check the size of a page.

    Raises:
        HoldfastError: INVALID_ARGUMENT if it is not positive; LIMIT_EXCEEDED above `METADATA_PAGE_ITEMS_MAX`.
    """
    if limit < 1:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"a page of {limit} items holds nothing")
    if limit > METADATA_PAGE_ITEMS_MAX:
        raise HoldfastError(
            ErrorCode.LIMIT_EXCEEDED, f"a page of {limit} items is too large; {METADATA_PAGE_ITEMS_MAX} at most"
        )


def check_ttl(ttl_s: float) -> None:
    """Check the term of a lease.

    Raises:
        HoldfastError: INVALID_ARGUMENT if it is not positive; LIMIT_EXCEEDED above `METADATA_LEASE_TTL_S_MAX`.
    """
    if not ttl_s > 0:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"a lease of {ttl_s} seconds has no term")
    if ttl_s > METADATA_LEASE_TTL_S_MAX:
        raise HoldfastError(
            ErrorCode.LIMIT_EXCEEDED, f"a lease of {ttl_s} seconds is too long; {METADATA_LEASE_TTL_S_MAX:.0f} at most"
        )


def check_txn(conditions: Sequence[Condition], operations: Sequence[Operation]) -> None:
    """Check a transaction before it is sent or applied.

    Raises:
        HoldfastError: INVALID_ARGUMENT if a key is operated on twice or malformed, or a lease id is negative;
            LIMIT_EXCEEDED beyond this module's limits.
    """
    for what, count in (("conditions", len(conditions)), ("operations", len(operations))):
        if count > METADATA_TXN_OPERATIONS_MAX:
            raise HoldfastError(
                ErrorCode.LIMIT_EXCEEDED, f"a transaction has {count} {what}; {METADATA_TXN_OPERATIONS_MAX} are allowed"
            )
    total = sum(len(key_bytes(condition.key)) for condition in conditions)
    seen: set[str] = set()
    for operation in operations:
        total += len(key_bytes(operation.key))
        if operation.key in seen:
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT, f"a transaction operates twice on the key {operation.key!r}"
            )
        seen.add(operation.key)
        if isinstance(operation, Put):
            total += _checked_value_bytes(operation)
    if total > METADATA_TXN_BYTES_MAX:
        raise HoldfastError(
            ErrorCode.LIMIT_EXCEEDED,
            f"a transaction has {total} bytes of keys and values; {METADATA_TXN_BYTES_MAX} are allowed",
        )


def holds(condition: Condition, *, create_revision: int, mod_revision: int) -> bool:
    """Return whether the condition holds for its key with these revisions, both 0 where the key does not exist."""
    match condition:
        case Absent():
            return create_revision == 0
        case Exists():
            return create_revision != 0
        case CreateRevisionIs():
            return create_revision == condition.revision
        case ModRevisionIs():
            return mod_revision == condition.revision


def _checked_value_bytes(put: Put) -> int:
    if len(put.value) > METADATA_VALUE_BYTES_MAX:
        raise HoldfastError(
            ErrorCode.LIMIT_EXCEEDED,
            f"the value of {put.key!r} has {len(put.value)} bytes; {METADATA_VALUE_BYTES_MAX} are allowed",
        )
    if put.lease_id < 0:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"the lease {put.lease_id} of {put.key!r} is not a lease id")
    return len(put.value)
