"""The request id: one short text that follows a call from the client through every service's log.

The client makes it, or takes the one that is current; a server makes the caller's current while it handles the call, so
that calls which it makes in turn carry the same id.
"""

from __future__ import annotations

import contextvars
import re
import uuid
from typing import Final

REQUEST_ID_KEY: Final = "holdfast-request-id"

_WELL_FORMED = re.compile(r"[A-Za-z0-9._-]{1,64}\Z", re.ASCII)
_CURRENT: contextvars.ContextVar[str] = contextvars.ContextVar("holdfast_request_id", default="")


def new_request_id() -> str:
    """Return a fresh id of 16 hexadecimal digits; it is for finding log lines, not a secret."""
    return uuid.uuid4().hex[:16]


def current_request_id() -> str:
    """Return the id of the call that is being handled or made, or "" outside of one."""
    return _CURRENT.get()


def enter_request(received: str | None) -> str:
    """Make `received` the current id of this task, or a fresh one where it is missing or malformed; return it."""
    request_id = received if received is not None and _WELL_FORMED.match(received) else new_request_id()
    _CURRENT.set(request_id)
    return request_id


def request_metadata() -> tuple[tuple[str, str], ...]:
    """Return the metadata that names the current request, or a fresh id outside of one."""
    return ((REQUEST_ID_KEY, _CURRENT.get() or new_request_id()),)
