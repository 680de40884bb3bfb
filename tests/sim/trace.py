"""What happened, line by line: kept as a digest always, and as text where somebody wants to read it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable


class Trace:
    """The lines of one history. `digest` is the same for two runs exactly if every line is."""

    def __init__(self, show: Callable[[str], None] | None = None) -> None:
        """Pass each line to `show`, if that is given."""
        self._show = show
        self._hash = hashlib.blake2b(digest_size=16)
        self.count = 0

    def note(self, time_s: float, who: str, what: str) -> None:
        """Add a line."""
        line = f"{time_s:10.4f} {who:<14} {what}"
        self._hash.update(line.encode() + b"\n")
        self.count += 1
        if self._show is not None:
            self._show(line)

    @property
    def digest(self) -> str:
        """What stands for all lines so far."""
        return self._hash.hexdigest()
