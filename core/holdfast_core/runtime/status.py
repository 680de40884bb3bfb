"""How errors cross the wire, both ways, in one table.

A `HoldfastError` leaves a service as a gRPC status (for people with other tools) and as a serialised `ErrorDetail` in
the trailing metadata, from which the other side makes an equal `HoldfastError`. What gRPC itself says when no service
answered becomes a `HoldfastError` too, so that no caller ever sees a transport's exception. This is the only file that
knows `grpc.StatusCode`.
"""

from __future__ import annotations

import enum
from types import MappingProxyType
from typing import Any, Final, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import BLOCK_ID_BYTES, ERROR_BLOCK_IDS_MAX
from holdfast_proto.v1.common_pb2 import ErrorDetail

ERROR_METADATA_KEY: Final = "holdfast-error-bin"

# Names the gRPC status when nobody answered; it is about the last hop, so it never travels further.
TRANSPORT_FACT: Final = "transport"

# Messages and facts travel in metadata, whose size is bounded (see channels.py).
_TEXT_CHARS_MAX: Final = 4096

_Status = grpc.StatusCode

STATUS_BY_CODE: Final = MappingProxyType(
    {
        ErrorCode.INVALID_ARGUMENT: _Status.INVALID_ARGUMENT,
        ErrorCode.NOT_FOUND: _Status.NOT_FOUND,
        ErrorCode.ALREADY_EXISTS: _Status.ALREADY_EXISTS,
        ErrorCode.MISMATCH: _Status.INVALID_ARGUMENT,
        ErrorCode.NO_PARENT: _Status.FAILED_PRECONDITION,
        ErrorCode.BUSY: _Status.ABORTED,
        ErrorCode.SESSION_LAPSED: _Status.FAILED_PRECONDITION,
        ErrorCode.VOLUME_CHANGED: _Status.ABORTED,
        ErrorCode.SOURCE_UNREADABLE: _Status.FAILED_PRECONDITION,
        ErrorCode.TARGET_EXISTS: _Status.ALREADY_EXISTS,
        ErrorCode.TARGET_UNWRITABLE: _Status.FAILED_PRECONDITION,
        ErrorCode.CONFLICT: _Status.ABORTED,
        ErrorCode.WRONG_EPOCH: _Status.FAILED_PRECONDITION,
        ErrorCode.NOT_DURABLE: _Status.FAILED_PRECONDITION,
        ErrorCode.MISSING: _Status.DATA_LOSS,
        ErrorCode.CORRUPT: _Status.DATA_LOSS,
        ErrorCode.UNREACHABLE: _Status.UNAVAILABLE,
        ErrorCode.NO_QUORUM: _Status.UNAVAILABLE,
        ErrorCode.NOT_READY: _Status.UNAVAILABLE,
        ErrorCode.DISK_FULL: _Status.RESOURCE_EXHAUSTED,
        ErrorCode.UNAUTHENTICATED: _Status.UNAUTHENTICATED,
        ErrorCode.DENIED: _Status.PERMISSION_DENIED,
        ErrorCode.QUOTA_EXCEEDED: _Status.RESOURCE_EXHAUSTED,
        ErrorCode.LIMIT_EXCEEDED: _Status.RESOURCE_EXHAUSTED,
        ErrorCode.KEY_MISMATCH: _Status.FAILED_PRECONDITION,
        ErrorCode.CANCELLED: _Status.CANCELLED,
        ErrorCode.INTERNAL: _Status.INTERNAL,
    }
)

# For answers without an `ErrorDetail`: from gRPC itself, from a proxy, or from a service that is not ours.
_CODE_BY_STATUS: Final = MappingProxyType(
    {
        # Who gives up on this side gets CancelledError of asyncio, so this is a server that drops its calls as it ends.
        _Status.CANCELLED: ErrorCode.UNREACHABLE,
        _Status.UNKNOWN: ErrorCode.INTERNAL,
        _Status.INVALID_ARGUMENT: ErrorCode.INVALID_ARGUMENT,
        _Status.DEADLINE_EXCEEDED: ErrorCode.UNREACHABLE,
        _Status.NOT_FOUND: ErrorCode.NOT_FOUND,
        _Status.ALREADY_EXISTS: ErrorCode.ALREADY_EXISTS,
        _Status.PERMISSION_DENIED: ErrorCode.DENIED,
        _Status.RESOURCE_EXHAUSTED: ErrorCode.LIMIT_EXCEEDED,
        _Status.FAILED_PRECONDITION: ErrorCode.CONFLICT,
        _Status.ABORTED: ErrorCode.CONFLICT,
        _Status.OUT_OF_RANGE: ErrorCode.INVALID_ARGUMENT,
        _Status.UNIMPLEMENTED: ErrorCode.INTERNAL,
        _Status.INTERNAL: ErrorCode.INTERNAL,
        _Status.UNAVAILABLE: ErrorCode.UNREACHABLE,
        _Status.DATA_LOSS: ErrorCode.CORRUPT,
        _Status.UNAUTHENTICATED: ErrorCode.UNAUTHENTICATED,
    }
)


class RpcFailure(enum.Enum):
    """gRPC statuses by name, for the client of a service that is not ours (etcd) and speaks no `ErrorDetail`."""

    CANCELLED = "CANCELLED"
    UNKNOWN = "UNKNOWN"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    DEADLINE = "DEADLINE_EXCEEDED"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    ABORTED = "ABORTED"
    OUT_OF_RANGE = "OUT_OF_RANGE"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    INTERNAL = "INTERNAL"
    UNAVAILABLE = "UNAVAILABLE"
    DATA_LOSS = "DATA_LOSS"
    UNAUTHENTICATED = "UNAUTHENTICATED"


def classify(failure: grpc.aio.AioRpcError) -> RpcFailure:
    """Return the status that a call failed with."""
    return RpcFailure(failure.code().name)


def status_name(code: ErrorCode | None) -> str:
    """Return the gRPC status that `code` travels as, e.g. for a metric's label; `None` is "OK"."""
    return "OK" if code is None else str(STATUS_BY_CODE[code].name)


def detail_from_error(error: HoldfastError) -> ErrorDetail:
    """Return `error` as it travels; long texts and more than 1,024 block ids are cut."""
    return ErrorDetail(
        code=error.code.name,
        message=error.message[:_TEXT_CHARS_MAX],
        retryable=error.retryable,
        facts={key: value[:_TEXT_CHARS_MAX] for key, value in sorted(error.facts.items()) if key != TRANSPORT_FACT},
        block_ids=b"".join(error.block_ids[:ERROR_BLOCK_IDS_MAX]),
    )


def error_from_detail(detail: ErrorDetail, *, otherwise: ErrorCode = ErrorCode.INTERNAL) -> HoldfastError:
    """Return the error that `detail` describes; a code that this version does not know becomes `otherwise`.

    The unknown name is kept as the fact "code", and whether to try again stays what the other side said.
    """
    facts = dict(detail.facts)
    facts.pop(TRANSPORT_FACT, None)
    code = ErrorCode.__members__.get(detail.code)
    if code is None:
        facts["code"] = detail.code
    packed = detail.block_ids
    whole = len(packed) - len(packed) % BLOCK_ID_BYTES
    error = HoldfastError(
        code or otherwise,
        detail.message,
        facts=facts,
        block_ids=[packed[at : at + BLOCK_ID_BYTES] for at in range(0, whole, BLOCK_ID_BYTES)],
    )
    error.retryable = detail.retryable
    return error


async def abort_with(context: grpc.aio.ServicerContext[Any, Any], error: HoldfastError) -> NoReturn:
    """End a call on the server's side with `error`; gRPC raises its own exception through the handler."""
    detail = detail_from_error(error)
    metadata = (*(context.trailing_metadata() or ()), (ERROR_METADATA_KEY, detail.SerializeToString()))
    await context.abort(STATUS_BY_CODE[error.code], detail.message, metadata)
    raise AssertionError("abort returned")


def error_from_rpc(failure: grpc.aio.AioRpcError | grpc.Call, *, peer: str) -> HoldfastError:
    """Return what a failed call means; `peer` names the other side in messages, e.g. "coordinator 127.0.0.1:7400"."""
    status = failure.code()
    code = _CODE_BY_STATUS.get(status, ErrorCode.INTERNAL)
    for key, value in failure.trailing_metadata() or ():
        if key == ERROR_METADATA_KEY and isinstance(value, bytes):
            detail = _parse_detail(value)
            if detail is not None:
                return error_from_detail(detail, otherwise=code)
    return HoldfastError(
        code, _transport_message(status, failure.details() or "", peer), facts={TRANSPORT_FACT: status.name}
    )


def reaches_peer(error: HoldfastError) -> bool:
    """Return whether the other side itself gave this error; if not, gRPC did and the call may or may not have run."""
    return TRANSPORT_FACT not in error.facts


def _parse_detail(data: bytes) -> ErrorDetail | None:
    """Return the detail, or None where the bytes are none: then the status alone has to speak."""
    detail = ErrorDetail()
    try:
        detail.ParseFromString(data)
    except DecodeError:
        return None
    return detail


def _transport_message(status: grpc.StatusCode, details: str, peer: str) -> str:
    if status is _Status.UNAVAILABLE:
        # gRPC's own text repeats the address and its layers; its last part is the reason.
        reason = details.rpartition(": ")[2] or "no details"
        return f"{peer} cannot be reached; check that it runs and that the address is right ({reason})"
    if status is _Status.DEADLINE_EXCEEDED:
        return f"{peer} did not answer in time; check that it runs and is not overloaded, then try again"
    if status is _Status.CANCELLED:
        return f"{peer} dropped the call before it was answered; it may be going down, try again"
    if status is _Status.UNIMPLEMENTED:
        return f"{peer} does not offer this call; check that the address is a Holdfast service of this version"
    return f"{peer} failed: {details or 'no details'} ({status.name})"
