"""What a node does for its peers, on plain values. `PeerService` is its shell; a simulation calls it directly.

A partition is shown only to a node that owns it in a layout that this node knows, and blocks are taken only of
partitions that this node owns itself in the newest one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Final, TypeVar

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import (
    BATCH_BLOCKS_MAX,
    BATCH_BYTES_TARGET,
    IDS_PER_REQUEST_MAX,
    PARTITIONS_PER_COMPARISON_MAX,
)
from holdfast_storagenode.batch import Batch
from holdfast_storagenode.core import NodeCore
from holdfast_storagenode.fence import check_epoch
from holdfast_storagenode.healing.peers import Comparison, FreshEpoch
from holdfast_storagenode.living import Living
from holdfast_storagenode.store import BlockEntry, BlockStore, Found, Holding, Verdict

Shaped = TypeVar("Shaped")

# An answer of 100,000 entries takes 5 MB; a message takes 16 MiB.
_HOLDINGS_PER_ANSWER_MAX: Final = 100_000


class PeerSide:
    """One node as its peers see it. `caller` is the name that the caller's capability gives it."""

    def __init__(self, core: NodeCore, fresh_epoch: FreshEpoch) -> None:
        """Serve what `core` holds; `fresh_epoch` is asked where a peer names a newer collection epoch than is known."""
        self._core = core
        self._fresh_epoch = fresh_epoch

    async def compare(self, caller: str, partitions: Sequence[int], *, layout_epoch: int) -> Comparison:
        """Say which epoch this node fences, and then what it holds of the first of `partitions`, of one at least.

        Raises:
            HoldfastError: NOT_READY where the caller may have come to own a partition by a layout (`layout_epoch`) that
                this node does not know yet; DENIED where it owns one in none; LIMIT_EXCEEDED for too many.
        """
        if len(partitions) > PARTITIONS_PER_COMPARISON_MAX:
            raise HoldfastError(
                ErrorCode.LIMIT_EXCEEDED, f"a comparison takes at most {PARTITIONS_PER_COMPARISON_MAX} partitions"
            )
        store = self._core.store
        living = self._living()
        if layout_epoch > living.newest.epoch and not all(_owns(living, caller, place) for place in partitions):
            raise HoldfastError(
                ErrorCode.NOT_READY, f"this node has not heard of the layout of epoch {layout_epoch} yet; try again"
            )
        for partition in partitions:
            _check_owner(living, caller, partition)
        # Before the look at the store, so that whatever was written under older epochs is in it.
        fenced_epoch = self._core.fenced_epoch
        holdings = await self._core.executor.run(_holdings, store, partitions)
        return Comparison(fenced_epoch, holdings)

    async def page(
        self, caller: str, *, partitions: Sequence[int], tenant: int, after: bytes
    ) -> tuple[list[BlockEntry], Sequence[int]]:
        """List the next of a tenant's blocks in ascending partitions, in the first of them above the id `after`.

        Returns them and the partitions that are left to list, the first of them above the last id listed.

        Raises:
            HoldfastError: DENIED where the caller owns one of them in no living layout that this node knows;
                INVALID_ARGUMENT for partitions that do not ascend; LIMIT_EXCEEDED for too many.
        """
        if len(partitions) > PARTITIONS_PER_COMPARISON_MAX:
            raise HoldfastError(
                ErrorCode.LIMIT_EXCEEDED, f"a listing takes at most {PARTITIONS_PER_COMPARISON_MAX} partitions"
            )
        if any(low >= high for low, high in pairwise(partitions)):
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "the partitions of a listing ascend")
        living = self._living()
        for partition in partitions:
            _check_owner(living, caller, partition)
        return await self._core.executor.run(_page, self._core.store, tenant, partitions, after)

    async def fetch(
        self, caller: str, *, tenant: int, ids: Sequence[bytes], shape: Callable[[list[Found]], Shaped]
    ) -> tuple[int, Shaped]:
        """Read the first of `ids`; return how many that were, and what `shape` makes of them where they were read.

        Raises:
            HoldfastError: DENIED where the caller owns one of their partitions in no living layout; LIMIT_EXCEEDED.
        """
        store, living = self._core.store, self._living()
        for partition in _partitions(living, ids):
            _check_owner(living, caller, partition)
        found, shaped = await self._core.executor.run(_fetch, store, tenant, ids, shape)
        self._core.note_corrupt(tenant, ids, found)
        return len(found), shaped

    async def confirm(
        self, *, tenant: int, ids: Sequence[bytes], layout_epoch: int, collection_epoch: int
    ) -> list[Verdict]:
        """Say which blocks are durable here, and stamp those; the caller means to let go of its copies.

        Raises:
            HoldfastError: WRONG_EPOCH where `layout_epoch` is not the newest that this node knows; DENIED for a
                partition that this node does not own; LIMIT_EXCEEDED.
        """
        store, living = self._core.store, self._living()
        if layout_epoch != living.newest.epoch:
            raise HoldfastError(
                ErrorCode.WRONG_EPOCH,
                f"the newest layout here is of epoch {living.newest.epoch}, not {layout_epoch}",
                facts={"newest_epoch": str(living.newest.epoch)},
            )
        self._check_owned(living, ids)
        stamp = await self._believable(collection_epoch)
        verdicts = await self._core.executor.run(store.has, tenant, ids, stamp=max(store.epoch, stamp))
        self._core.note_corrupt(tenant, ids, verdicts)
        return verdicts

    async def hand(self, *, tenant: int, batch: Batch, collection_epoch: int) -> list[Verdict]:
        """Take blocks of partitions that this node owns, under the layout that the batch names; durable on return.

        Raises:
            HoldfastError: WRONG_EPOCH under an older layout than this node knows; DENIED for a partition that it does
                not own in the newest; as `NodeCore.put`.
        """
        living = self._living()
        check_epoch(batch.layout_epoch, newest=living.newest.epoch)
        self._check_owned(living, batch.ids)
        stamp = await self._believable(collection_epoch)
        return await self._core.put(tenant, batch, collection_epoch=stamp)

    async def _believable(self, collection_epoch: int) -> int:
        """Return the epoch that a peer names, or the present one if that is smaller: what is too young never goes."""
        if collection_epoch <= self._core.store.epoch:
            return collection_epoch
        return min(collection_epoch, await self._fresh_epoch())

    def _check_owned(self, living: Living, ids: Sequence[bytes]) -> None:
        newest = living.newest
        for partition in _partitions(living, ids):
            if self._core.node_id not in newest.owners_of(partition):
                raise HoldfastError(ErrorCode.DENIED, f"this node does not own partition {partition}")

    def _living(self) -> Living:
        living = self._core.cluster.living
        if living is None:
            raise HoldfastError(ErrorCode.NOT_READY, "the cluster has no layout yet")
        return living


PAGE_BLOCKS: Final = BATCH_BLOCKS_MAX
"""Entries of a page of a listing."""


def _owns(living: Living, caller: str, partition: int) -> bool:
    return partition < living.newest.partitions and living.owns(caller, partition)


def _check_owner(living: Living, caller: str, partition: int) -> None:
    if not _owns(living, caller, partition):
        raise HoldfastError(ErrorCode.DENIED, f"{caller} owns partition {partition} in no layout that this node knows")


def _partitions(living: Living, ids: Sequence[bytes]) -> set[int]:
    """Return the partitions of ids.

    Raises:
        HoldfastError: LIMIT_EXCEEDED for too many.
    """
    if len(ids) > IDS_PER_REQUEST_MAX:
        raise HoldfastError(ErrorCode.LIMIT_EXCEEDED, f"a request takes at most {IDS_PER_REQUEST_MAX} ids")
    return {living.newest.partition_of(block_id) for block_id in ids}


# What follows runs in the executor.


def _holdings(store: BlockStore, partitions: Sequence[int]) -> tuple[tuple[Holding, ...], ...]:
    answer: list[tuple[Holding, ...]] = []
    size = 0
    for partition in partitions:
        held = tuple(store.holdings(partition))
        size += len(held)
        if answer and size > _HOLDINGS_PER_ANSWER_MAX:
            break
        answer.append(held)
    return tuple(answer)


def _page(
    store: BlockStore, tenant: int, partitions: Sequence[int], after: bytes
) -> tuple[list[BlockEntry], Sequence[int]]:
    """Return at most a page of entries, and the partitions that are not listed to their ends."""
    listed: list[BlockEntry] = []
    for at, partition in enumerate(partitions):
        room = PAGE_BLOCKS - len(listed)
        entries = store.scan(tenant, partition=partition, after=after, limit=room)
        listed += entries
        if len(entries) == room:
            return listed, partitions[at:]
        after = b""
    return listed, ()


def _fetch(
    store: BlockStore, tenant: int, ids: Sequence[bytes], shape: Callable[[list[Found]], Shaped]
) -> tuple[list[Found], Shaped]:
    found = store.get(tenant, ids[:BATCH_BLOCKS_MAX], bytes_max=BATCH_BYTES_TARGET)
    return found, shape(found)
