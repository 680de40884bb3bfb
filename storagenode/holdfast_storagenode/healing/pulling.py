"""Pulls from a peer what a node lacks of one tenant in one partition: a listing, then batches, several in flight.

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
from holdfast_storagenode.healing.peers import Fetched, FreshEpoch, Peers
from holdfast_storagenode.healing.plan import cut_batches
from holdfast_storagenode.store import BlockEntry, BlockStore, Sealed, Verdict

FETCHES_AT_ONCE: Final = 8

# A peer that lists so many blocks which it then cannot give is not asked for more of them now.
_LOST_PER_LISTING_MAX: Final = 4096


@dataclass(slots=True)
class Pulled:
    """What came of a pull.

    Attributes:
        whole: whether everything that the peer listed, of the kinds asked for, is here now.
        deferred: whether blocks of other kinds are lacking.
        lost: ids that it listed and did not give.
    """

    whole: bool = True
    deferred: bool = False
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

    def __init__(self, core: NodeCore, peers: Peers, *, fresh_epoch: FreshEpoch, clock: Clock, log: Log) -> None:
        """Pull into `core` from `peers`; `fresh_epoch` is asked where a stamp is newer than what is known."""
        self._core = core
        self._peers = peers
        self._fresh_epoch = fresh_epoch
        self._clock = clock
        self._log = log
        self._slots = asyncio.Semaphore(FETCHES_AT_ONCE)
        self._troubles: dict[tuple[str, str], str] = {}

    async def pull(self, node_id: str, *, partition: int, tenant: int, kinds: frozenset[int]) -> Pulled:
        """Pull what `node_id` lists and this node lacks, of `kinds`; durable on return.

        What the peer cannot or will not do is in the answer, never raised.

        Raises:
            HoldfastError: what this node's own store raises.
        """
        pulled = Pulled()
        async with plain_task_group() as group:
            after = b""
            pages = self._peers.listing(node_id, partition=partition, tenant=tenant)
            async with aclosing(pages):
                while pulled.whole or len(pulled.lost) < _LOST_PER_LISTING_MAX:
                    page = await self._next_page(node_id, pages.__anext__)
                    if page is None:
                        pulled.whole = False
                        break
                    if not page:
                        break
                    if not self._is_of(partition, page, after):
                        self.note_trouble(node_id, "lists what is not of the partition, not in order, or no block")
                        pulled.whole = False
                        break
                    after = page[-1].block_id
                    lacking = await self._lacking(node_id, tenant, page)
                    if lacking is None:
                        pulled.whole = False
                        break
                    wanted = [entry for entry in lacking if entry.kind in kinds]
                    pulled.deferred |= len(wanted) < len(lacking)
                    for batch in cut_batches(wanted, bytes_max=BATCH_BYTES_TARGET, blocks_max=BATCH_BLOCKS_MAX):
                        await self._slots.acquire()
                        fetching = group.create_task(self._fetch(node_id, tenant, batch, pulled))
                        fetching.add_done_callback(lambda _: self._slots.release())
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

    def _is_of(self, partition: int, page: Sequence[BlockEntry], after: bytes) -> bool:
        ids = [after, *(entry.block_id for entry in page)]
        return all(low < high for low, high in pairwise(ids)) and all(
            self._core.cluster.partition_of(entry.block_id) == partition and 0 < entry.length <= SEALED_BYTES_MAX
            for entry in page
        )

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
            pulled.whole = False
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
        if came.lost or came.wrong:
            pulled.whole = False
            pulled.lost += [*came.lost, *came.wrong]


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
