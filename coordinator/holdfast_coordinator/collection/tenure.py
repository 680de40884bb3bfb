"""Who collects: one collection at a time over all coordinators, under a key with a lease.

The lease spares work and keeps reports apart. Nothing is safe because of it: a collection that has lost it, and goes on
for a moment, deletes nothing that is leaned on, because stamps never go back (docs/healing.md).
"""

from __future__ import annotations

from typing import Final

from holdfast_coordinator import keyspace
from holdfast_coordinator.collection.epochs import epoch_of
from holdfast_coordinator.transactions import attempt
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.metadata.store import Condition, CreateRevisionIs, MetadataStore, Put
from holdfast_proto.v1.collection_pb2 import CollectionReport

TTL_S: Final = 15.0
_PUBLISH_INTERVAL_S: Final = 1.0


class Tenure:
    """One collection's hold of the key."""

    def __init__(
        self, store: MetadataStore, clock: Clock, *, lease_id: int, create_revision: int, present_epoch: int
    ) -> None:
        """Take what the beginning made: the lease, the revision of the key, and the epoch that is the present one."""
        self._store = store
        self._clock = clock
        self._lease_id = lease_id
        self._present_epoch = present_epoch
        self.held: Condition = CreateRevisionIs(keyspace.COLLECTION_RUNNING, create_revision)
        self._create_revision = create_revision

    async def check(self) -> None:
        """Return if this is still the collection that runs.

        Raises:
            HoldfastError: CONFLICT if the lease ended or another collection raised the epoch; UNREACHABLE.
        """
        read = await self._store.snapshot([keyspace.COLLECTION_EPOCH, keyspace.COLLECTION_RUNNING])
        items = {item.key: item for item in read.items}
        running = items.get(keyspace.COLLECTION_RUNNING)
        if running is None or running.create_revision != self._create_revision:
            raise _superseded()
        if epoch_of(items.get(keyspace.COLLECTION_EPOCH)) != self._present_epoch:
            raise _superseded()

    async def keep(self) -> None:
        """Keep the lease until cancelled.

        Raises:
            HoldfastError: CONFLICT once it has ended.
        """
        kept_s = self._clock.monotonic_s()
        while True:
            await self._clock.sleep(TTL_S / 3)
            try:
                await self._store.keep_lease(self._lease_id)
            except HoldfastError as error:
                over = self._clock.monotonic_s() - kept_s >= TTL_S
                if error.code is ErrorCode.NOT_FOUND or over:
                    raise _superseded() from error
                if error.code is not ErrorCode.UNREACHABLE:
                    raise
            else:
                kept_s = self._clock.monotonic_s()

    async def publish(self, report: CollectionReport) -> None:
        """Write the report down once a second until cancelled, for all to see; what fails is written the next time.

        Raises:
            HoldfastError: what the store says, unless it is away.
        """
        while True:
            await self._clock.sleep(_PUBLISH_INTERVAL_S)
            written = Put(keyspace.COLLECTION_RUNNING, report.SerializeToString(), self._lease_id)
            try:
                await attempt(self._store, [self.held], [written])
            except HoldfastError as error:
                if error.code is not ErrorCode.UNREACHABLE:
                    raise

    async def let_go(self) -> None:
        """End the lease, and the key with it."""
        await self._store.revoke_lease(self._lease_id)


def _superseded() -> HoldfastError:
    return HoldfastError(
        ErrorCode.CONFLICT,
        "this collection lost its lease, or another one began; what it had begun is left to the next",
    )
