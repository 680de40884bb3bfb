"""Patterns of principals and of resources: `*` stands for any run of characters, and nothing else is special.

There is no escape, no `?` and no class: what a pattern means can be read off it. A run may be empty and may hold
slashes, so `vm/web-*` covers `vm/web-` and `vm/web-1`, and `*` covers everything.
"""

from __future__ import annotations

from typing import Final

ANY: Final = "*"


def matches(pattern: str, text: str) -> bool:
    """Return whether `pattern` covers the whole of `text`; time grows with their lengths only, whatever they hold."""
    if ANY not in pattern:
        return pattern == text
    first, *middle, last = pattern.split(ANY)
    if len(text) < len(first) + len(last) or not text.startswith(first) or not text.endswith(last):
        return False
    # The leftmost place for each part leaves the most room for the rest, so there is nothing to try again.
    at, end = len(first), len(text) - len(last)
    for part in middle:
        found = text.find(part, at, end)
        if found < 0:
            return False
        at = found + len(part)
    return True
