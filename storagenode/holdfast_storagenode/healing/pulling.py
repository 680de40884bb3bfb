"""Pulls from a peer what a node lacks of one tenant in some partitions: a listing, then batches, several in flight.

Nothing that a peer says is believed: ids must be of the partition and in order, stamps at most the present collection
epoch, bytes those of their ids. Memory is bounded by a page of a listing and `FETCHES_AT_ONCE` batches.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Final

from holdfast_core.model.block import SealedView, check_form, verify_view
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import BATCH_BLOCKS_MAX, BATCH_BYTES_TARGET, SEALED_BYTES_MAX
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.logs import Log
from holdfast_storagenode.core import NodeCore
from holdfast_storagenode.healing.courtesy import Courtesy
from holdfast_storagenode.healing.peers import Fetched, FreshEpoch, Peers
from holdfast_storagenode.healing.plan import cut_batches
from holdfast_storagenode.store import BlockEntry, BlockStore, Sealed, Verdict

FETCHES_AT_ONCE: Final = 4

# A call costs as much as moving a megabyte; an answer comes in messages of BATCH_BYTES_TARGET all the same.
FETCH_BYTES_TARGET: Final = 4 * BATCH_BYTES_TARGET

# A peer that lists so many blocks which it then cannot give is not asked for more of them now.
_LOST_PER_LISTING_MAX: Final = 4096


@dataclass(slots=True)
class Pulled:
    """What came of a pull.

    Attributes:
        cut_short: whether the peer listed, or may have listed, more than was looked at.
        deferred: blocks of other kinds that are lacking.
        lost: ids that it listed and did not give.
    """

    cut_short: bool = False
    deferred: list[BlockEntry] = field(default_factory=list)
    lost: list[bytes] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Kept:
    """What came of a batch: what was lacking, what came meanwhile, what the peer did not give, what was wrong of it."""

    fresh: tuple[BlockEntry, ...]
    present: tuple[BlockEntry, ...]
    lost: tuple[bytes, ...]
    wrong: tuple[bytes, ...]


class Puller:
    """Pulls for one node; belongs to one event loop."""

    def __init__(
        self,
        core: NodeCore,
        peers: Peers,
        *,
        fresh_epoch: FreshEpoch,
        courtesy: Courtesy,
        clock: Clock,
        log: Log,
    ) -> None:
        """Pull into `core` from `peers`; `fresh_epoch` is asked where a stamp is newer than what is known."""
        self._core = core
        self._peers = peers
        self._fresh_epoch = fresh_epoch
        self._clock = clock
        self._log = log
        self._courtesy = courtesy
        self._slots = asyncio.Semaphore(FETCHES_AT_ONCE)
        self._troubles: dict[tuple[str, str], str] = {}

    async def pull(
        self, node_id: str, *, partitions: Sequence[int], tenant: int, kinds: frozenset[int], urgent: bool = False
    ) -> Pulled:
        """Pull what `node_id` lists of ascending partitions and this node lacks, of `kinds`; durable on return.

        What the peer cannot or will not do is in the answer, never raised. What is `urgent` is not done gently.

        Raises:
            HoldfastError: what this node's own store raises.
        """
        pulled = Pulled()
        async with plain_task_group() as group:
            after = (-1, b"")
            pages = self._peers.listing(node_id, partitions=partitions, tenant=tenant)
            async with aclosing(pages):
                while len(pulled.lost) < _LOST_PER_LISTING_MAX:
                    page = await self._next_page(node_id, pages.__anext__)
                    if page is None:
                        pulled.cut_short = True
                        break
                    if not page:
                        break
                    places = [(self._core.cluster.partition_of(entry.block_id), entry.block_id) for entry in page]
                    if not _is_of(partitions, page, places, after):
                        self.note_trouble(node_id, "lists what is not of the partition, not in order, or no block")
                        pulled.cut_short = True
                        break
                    after = places[-1]
                    lacking = await self._lacking(node_id, tenant, page)
                    if lacking is None:
                        pulled.cut_short = True
                        break
                    wanted = [entry for entry in lacking if entry.kind in kinds]
                    pulled.deferred += [entry for entry in lacking if entry.kind not in kinds]
                    await self._fetch_all(group, node_id, tenant, wanted, pulled, urgent=urgent)
                else:
                    pulled.cut_short = True
        return pulled

    async def pull_listed(
        self, node_id: str, *, tenant: int, entries: Sequence[BlockEntry], urgent: bool = False
    ) -> Pulled:
        """Pull what `node_id` listed before, as far as it is still lacking; as `pull`.

        Raises:
            HoldfastError: what this node's own store raises.
        """
        pulled = Pulled()
        async with plain_task_group() as group:
            for at in range(0, len(entries), BATCH_BLOCKS_MAX):
                lacking = await self._lacking(node_id, tenant, entries[at : at + BATCH_BLOCKS_MAX])
                if lacking is None:
                    pulled.cut_short = True
                    break
                await self._fetch_all(group, node_id, tenant, lacking, pulled, urgent=urgent)
        return pulled

    async def fetch(self, node_id: str, *, tenant: int, entries: Sequence[BlockEntry]) -> list[bytes]:
        """Fetch blocks and keep them under the stamps of `entries`; return the ids that the peer did not give.

        Raises:
            HoldfastError: what this node's own store raises.
        """
        pulled = Pulled()
        await self._fetch(node_id, tenant, entries, pulled)
        return pulled.lost

    async def note_lost(self, tenant: int, ids: Sequence[bytes]) -> None:
        """Write down which of the blocks that some peer did not give are not here from any.

        Raises:
            HoldfastError: what this node's own store raises.
        """
        healing = self._core.healing
        verdicts = await self._core.executor.run(self._core.store.has, tenant, ids)
        for block_id, verdict in zip(ids, verdicts, strict=True):
            if verdict is Verdict.OK:
                healing.forget(tenant, block_id)
            else:
                healing.unrepaired(tenant, block_id, now_s=self._clock.monotonic_s())

    def note_trouble(self, node_id: str, why: str, *, about: str = "blocks") -> None:
        """Log what is wrong with a peer, once until it changes; "" for nothing. `about` tells kinds apart."""
        if why and self._troubles.get((node_id, about)) != why:
            self._log.warning("trouble with a peer", peer=node_id, about=about, why=why)
        self._troubles[node_id, about] = why

    async def _next_page(
        self, node_id: str, read: Callable[[], Awaitable[list[BlockEntry]]]
    ) -> list[BlockEntry] | None:
        """Return the next page of a listing, [] at its end, None where the peer failed."""
        try:
            return await read()
        except StopAsyncIteration:
            return []
        except HoldfastError as error:
            self.note_trouble(node_id, error.message)
            return None

    async def _fetch_all(
        self,
        group: asyncio.TaskGroup,
        node_id: str,
        tenant: int,
        wanted: Sequence[BlockEntry],
        pulled: Pulled,
        *,
        urgent: bool,
    ) -> None:
        """Start to fetch, as soon as there is room; what comes of it is in `pulled` when `group` ends."""

        async def fetch(batch: Sequence[BlockEntry]) -> None:
            async with self._courtesy.piece(urgent=urgent):
                await self._fetch(node_id, tenant, batch, pulled)

        for batch in cut_batches(wanted, bytes_max=FETCH_BYTES_TARGET, blocks_max=BATCH_BLOCKS_MAX):
            await self._slots.acquire()
            fetching = group.create_task(fetch(batch))
            fetching.add_done_callback(lambda _: self._slots.release())

    async def _lacking(self, node_id: str, tenant: int, page: Sequence[BlockEntry]) -> list[BlockEntry] | None:
        """Return what is not whole here, without what a collection removed, under stamps that are believed.

        None where a stamp is newer than what is known, and no coordinator can be asked.
        """
        store = self._core.store
        verdicts = await self._core.executor.run(store.has, tenant, [entry.block_id for entry in page])
        deleted = self._core.deleted
        lacking = [
            entry
            for entry, verdict in zip(page, verdicts, strict=True)
            if verdict is not Verdict.OK and deleted.outlives(tenant, entry.block_id, stamp=entry.stamp)
        ]
        newest = max((entry.stamp for entry in lacking), default=0)
        if newest > store.epoch:
            try:
                present = await self._fresh_epoch()
            except HoldfastError as error:
                self.note_trouble(node_id, f"lists a stamp of epoch {newest}, and {error.message}")
                return None
            lacking = [replace(entry, stamp=min(entry.stamp, present)) for entry in lacking]
        return lacking

    async def _fetch(self, node_id: str, tenant: int, batch: Sequence[BlockEntry], pulled: Pulled) -> None:
        ids = [entry.block_id for entry in batch]
        try:
            items = await self._peers.fetch(
                node_id, tenant=tenant, ids=ids, bytes_max=sum(entry.length for entry in batch)
            )
        except HoldfastError as error:
            self.note_trouble(node_id, error.message)
            pulled.lost += ids
            return
        came = await self._core.executor.run(_keep, self._core.store, tenant, batch, items)
        healing = self._core.healing
        for entry in came.present:
            healing.forget(tenant, entry.block_id)
        for entry in came.fresh:
            healing.repaired(tenant, entry.block_id, size_bytes=entry.length)
        if came.wrong:
            healing.wrong_blocks += len(came.wrong)
            self.note_trouble(node_id, f"sent wrong bytes for block {came.wrong[0].hex()}")
        pulled.lost += [*came.lost, *came.wrong]


def _is_of(
    partitions: Sequence[int], page: Sequence[BlockEntry], places: Sequence[tuple[int, bytes]], after: tuple[int, bytes]
) -> bool:
    """Return whether a page, whose entries have these places, lists what was asked for behind the place `after`."""
    asked = frozenset(partitions)
    return (
        all(low < high for low, high in pairwise([after, *places]))
        and all(partition in asked for partition, _ in places)
        and all(0 < entry.length <= SEALED_BYTES_MAX for entry in page)
    )


def _keep(store: BlockStore, tenant: int, batch: Sequence[BlockEntry], items: Sequence[Fetched]) -> _Kept:
    """Verify what a peer sent, and keep it, each block under its stamp. Runs in the executor."""
    good: dict[int, list[tuple[BlockEntry, Sealed]]] = {}
    lost: list[bytes] = []
    wrong: list[bytes] = []
    for entry, item in zip(batch, items, strict=True):
        if isinstance(item, Verdict):
            lost.append(entry.block_id)
            continue
        block = _verified(entry.block_id, item)
        if block is None:
            wrong.append(entry.block_id)
        else:
            good.setdefault(entry.stamp, []).append((replace(entry, length=len(block.data)), block))
    fresh: list[BlockEntry] = []
    present: list[BlockEntry] = []
    for stamp, blocks in good.items():
        verdicts = store.put(tenant, [block for _, block in blocks], stamp=stamp)
        for (entry, _), verdict in zip(blocks, verdicts, strict=True):
            (fresh if verdict is Verdict.OK else present).append(entry)
    return _Kept(tuple(fresh), tuple(present), tuple(lost), tuple(wrong))


def _verified(block_id: bytes, item: Fetched) -> SealedView | None:
    try:
        block = verify_view(block_id, item)  # type: ignore[arg-type]
        check_form(block.data)
    except HoldfastError as error:
        if error.code is not ErrorCode.CORRUPT:
            raise
        return None
    return block
