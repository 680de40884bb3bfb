"""Waiting for what comes about by itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

_WITHIN_S: Final = 60.0
_EVERY_S: Final = 0.02


def wait_until(condition: Callable[[], bool], what: str, *, timeout_s: float = _WITHIN_S) -> None:
    """Poll until the condition holds. Raises AssertionError that names `what` if it does not in time."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"{what}: not within {timeout_s} s"
        time.sleep(_EVERY_S)
