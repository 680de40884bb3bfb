"""Reading content: fetch blocks from their owners, verify, open, check fingerprint and length, hand plaintext on.

All of it happens in worker threads, a node's answer at a time. A block whose bytes prove wrong at any step is asked of
the next owner. What no owner could give is told by key, so that the caller can name the ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Final, NamedTuple

from holdfast.access import Access
from holdfast_core.model.block import verify
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.blocks.reader import BlockReader, Unreadable

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

    def __init__(self, access: Access, pool: NodePool, executor: Executor) -> None:
        """Bind to an operation."""
        self._access = access
        self._reader = BlockReader(pool, access.layouts, access.capability, executor=executor)
        self._ring = access.ring
        self._opener = access.ring.opener()

    async def read(self, entries: Sequence[Entry], sink: Sink, *, block_bytes: int) -> ContentDamage | None:
        """Read `entries` into `sink`; returns what could not be read, or None.

        `block_bytes` is about the size of a block, for batching. The caller bounds the number of entries.

        Raises:
            HoldfastError: DENIED, KEY_MISMATCH, or what the sink raises.
        """
        await self._access.freshen()
        bases: dict[bytes, bytes] = {}
        base_ids = {entry.base_id for entry in entries if entry.base_id}
        if base_ids:
            unreadable = await self._reader.fetch_into(base_ids, self._base_consumer(bases), block_bytes=block_bytes)
            if unreadable:
                return _damage(unreadable, entries)
        places: dict[bytes, list[Entry]] = {}
        for entry in entries:
            places.setdefault(entry.block_id, []).append(entry)
        consumer = self._consumer(places, bases, sink)
        unreadable = await self._reader.fetch_into(places, consumer, block_bytes=block_bytes)
        return _damage(unreadable, entries) if unreadable else None

    def _base_consumer(
        self, bases: dict[bytes, bytes]
    ) -> Callable[[Sequence[bytes], Sequence[memoryview]], Sequence[bytes]]:
        def consume(ids: Sequence[bytes], bodies: Sequence[memoryview]) -> Sequence[bytes]:
            refused = []
            for block_id, body in zip(ids, bodies, strict=True):
                try:
                    bases[block_id] = self._opener.open(verify(block_id, body))
                except HoldfastError as error:
                    _only_corrupt(error)
                    refused.append(block_id)
            return refused

        return consume

    def _consumer(
        self, places: dict[bytes, list[Entry]], bases: dict[bytes, bytes], sink: Sink
    ) -> Callable[[Sequence[bytes], Sequence[memoryview]], Sequence[bytes]]:
        opener, ring = self._opener, self._ring

        def consume(ids: Sequence[bytes], bodies: Sequence[memoryview]) -> Sequence[bytes]:
            refused = []
            opened: list[tuple[int, bytes]] = []
            for block_id, body in zip(ids, bodies, strict=True):
                try:
                    block = verify(block_id, body)
                    plain, opened_with = b"", None
                    for entry in places[block_id]:
                        if opened_with != entry.base_id:
                            plain = opener.open(block, base_plain=bases.get(entry.base_id), base_id=entry.base_id)
                            ring.check_fingerprint(plain, entry.fingerprint, block_id=block_id)
                            opened_with = entry.base_id
                        _check_length(entry, plain)
                        opened.append((entry.key, plain))
                except HoldfastError as error:
                    _only_corrupt(error)
                    refused.append(block_id)
            if opened:
                sink(opened)
            return refused

        return consume


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
