"""SIGTERM and SIGINT as an event, so that a process can end in good order."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def termination_signals() -> Iterator[asyncio.Event]:
    """Yield an event that SIGTERM and SIGINT set; the signals do what they did before once the block ends.

    Only in the main thread, inside its running event loop.
    """
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        loop.add_signal_handler(number, asked.set)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
