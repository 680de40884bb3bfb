"""Patterns of paths, as `.gitignore` has them, without its negation.

A pattern without a slash, or with one at its end only, matches a name at any depth; any other is anchored at the root.
`*`, `?` and `[…]` stay within a name, `**` stands for any number of directories, a backslash takes the next character
for what it is, and a slash at the end restricts the pattern to directories. What matches a directory takes all that is
in it. Paths and patterns are bytes, because names on Linux are.

A tree is matched on the way down: `Selection.descend` gives the selection below a directory, so that a directory that
cannot hold anything wanted is never looked into.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from holdfast_core.model.errors import ErrorCode, HoldfastError

PATTERN_BYTES_MAX: Final = 4096
PATTERNS_MAX: Final = 1000

SECRET_PATTERNS: Final = (
    ".env",
    ".env.*",
    "*.pem",
    "*.key",
    "*.p12",
    "*.pfx",
    "*.jks",
    "*.keystore",
    "*.kdbx",
    "id_rsa*",
    "id_dsa*",
    "id_ecdsa*",
    "id_ed25519*",
    ".ssh/",
    ".gnupg/",
    ".password-store/",
    ".netrc",
    ".pgpass",
    ".my.cnf",
    ".htpasswd",
    ".npmrc",
    ".pypirc",
    ".git-credentials",
    ".vault-token",
    ".terraformrc",
    ".s3cfg",
    "*.tfstate",
    "credentials.json",
    "client_secret*.json",
    "service-account*.json",
    "**/.aws/credentials",
    "**/.azure/",
    "**/.config/gcloud/",
    "**/.config/gh/hosts.yml",
    "**/.config/rclone/rclone.conf",
    "**/.docker/config.json",
    "**/.kube/config",
    "**/.huggingface/token",
    "**/huggingface/token",
    "*_history",
    "/etc/shadow*",
    "/etc/gshadow*",
    "/etc/ssh/ssh_host_*",
)
"""Files that usually hold secrets: what `exclude_secrets` leaves out."""

_DEEP: Final = None
"""In place of a name's expression: any number of directories."""


@dataclass(frozen=True, slots=True)
class _Pattern:
    """A pattern: an expression a name, or `_DEEP`."""

    parts: tuple[re.Pattern[bytes] | None, ...]
    directories_only: bool

    def closed(self, states: set[int]) -> frozenset[int]:
        """Return the states and those that are reached by taking `**` for no directory."""
        found = set()
        for state in states:
            found.add(state)
            while state < len(self.parts) and self.parts[state] is _DEEP:
                state += 1
                found.add(state)
        return frozenset(found)

    def advance(self, states: frozenset[int], name: bytes) -> frozenset[int]:
        """Return the states behind one more name."""
        found = set()
        for state in states:
            if state == len(self.parts):
                continue
            part = self.parts[state]
            if part is _DEEP:
                found.add(state)
            elif part.match(name):
                found.add(state + 1)
        return self.closed(found)


def _translate(text: bytes, pattern: bytes) -> re.Pattern[bytes]:
    """Return the expression of one name of a pattern."""
    out, at = [], 0
    while at < len(text):
        char = text[at : at + 1]
        at += 1
        if char == b"*":
            out.append(b".*")
        elif char == b"?":
            out.append(b".")
        elif char == b"\\":
            if at == len(text):
                raise _wrong(pattern, "ends in a backslash")
            out.append(re.escape(text[at : at + 1]))
            at += 1
        elif char == b"[":
            end = text.find(b"]", at + 1 + (text[at : at + 1] in (b"!", b"^")))
            if end < 0:
                raise _wrong(pattern, "has a bracket that is not closed")
            out.append(_bracket(text[at:end], pattern))
            at = end + 1
        else:
            out.append(re.escape(char))
    return re.compile(b"".join(out) + rb"\Z", re.DOTALL)


def _bracket(text: bytes, pattern: bytes) -> bytes:
    """Return the expression of what stands between brackets."""
    negated = text[:1] in (b"!", b"^")
    text = text[1:] if negated else text
    out, at = [], 0
    while at < len(text):
        low = high = text[at : at + 1]
        if text[at + 1 : at + 2] == b"-" and at + 2 < len(text):
            high = text[at + 2 : at + 3]
            at += 2
        at += 1
        if high < low:
            raise _wrong(pattern, f"has a range that ends before it begins: {os_text(low)}-{os_text(high)}")
        out.append(re.escape(low) + (b"-" + re.escape(high) if high != low else b""))
    return (b"[^" if negated else b"[") + b"".join(out) + b"]"


def exactly(path: str) -> str:
    """Return the pattern that matches this one path, and what is below it; "" for the root, which no pattern names."""
    names = [name for name in path.split("/") if name]
    return "".join("/" + re.sub(r"([*?\[\\])", r"\\\1", name) for name in names)


def os_text(raw: bytes) -> str:
    """Return a path or a part of one as text, bytes that are no UTF-8 as lone surrogates."""
    return raw.decode("utf-8", "surrogateescape")


def os_bytes(text: str) -> bytes:
    """Return the bytes of a path that `os_text` made."""
    return text.encode("utf-8", "surrogateescape")


def _wrong(pattern: bytes, why: str) -> HoldfastError:
    shown = pattern[:100].decode("utf-8", "backslashreplace")
    return HoldfastError(ErrorCode.INVALID_ARGUMENT, f"the pattern {shown!r} {why}")


def _compile(text: str) -> _Pattern:
    raw = os_bytes(text)
    if not raw.strip(b"/"):
        raise _wrong(raw, "names nothing")
    if len(raw) > PATTERN_BYTES_MAX:
        raise _wrong(raw, f"is longer than {PATTERN_BYTES_MAX} bytes")
    if raw.startswith(b"!"):
        raise _wrong(raw, "begins with an exclamation mark; say what to leave out in exclude")
    if b"\0" in raw:
        raise _wrong(raw, "has a zero byte, which no path has")
    directories_only = raw.endswith(b"/")
    body = raw.rstrip(b"/")
    anchored = b"/" in body
    names = body.removeprefix(b"/").split(b"/")
    parts: list[re.Pattern[bytes] | None] = [] if anchored else [_DEEP]
    for name in names:
        if name in (b"", b".", b".."):
            raise _wrong(raw, "has an empty name, . or .. in it")
        parts.append(_DEEP if name == b"**" else _translate(name, raw))
    if parts[-1] is _DEEP:
        # "logs/**" is all that is in logs, not logs itself.
        parts.append(_translate(b"*", raw))
    return _Pattern(tuple(parts), directories_only)


def _compiled(texts: Sequence[str], what: str) -> tuple[_Pattern, ...]:
    if isinstance(texts, str):
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"{what} takes a list of patterns, not one text")
    if len(texts) > PATTERNS_MAX:
        raise HoldfastError(ErrorCode.LIMIT_EXCEEDED, f"{what} has {len(texts)} patterns; {PATTERNS_MAX} are allowed")
    return tuple(_compile(text) for text in texts)


_States = tuple[frozenset[int], ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """What is wanted, as seen from one directory.

    Attributes:
        everything: whether all that is not excluded is wanted from here on.
    """

    _include: tuple[_Pattern, ...]
    _exclude: tuple[_Pattern, ...]
    _include_states: _States
    _exclude_states: _States
    everything: bool

    def descend(self, name: bytes, *, directory: bool) -> tuple[bool, Selection | None]:
        """Return whether the entry `name` of this directory is wanted, and the selection below it.

        The latter is None where nothing below can be wanted, and for everything that is no directory. An entry that is
        not wanted by itself may still be needed as the directory of one that is.
        """
        exclude = tuple(
            pattern.advance(states, name) for pattern, states in zip(self._exclude, self._exclude_states, strict=True)
        )
        if _matched(self._exclude, exclude, directory=directory):
            return False, None
        include = tuple(
            pattern.advance(states, name) for pattern, states in zip(self._include, self._include_states, strict=True)
        )
        wanted = self.everything or _matched(self._include, include, directory=directory)
        if not directory or not (wanted or any(include)):
            return wanted, None
        return wanted, replace(self, _include_states=include, _exclude_states=exclude, everything=wanted)

    def wants(self, names: Sequence[bytes], *, directory: bool) -> bool:
        """Return whether a path is wanted, for who does not walk a tree."""
        selection: Selection | None = self
        wanted = False
        for at, name in enumerate(names):
            if selection is None:
                return False
            wanted, selection = selection.descend(name, directory=directory or at + 1 < len(names))
        return wanted


def _matched(patterns: Sequence[_Pattern], states: _States, *, directory: bool) -> bool:
    return any(
        len(pattern.parts) in found and (directory or not pattern.directories_only)
        for pattern, found in zip(patterns, states, strict=True)
    )


def select(include: Sequence[str] = (), exclude: Sequence[str] = (), *, exclude_secrets: bool = False) -> Selection:
    """Return the selection of a whole tree; without `include` everything is wanted that is not excluded.

    Raises:
        HoldfastError: INVALID_ARGUMENT if a pattern is malformed; LIMIT_EXCEEDED if there are too many.
    """
    wanted = _compiled(include, "include")
    left_out = _compiled(exclude, "exclude") + (_compiled(SECRET_PATTERNS, "exclude") if exclude_secrets else ())
    start = [tuple(pattern.closed({0}) for pattern in patterns) for patterns in (wanted, left_out)]
    return Selection(wanted, left_out, start[0], start[1], not wanted)
