"""What commands print: ids alone, aligned tables for people, JSON for programs. All of it on stdout.

JSON mirrors the SDK's values field by field: bytes as hexadecimal, enumerations by their word, sizes in bytes, times in
Unix milliseconds. Fields are added over time, never renamed.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def to_json(value: Any) -> Any:
    """Return `value` (of dataclasses, enumerations, bytes, paths, lists and mappings) as JSON can hold it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


def print_json(value: Any) -> None:
    """Print `value` as one JSON document."""
    sys.stdout.write(json.dumps(to_json(value), indent=2, ensure_ascii=False) + "\n")


def print_line(text: str) -> None:
    """Print one line."""
    sys.stdout.write(text + "\n")


def print_now(text: str) -> None:
    """Print one line of a command that goes on, at once: whoever started it waits for it, perhaps through a pipe."""
    print_line(text)
    sys.stdout.flush()


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows below a header in aligned columns, numbers to the right; just the header when there are none."""
    widths = [max(len(row[at]) for row in (header, *rows)) for at in range(len(header))]
    right = [bool(rows) and all(row[at][:1].isdigit() for row in rows) for at in range(len(header))]
    for row in (header, *rows):
        cells = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ]
        print_line("  ".join(cells).rstrip())


def print_facts(facts: Mapping[str, str]) -> None:
    """Print one fact a line, names first."""
    width = max(map(len, facts), default=0)
    for name, fact in facts.items():
        print_line(f"{name.ljust(width)}  {fact}")


def format_time(unix_ms: int) -> str:
    """Return a time in UTC for people, e.g. "2026-11-22 20:15:01Z"; "-" for 0, which means unknown."""
    if not unix_ms:
        return "-"
    return datetime.datetime.fromtimestamp(unix_ms / 1000, tz=datetime.UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def format_seconds(seconds: float) -> str:
    """Return a duration for people, e.g. "0.42 s"."""
    return f"{seconds:.2f} s" if seconds < 100 else f"{seconds:.0f} s"
