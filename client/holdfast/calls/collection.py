"""Collection: deleting what nothing needs any more, and asking what that would be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from holdfast.calls.core import AsyncCore, BlockingCore
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import BLOCK_ID_BYTES

if TYPE_CHECKING:
    from holdfast.collection import (
        BlockExplanation,
        CollectionProgress,
        CollectionRemote,
        CollectionReport,
        CollectionState,
        Reclaimable,
        StartedCollection,
    )

_POLL_S: Final = 0.5


class AsyncCollectionCalls(AsyncCore):
    """Calls about collection."""

    @property
    def _collection(self) -> CollectionRemote:
        from holdfast.collection import CollectionRemote  # what only saves does not wait for this to load

        return CollectionRemote(self._remote.endpoints)

    async def start_collection(self, *, dry_run: bool = False) -> StartedCollection:
        """Begin a collection of the whole cluster, which goes on whoever waits; one that is under way is found.

        Raises:
            HoldfastError: BUSY if a dry run is under way and this is to be none, or the other way round; NOT_READY
                before the first layout.
        """
        return await self._collection.start(dry_run=dry_run)

    async def collection_state(self) -> CollectionState:
        """Return the collection under way, and the reports of the last ones."""
        return await self._collection.state()

    async def collect(self, *, dry_run: bool = False, progress: CollectionProgress | None = None) -> CollectionReport:
        """Collect the whole cluster, or say what that would delete; return the report once it has ended.

        Raises:
            HoldfastError: as `start_collection`; UNREACHABLE if the coordinator that carried it out ended before it.
        """
        before = await self.collection_state()
        started = await self.start_collection(dry_run=dry_run)
        while True:
            state = await self.collection_state()
            if state.running is None or state.running.epoch != started.epoch:
                break
            if progress is not None:
                progress(state.running)
            await self._clock.sleep(_POLL_S)
        found = state.planned if dry_run else state.last
        if found is None or found.epoch < started.epoch or (dry_run and found == before.planned):
            raise HoldfastError(
                ErrorCode.UNREACHABLE,
                f"collection {started.epoch} left no report: the coordinator that carried it out ended; collect again",
            )
        return found

    async def explain_block(self, block_id: bytes | str) -> BlockExplanation:
        """Return what keeps a block, by its id (32 bytes, or 64 hexadecimal digits), and where its copies are.

        Raises:
            HoldfastError: INVALID_ARGUMENT for what is no id; LIMIT_EXCEEDED for a tenant with too many trees; MISSING,
                CORRUPT or UNREACHABLE if one of them cannot be read.
        """
        return await self._collection.explain(_block_id(block_id))

    async def reclaimable(self, vm_id: str, point_ids: Sequence[str] = ()) -> Reclaimable:
        """Return what forgetting points of a VM would free; all that live if none is named.

        Raises:
            HoldfastError: NOT_FOUND for an unknown VM or point; otherwise as `explain_block`.
        """
        return await self._collection.reclaimable(vm_id, point_ids)


class CollectionCalls(BlockingCore):
    """The blocking face of `AsyncCollectionCalls`."""

    def start_collection(self, *, dry_run: bool = False) -> StartedCollection:
        """Begin a collection of the whole cluster, or find the one that is under way."""
        return self._loop.run(self._core.start_collection(dry_run=dry_run))

    def collection_state(self) -> CollectionState:
        """Return the collection under way, and the reports of the last ones."""
        return self._loop.run(self._core.collection_state())

    def collect(self, *, dry_run: bool = False, progress: CollectionProgress | None = None) -> CollectionReport:
        """Collect the whole cluster, or say what that would delete; return the report once it has ended."""
        return self._loop.run(self._core.collect(dry_run=dry_run, progress=progress))

    def explain_block(self, block_id: bytes | str) -> BlockExplanation:
        """Return what keeps a block, and where its copies are."""
        return self._loop.run(self._core.explain_block(block_id))

    def reclaimable(self, vm_id: str, point_ids: Sequence[str] = ()) -> Reclaimable:
        """Return what forgetting points of a VM would free; all that live if none is named."""
        return self._loop.run(self._core.reclaimable(vm_id, point_ids))


def _block_id(given: bytes | str) -> bytes:
    if isinstance(given, str):
        try:
            given = bytes.fromhex(given)
        except ValueError:
            given = b""
    if len(given) != BLOCK_ID_BYTES:
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT,
            f"a block id has {BLOCK_ID_BYTES} bytes, {2 * BLOCK_ID_BYTES} hexadecimal digits",
        )
    return given
