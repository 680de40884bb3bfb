"""Bases of deltas: earlier blocks, fetched for several spans at once and opened where they can serve as one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from holdfast_core.model.block import Codec, Opener, parse_header, verify
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.blocks.reader import Consumer, Unreadable

FETCHES_MAX: Final = 2


class Fetching(Protocol):
    """What fetches blocks; see `holdfast_core.runtime.blocks.reader.BlockReader`."""

    async def fetch_into(self, block_ids: Iterable[bytes], consumer: Consumer, *, block_bytes: int) -> Unreadable:
        """Pass blocks to `consumer` in worker threads; return what could not be read."""
        ...


@dataclass(slots=True)
class _Batch:
    """Bases that several spans want, fetched as one."""

    wanted: dict[bytes, None] = field(default_factory=dict)
    bases: dict[bytes, bytes] = field(default_factory=dict)
    block_bytes: int = 0
    done: asyncio.Event = field(default_factory=asyncio.Event)


class BaseFetcher:
    """Fetches bases for one session. While fetches are under way, what others want gathers into the next one.

    Attributes:
        usable: false once nodes refuse to show data or cannot be reached; then there are no more bases.
    """

    def __init__(
        self, reader: Fetching, opener: Opener, *, key_epoch: int, damaged: Callable[[tuple[bytes, ...]], None]
    ) -> None:
        """Bind to a session that seals under `key_epoch`; `damaged` is told of blocks that no owner could give."""
        self.usable = True
        self._reader = reader
        self._opener = opener
        self._key_epoch = key_epoch
        self._damaged = damaged
        self._gathering: _Batch | None = None
        self._slots = asyncio.Semaphore(FETCHES_MAX)

    async def fetch(self, base_ids: Collection[bytes], *, block_bytes: int) -> Mapping[bytes, bytes]:
        """Return plaintexts by id: of those ids that can be had, name no delta, and are of the right key epoch.

        There may be others among them. The caller bounds how much is wanted at once.

        Raises:
            HoldfastError: what fetching raises; not for damage, nor for nodes that do not answer or refuse.
        """
        batch, begins = self._gathering, False
        if batch is None:
            batch, begins = _Batch(), True
            self._gathering = batch
        batch.wanted.update(dict.fromkeys(base_ids))
        batch.block_bytes = max(batch.block_bytes, block_bytes)
        if begins:
            await self._run(batch)
        else:
            await batch.done.wait()
        return batch.bases

    async def _run(self, batch: _Batch) -> None:
        """Wait until there may be one more fetch, then fetch what has gathered until then."""
        try:
            await self._slots.acquire()
            try:
                self._gathering = None
                await self._fill(batch)
            finally:
                self._slots.release()
        finally:
            if self._gathering is batch:
                self._gathering = None
            batch.done.set()

    async def _fill(self, batch: _Batch) -> None:
        def take(ids: Sequence[bytes], bodies: Sequence[memoryview]) -> Sequence[bytes]:
            return self._open(batch.bases, ids, bodies)

        if self.usable:
            try:
                unreadable = await self._reader.fetch_into(batch.wanted, take, block_bytes=batch.block_bytes)
            except HoldfastError as error:
                if error.code is not ErrorCode.DENIED:
                    raise
                self.usable = False
            else:
                # To wait for a node that does not answer, once more for each span, would cost more than deltas save.
                self.usable = self.usable and not unreadable.unreachable
                if unreadable.damaged:
                    self._damaged(unreadable.damaged)

    def _open(self, bases: dict[bytes, bytes], ids: Sequence[bytes], bodies: Sequence[memoryview]) -> Sequence[bytes]:
        """Open what can be a base; runs in worker threads. Returns the ids whose bytes are wrong."""
        refused = []
        for block_id, body in zip(ids, bodies, strict=True):
            try:
                block = verify(block_id, body)
                header = parse_header(block.data)
                if header.codec is not Codec.ZSTD_DELTA and header.key_epoch == self._key_epoch:
                    bases[block_id] = self._opener.open(block)
            except HoldfastError as error:
                if error.code is not ErrorCode.CORRUPT:
                    raise
                refused.append(block_id)
        return refused
