"""Logs of the services: one JSON object a line on stderr, each with the service's name and the request id.

Values of type bytes are never written, only their length: keys and plaintext are bytes, and ids that are worth a line
are passed as hexadecimal text. What libraries say through the standard library's logging comes out in the same form.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, Final, TextIO

import structlog

from holdfast_core.runtime.requests import current_request_id

Log = structlog.stdlib.BoundLogger

_ROOT_NAME: Final = "holdfast"
# Keeps unconfigured lines from the standard library's last resort, which prints them to stderr.
logging.getLogger(_ROOT_NAME).addHandler(logging.NullHandler())

_LEVELS: Final = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure_logs(service: str, *, level: str = "info", stream: TextIO | None = None) -> Log:
    """Send every log line of the process to `stream` (stderr by default) as JSON and return the service's logger.

    `level` is "debug", "info", "warning" or "error". Called once, when a service starts. Where it is not called, in an
    embedder's process, our lines go to the standard library's logger "holdfast" and nowhere by themselves.

    Raises:
        KeyError: `level` is another word.
    """
    threshold = _LEVELS[level.lower()]
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processor=structlog.processors.JSONRenderer(), foreign_pre_chain=_processors(service)
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger(_ROOT_NAME).setLevel(threshold)
    return get_log(service)


def get_log(service: str) -> Log:
    """Return the logger of a service.

    It is bound to its own processors, not to structlog's global configuration, whose default prints every frame's
    local variables with a traceback: keys may be among them.
    """
    log: Log = structlog.wrap_logger(
        logging.getLogger(f"{_ROOT_NAME}.{service}"),
        processors=[
            structlog.stdlib.filter_by_level,
            *_processors(service),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    return log


def _processors(service: str) -> list[structlog.typing.Processor]:
    return [
        _add_request_id,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _hide_bytes,
        _ServiceName(service),
    ]


class _ServiceName:
    """Adds the service's name."""

    def __init__(self, service: str) -> None:
        self._service = service

    def __call__(self, logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event["service"] = self._service
        return event


def _add_request_id(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    request_id = current_request_id()
    if request_id:
        event.setdefault("request_id", request_id)
    return event


def _hide_bytes(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key, value in event.items():
        if isinstance(value, bytes | bytearray | memoryview):
            event[key] = f"<{len(value)} bytes>"
    return event
