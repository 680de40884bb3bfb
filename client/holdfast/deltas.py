"""Deltas: changed blocks coded against the block that their place held before (DESIGN section 3, ADR 0093).

A sealer leaves such blocks waiting in their span. Here their bases are fetched, and they are sealed in worker threads
while the spans behind are read; what a delta does not make smaller by a quarter is coded plain.

A base is the parent's block at that place, or that of the base (a template) where the parent has none, and never a
delta: the successor of a delta is coded against the delta's own base. It is of the key epoch that the session seals
under, so that no delta keeps an old key alive. A base that cannot be had costs the saving and nothing else.

Fetching pays on a database's pages and not on files that were newly written, so it is tried before it is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Executor
from typing import Final

from holdfast.bases import BaseFetcher
from holdfast.spans import FingerprintCache, Reference, SealedSpan, Waiting, is_tried
from holdfast_core.model.block import Codec, SealedBlock, Sealer
from holdfast_core.model.limits import MIB

TRIES_FIRST: Final = 64
TRIES_REMEMBERED: Final = 128
PROBE_EVERY: Final = 16
MANY: Final = 16
SPANS_IN_VAIN_MAX: Final = 4
_TRIES_OF_MANY: Final = 8
BASES_BYTES_MAX: Final = 32 * MIB
_SEALED_AT_ONCE: Final = 8


class Trials:
    """Whether deltas pay in this session. Pure.

    A span with many candidates finds out by trying some of its own: a database's pages lie together, and so do files
    that were newly written. Where several such spans in a row were in vain, sealers leave only one block in
    `PROBE_EVERY` waiting, until one of those is a delta again.

    Candidates that are alone or few in their span go by what became of the others like them. The first `TRIES_FIRST`
    are tried; from then on all are while deltas pay, else one in `PROBE_EVERY`.
    """

    def __init__(self) -> None:
        """Know nothing yet."""
        self._begun = 0
        self._tried = 0
        self._used = 0
        self._spans_in_vain = 0

    @property
    def every(self) -> int:
        """One in how many candidates sealers are to leave waiting."""
        return 1 if self._spans_in_vain < SPANS_IN_VAIN_MAX else PROBE_EVERY

    def note_span(self, tried: int, used: int) -> None:
        """Take note of a span that tried some of its many candidates, or those that its sealer left it."""
        if pays(tried, used):
            self._spans_in_vain = 0
        else:
            self._spans_in_vain += 1

    @property
    def known(self) -> bool:
        """Whether enough of the scattered candidates were tried to tell of them."""
        return self._tried >= TRIES_FIRST

    @property
    def scattered_every(self) -> int:
        """One in how many scattered candidates is to be tried."""
        return 1 if not self.known or pays(self._tried, self._used) else PROBE_EVERY

    def begin(self, wanted: int) -> int:
        """Return how many of `wanted` scattered candidates may be tried before more is known."""
        allowed = max(0, min(wanted, TRIES_FIRST - self._begun))
        self._begun += allowed
        return allowed

    def note(self, tried: int, used: int) -> None:
        """Take note of scattered candidates that were tried, and of how many became deltas."""
        self._tried += tried
        self._used += used
        while self._tried > TRIES_REMEMBERED:
            # The older half of what is remembered weighs less and less.
            self._tried -= self._tried // 2
            self._used -= self._used // 2


def pays(tried: int, used: int) -> bool:
    """Return whether so many deltas of so many tries are worth going on."""
    return 4 * used >= tried


class _Room:
    """Bytes that may be held at once; who wants more than there is at all gets all of it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._free = most
        self._changed = asyncio.Condition()

    async def take(self, size: int) -> int:
        """Wait until there is room; returns what to give back."""
        size = min(size, self._most)
        async with self._changed:
            await self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        return size

    async def give_back(self, size: int) -> None:
        """Make room for others."""
        async with self._changed:
            self._free += size
            self._changed.notify_all()


class DeltaCoder:
    """Seals what the spans of a session left waiting. Belongs to its event loop; spans may overlap."""

    def __init__(self, fetcher: BaseFetcher, sealer: Sealer, executor: Executor, cache: FingerprintCache) -> None:
        """Bind to a session; `cache` is the one of volumes that are coded with Zstandard."""
        self._fetcher = fetcher
        self._sealer = sealer
        self._executor = executor
        self._cache = cache
        self._trials = Trials()
        self._noted = asyncio.Event()
        self._room = _Room(BASES_BYTES_MAX)
        # Content that is being sealed, by fingerprint: who meets it again meanwhile waits for what comes of it.
        self._under_way: dict[bytes, asyncio.Future[Reference | None]] = {}

    @property
    def every(self) -> int:
        """One in how many of the blocks that could be deltas is to be left waiting; 0 for none."""
        return self._trials.every if self._fetcher.usable else 0

    async def complete(self, sealed: asyncio.Future[SealedSpan], *, block_bytes: int, every: int) -> SealedSpan:
        """Wait for a span, and return it when none of its blocks waits any more.

        One in `every` of the blocks that could have waited does.

        Raises:
            HoldfastError: what sealing the span raised, and as `BaseFetcher.fetch`.
        """
        span = await sealed
        waiting, span.waiting = span.waiting, []
        while waiting:
            waiting = await self._seal_new(span, waiting, block_bytes, every)
        return span

    async def _seal_new(
        self, span: SealedSpan, waiting: Sequence[Waiting], block_bytes: int, every: int
    ) -> list[Waiting]:
        """Seal what nobody has sealed or is sealing; returns what is left, which is nothing unless another failed."""
        own: list[Waiting] = []
        shared: list[tuple[Waiting, asyncio.Future[Reference | None]]] = []
        for item in waiting:
            fingerprint = span.fingerprints[item.position]
            met = self._cache.get(fingerprint)
            if met is not None:
                _reuse(span, item, met)
            elif fingerprint in self._under_way:
                shared.append((item, self._under_way[fingerprint]))
            else:
                self._under_way[fingerprint] = asyncio.get_running_loop().create_future()
                own.append(item)
        try:
            if every > 1 and own:
                self._trials.note_span(len(own), await self._try(span, own, block_bytes))
            elif len(own) >= MANY:
                await self._seal_many(span, own, block_bytes)
            else:
                await self._seal_few(span, own, block_bytes)
        finally:
            for item in own:
                fingerprint = span.fingerprints[item.position]
                self._under_way.pop(fingerprint).set_result(self._cache.get(fingerprint))
        left = []
        for item, outcome in shared:
            reference = await outcome
            if reference is None:
                left.append(item)
            else:
                _reuse(span, item, reference)
        return left

    async def _seal_many(self, span: SealedSpan, items: Sequence[Waiting], block_bytes: int) -> None:
        """Seal blocks, and try some of them to learn whether to try all."""
        step = len(items) // _TRIES_OF_MANY
        some = items[::step]
        used = await self._try(span, some, block_bytes)
        self._trials.note_span(len(some), used)
        rest = [item for at, item in enumerate(items) if at % step]
        if pays(len(some), used):
            await self._try(span, rest, block_bytes)
        else:
            await self._seal_all(span, rest, {})

    async def _seal_few(self, span: SealedSpan, items: Sequence[Waiting], block_bytes: int) -> None:
        """Seal blocks, and try them if that was worth it for others like them."""
        while items and self._fetcher.usable and not self._trials.known:
            count = self._trials.begin(len(items))
            if count:
                used = await self._try(span, items[:count], block_bytes)
                self._trials.note(count, used)
                items = items[count:]
                self._noted.set()
                self._noted = asyncio.Event()
            else:
                await self._noted.wait()
        every = self._trials.scattered_every
        tried = [item for item in items if is_tried(span.fingerprints[item.position], every)]
        await self._seal_all(span, [item for item in items if item not in tried], {})
        self._trials.note(len(tried), await self._try(span, tried, block_bytes))

    async def _try(self, span: SealedSpan, items: Sequence[Waiting], block_bytes: int) -> int:
        """Fetch the bases of blocks and seal them; returns how many became deltas."""
        base_ids = {item.base_id for item in items} if self._fetcher.usable else set()
        if not base_ids:
            return await self._seal_all(span, items, {})
        taken = await self._room.take(len(base_ids) * block_bytes)
        try:
            bases = await self._fetcher.fetch(base_ids, block_bytes=block_bytes)
            return await self._seal_all(span, items, bases)
        finally:
            await self._room.give_back(taken)

    async def _seal_all(self, span: SealedSpan, items: Sequence[Waiting], bases: Mapping[bytes, bytes]) -> int:
        """Seal blocks in worker threads, against their bases where these are given; returns how many became deltas."""
        loop = asyncio.get_running_loop()
        groups = [items[at : at + _SEALED_AT_ONCE] for at in range(0, len(items), _SEALED_AT_ONCE)]
        sealed = [loop.run_in_executor(self._executor, _seal_group, self._sealer, group, bases) for group in groups]
        deltas = 0
        for group, future in zip(groups, sealed, strict=True):
            for item, (block, base_id) in zip(group, await future, strict=True):
                size = len(item.plain)
                reference = (block.id, base_id)
                span.references[item.position] = reference
                span.new.append((block, size))
                self._cache.put(span.fingerprints[item.position], reference)
                if base_id:
                    deltas += 1
                    span.delta_blocks += 1
                    span.delta_plain_bytes += size
                    span.delta_bytes += len(block.data)
        return deltas


def _reuse(span: SealedSpan, item: Waiting, reference: Reference) -> None:
    span.references[item.position] = reference
    span.reused_bytes += len(item.plain)


def _seal_group(
    sealer: Sealer, items: Collection[Waiting], bases: Mapping[bytes, bytes]
) -> list[tuple[SealedBlock, bytes]]:
    """Return each block and the id of its base, empty where it is coded plain; runs in a worker thread."""
    sealed = []
    for item in items:
        base = bases.get(item.base_id)
        if base is None:
            sealed.append((sealer.seal(item.plain, codec=Codec.ZSTD), b""))
            continue
        block = sealer.seal(item.plain, codec=Codec.ZSTD_DELTA, base=(item.base_id, base))
        sealed.append((block, item.base_id if block.codec is Codec.ZSTD_DELTA else b""))
    return sealed
