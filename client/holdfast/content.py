"""Reading content: fetch blocks from their owners, verify, open, check fingerprint and length, hand plaintext on.

All of it happens in worker threads, a node's answer at a time. A delta and its base are asked for at once, so a delta
costs one more block and no more waiting. A block whose bytes prove wrong at any step is asked of the next owner. What
no owner could give is told by key, so that the caller can name the ranges.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from holdfast.access import Access
from holdfast_core.model.block import Opener, SealedBlock, verify
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.keys import KeyRing
from holdfast_core.runtime.blocks.reader import Unreadable

WINDOW_BYTES: Final = 8 * 1024 * 1024
RANGES_NAMED_MAX: Final = 64


class Entry(NamedTuple):
    """One place of content: `key` is the caller's, e.g. a byte offset; `base_id` is empty where coded plain."""

    key: int
    length: int
    fingerprint: bytes
    block_id: bytes
    base_id: bytes


Sink = Callable[[Sequence[tuple[int, bytes]]], None]
"""Takes (key, plaintext) pairs in a worker thread; one call an answer of a node."""


@dataclass(frozen=True, slots=True)
class ContentDamage:
    """Entries that could not be read, and why."""

    unreadable: Unreadable
    entries: tuple[Entry, ...]


class ContentReader:
    """Reads entries under one operation's access. Calls may overlap."""

    def __init__(self, access: Access, executor: Executor) -> None:
        """Bind to an operation."""
        self._access = access
        self._reader = access.reader(executor)
        self._ring = access.ring
        self._opener = access.ring.opener()

    async def read(self, entries: Sequence[Entry], sink: Sink, *, block_bytes: int) -> ContentDamage | None:
        """Read `entries` into `sink`; returns what could not be read, or None.

        `block_bytes` is about the size of a block, for batching. The caller bounds the number of entries.

        Raises:
            HoldfastError: DENIED, KEY_MISMATCH, or what the sink raises.
        """
        await self._access.freshen()
        window = _Window(entries, sink, ring=self._ring, opener=self._opener)
        unreadable = await self._reader.fetch_into(window.wanted, window.consume, block_bytes=block_bytes)
        if window.corrupt:
            unreadable = replace(unreadable, corrupt=(*unreadable.corrupt, *window.corrupt))
        return _damage(unreadable, entries) if unreadable else None


class _Window:
    """The bodies of some entries as they come in, in several threads; each is opened once its base is here too.

    Attributes:
        wanted: ids to fetch, a base right before what it is a base of.
        corrupt: ids of blocks that proved wrong after they had been taken, when their base came.
    """

    def __init__(self, entries: Sequence[Entry], sink: Sink, *, ring: KeyRing, opener: Opener) -> None:
        self.wanted: dict[bytes, None] = {}
        self.corrupt: list[bytes] = []
        self._sink = sink
        self._ring = ring
        self._opener = opener
        self._places: dict[bytes, list[Entry]] = {}
        # How many blocks wait for a base; its plaintext is dropped with the last, so that its memory is used again.
        self._uses: dict[bytes, int] = {}
        self._lock = threading.Lock()  # over `_uses` and the two below
        self._bases: dict[bytes, bytes] = {}
        self._held: dict[bytes, list[tuple[SealedBlock, list[Entry]]]] = {}
        for entry in entries:
            if entry.base_id:
                self.wanted[entry.base_id] = None
            self.wanted[entry.block_id] = None
            places = self._places.setdefault(entry.block_id, [])
            if entry.base_id and all(other.base_id != entry.base_id for other in places):
                self._uses[entry.base_id] = self._uses.get(entry.base_id, 0) + 1
            places.append(entry)

    def consume(self, ids: Sequence[bytes], bodies: Sequence[memoryview]) -> Sequence[bytes]:
        """Take bodies, and pass on what they let be opened; returns the ids whose bytes are wrong."""
        refused: list[bytes] = []
        opened: list[tuple[int, bytes]] = []
        for block_id, body in zip(ids, bodies, strict=True):
            try:
                block = verify(block_id, body)
                if block_id in self._uses:
                    self._take_base(block, opened)
                opened += self._open_or_hold(block)
            except HoldfastError as error:
                _only_corrupt(error)
                refused.append(block_id)
        if opened:
            self._sink(opened)
        return refused

    def _take_base(self, block: SealedBlock, opened: list[tuple[int, bytes]]) -> None:
        """Open a base, and what came before it."""
        plain = self._opener.open(block)
        with self._lock:
            if self._uses[block.id]:
                self._bases[block.id] = plain
            held = self._held.pop(block.id, ())
        for successor, entries in held:
            try:
                opened += self._open(successor, entries, plain)
            except HoldfastError as error:
                # Its bytes are those that its id names, so no other owner has better ones.
                _only_corrupt(error)
                self.corrupt.append(successor.id)

    def _open_or_hold(self, block: SealedBlock) -> list[tuple[int, bytes]]:
        """Open a block for all its places, but keep it for those whose base is not here yet."""
        opened: list[tuple[int, bytes]] = []
        by_base: dict[bytes, list[Entry]] = {}
        for entry in self._places.get(block.id, ()):
            by_base.setdefault(entry.base_id, []).append(entry)
        for base_id, entries in by_base.items():
            base = None
            if base_id:
                with self._lock:
                    base = self._bases.get(base_id)
                    if base is None:
                        self._held.setdefault(base_id, []).append((block, entries))
                        continue
            opened += self._open(block, entries, base)
        return opened

    def _open(self, block: SealedBlock, entries: Sequence[Entry], base: bytes | None) -> list[tuple[int, bytes]]:
        """Return keys and plaintext of entries that name the same block and base."""
        first = entries[0]
        plain = self._opener.open(block, base_plain=base, base_id=first.base_id)
        self._ring.check_fingerprint(plain, first.fingerprint, block_id=block.id)
        for entry in entries:
            _check_length(entry, plain)
        if first.base_id:
            self._used(first.base_id)
        return [(entry.key, plain) for entry in entries]

    def _used(self, base_id: bytes) -> None:
        """Drop a base once nothing waits for it any more."""
        with self._lock:
            self._uses[base_id] -= 1
            if not self._uses[base_id]:
                self._bases.pop(base_id, None)


def _check_length(entry: Entry, plain: bytes) -> None:
    if len(plain) != entry.length:
        raise HoldfastError(ErrorCode.CORRUPT, f"block {entry.block_id.hex()} has another length than its index says")


def _only_corrupt(error: HoldfastError) -> None:
    """Let a block's corruption be tried on the next owner; anything else is the operation's failure."""
    if error.code is not ErrorCode.CORRUPT:
        raise error


def _damage(unreadable: Unreadable, entries: Iterable[Entry]) -> ContentDamage:
    ids = {*unreadable.damaged, *unreadable.unreachable}
    return ContentDamage(unreadable, tuple(entry for entry in entries if entry.block_id in ids or entry.base_id in ids))


def merge_ranges(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return (start, end) ranges in order, neighbours joined."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


class DamageReport:
    """Collects what an operation could not read, to name it all at the end."""

    def __init__(self, what: str) -> None:
        """Begin empty; `what` names the thing being read, for the message."""
        self._what = what
        self._missing: dict[bytes, None] = {}
        self._corrupt: dict[bytes, None] = {}
        self._ranges: dict[str, list[tuple[int, int]]] = {}

    def add(self, damage: ContentDamage, part: str) -> None:
        """Note damage of `part`, a volume's name or "" for an object; entries' keys are byte offsets.

        Raises:
            HoldfastError: UNREACHABLE at once: trying again may read it, so there is nothing to collect.
        """
        unreadable = damage.unreadable
        if unreadable.unreachable and not unreadable.damaged:
            raise unreadable.error(self._what)
        self._missing.update(dict.fromkeys(unreadable.missing))
        self._corrupt.update(dict.fromkeys(unreadable.corrupt))
        ranges = self._ranges.setdefault(part, [])
        ranges.extend((entry.key, entry.key + entry.length) for entry in damage.entries)

    def add_index(self, error: HoldfastError, part: str, ranges: Iterable[tuple[int, int]]) -> None:
        """Note damaged index nodes, which make whole `ranges` unreadable."""
        target = self._corrupt if error.code is ErrorCode.CORRUPT else self._missing
        target.update(dict.fromkeys(error.block_ids))
        self._ranges.setdefault(part, []).extend(ranges)

    @property
    def ids(self) -> tuple[bytes, ...]:
        """The damaged ids."""
        return (*self._corrupt, *self._missing)

    def error(self) -> HoldfastError | None:
        """Return the error that names everything, or None if nothing is damaged."""
        if not self.ids:
            return None
        named = [
            f"{part + ':' if part else ''}{start}-{end}"
            for part, ranges in sorted(self._ranges.items())
            for start, end in merge_ranges(ranges)
        ]
        unreadable = Unreadable(missing=tuple(self._missing), corrupt=tuple(self._corrupt))
        error = unreadable.error(self._what)
        shown = ", ".join(named[:3]) + (", …" if len(named) > 3 else "")
        return HoldfastError(
            error.code,
            f"{error.message}; damaged bytes: {shown}",
            facts={**error.facts, "ranges": " ".join(named[:RANGES_NAMED_MAX]), "range_count": str(len(named))},
            block_ids=error.block_ids,
        )
