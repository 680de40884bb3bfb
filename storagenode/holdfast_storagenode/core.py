"""What a storage node does for its clients, on plain values: no gRPC, no threads of its own, no clock.

The services are shells over this, and a simulation runs it as it stands. A node knows its cluster from what `learn` is
told, opens its store once the placement is known, and takes writes behind the fence. It belongs to one event loop; all
that blocks goes through the executor.

To build one: `core = NodeCore(home, executor)`, `await core.open()`, then `await core.learn(answer)` for each answer to
a heartbeat. What its peers may ask of it is `healing.serving.PeerSide(core)`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from holdfast_core.model.block import SealedView
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import BATCH_BLOCKS_MAX, BATCH_BYTES_TARGET
from holdfast_core.runtime.capability import KINDS, Capability
from holdfast_proto.v1.cluster_pb2 import HeartbeatResponse
from holdfast_proto.v1.common_pb2 import NodeStatus
from holdfast_storagenode.batch import Batch, verified_blocks
from holdfast_storagenode.cluster import ClusterKnowledge
from holdfast_storagenode.fence import Fence, check_epoch
from holdfast_storagenode.healing.deleted import DeletedMemory
from holdfast_storagenode.healing.status import HealingStatus
from holdfast_storagenode.home import NodeHome
from holdfast_storagenode.listing import ScanPart, scan_part
from holdfast_storagenode.segments.observer import StoreObserver
from holdfast_storagenode.store import BlockEntry, BlockStore, Found, StoreStatus, SubmittingStore, Verdict, kind_of
from holdfast_storagenode.workers import Executor

Shaped = TypeVar("Shaped")


class NodeCore:
    """One node without its network.

    Attributes:
        node_id: its name.
        cluster: what it knows of its cluster.
        executor: where work that blocks is done.
        deleted: which blocks a collection removed here since the start.
        healing: how its copies stand.
        client_calls: how many batches clients have put, read and asked about since it started.
        lapses: how often its lease ended while it ran, so that it may have missed writes.
    """

    def __init__(self, home: NodeHome, executor: Executor, observer: StoreObserver | None = None) -> None:
        """Prepare a node; nothing is opened yet. `observer` hears of the store's events."""
        self.node_id = home.identity.node_id
        self.cluster = ClusterKnowledge()
        self.executor = executor
        self.deleted = DeletedMemory()
        self.healing = HealingStatus()
        self.client_calls = 0
        self.lapses = 0
        self._home = home
        self._observer = observer if observer is not None else StoreObserver()
        self._store: BlockStore | None = None
        self._fence = Fence()
        self._writing: set[asyncio.Future[list[Verdict]]] = set()
        self._on_loss: Callable[[int, Sequence[bytes]], None] = lambda tenant, ids: None

    async def open(self) -> None:
        """Read what was saved, and open the store if the placement is known.

        Raises:
            HoldfastError: as `NodeHome.load_cluster` and `NodeHome.open_store`.
        """
        saved = self._home.load_cluster()
        if saved is not None:
            self.cluster.take(saved)
        await self._open_store()

    async def learn(self, response: HeartbeatResponse) -> bool:
        """Take over a coordinator's answer: save what is new, then let it count; returns whether anything was.

        The store hears of the collection epoch before anybody can ask for it.

        Raises:
            HoldfastError: as `ClusterKnowledge.judge`; as `NodeHome.open_store`; INTERNAL if the disk failed.
        """
        news = self.cluster.judge(response)
        if news is not None:
            await self.executor.run(self._home.save_cluster, news)
            self.cluster.take(news)
        await self._open_store()
        if self._store is not None:
            await self.executor.run(self._store.learn_epoch, response.collection_epoch)
        self.cluster.hear(response)
        return news is not None

    def on_loss(self, heard: Callable[[int, Sequence[bytes]], None]) -> None:
        """Let `heard(tenant, ids)` know of copies that were found corrupt, or missed although this node owns them."""
        self._on_loss = heard

    @property
    def store(self) -> BlockStore:
        """The store.

        Raises:
            HoldfastError: NOT_READY before the placement is known.
        """
        if self._store is None:
            raise HoldfastError(
                ErrorCode.NOT_READY, "the cluster has no layout yet; this node takes and serves no blocks until then"
            )
        return self._store

    @property
    def opened(self) -> bool:
        """Whether there is a store."""
        return self._store is not None

    @property
    def fenced_epoch(self) -> int:
        """The newest layout epoch of which no write under an older one is under way here any more."""
        return self._fence.fenced_epoch(self.cluster.layout_epoch)

    def store_status(self) -> StoreStatus:
        """Say how the store is, or what it will be while there is none."""
        if self._store is not None:
            return self._store.status()
        capacity_bytes = self._home.capacity_bytes()
        return StoreStatus(
            capacity_bytes=capacity_bytes,
            used_bytes=0,
            free_bytes=capacity_bytes,
            block_count=0,
            quarantined_count=0,
            full=False,
            failed=False,
        )

    async def status(self, *, address: str, zone: str, now_unix_ms: int) -> NodeStatus:
        """Return what a heartbeat says of this node. The epoch that it names is the fenced one."""
        store = await self.executor.run(self.store_status)
        return NodeStatus(
            node_id=self.node_id,
            address=address,
            zone=zone,
            capacity_bytes=store.capacity_bytes,
            used_bytes=store.used_bytes,
            free_bytes=store.free_bytes,
            block_count=store.block_count,
            quarantined_count=store.quarantined_count,
            up=True,
            full=store.full or store.failed,
            last_seen_unix_ms=now_unix_ms,
            layout_epoch=self.fenced_epoch,
            healing=self.healing.message(collection_epoch=0 if self._store is None else self._store.epoch),
        )

    async def put(
        self, tenant: int, batch: Batch, *, kinds: frozenset[int] = KINDS, collection_epoch: int = 0
    ) -> list[Verdict]:
        """Verify and keep a batch, stamped with the larger of `collection_epoch` and the newest that is known.

        It is under way, for the fence, until it has settled, also if the caller is gone by then.

        Raises:
            HoldfastError: NOT_READY, WRONG_EPOCH for a batch under an older layout, CORRUPT or DENIED for one with a
                block that is wrong or of another kind; as `BlockStore.put`.
        """
        store = self.store
        self.client_calls += 1
        self._fence.enter(batch.layout_epoch, newest=self.cluster.layout_epoch)
        # Owned: kept in `_writing` until it has settled, which `settled` waits for.
        writing = asyncio.ensure_future(
            self.executor.run_and_settle(_keep, store, tenant, batch, kinds, collection_epoch)
        )
        self._writing.add(writing)
        writing.add_done_callback(partial(self._settle, batch.layout_epoch))
        return await asyncio.shield(writing)

    async def get(
        self, capability: Capability, ids: Sequence[bytes], shape: Callable[[list[Found]], Shaped]
    ) -> tuple[int, Shaped]:
        """Read the first of `ids`; return how many that were, and what `shape` makes of them where they were read.

        Raises:
            HoldfastError: NOT_READY.
        """
        self.client_calls += 1
        found, shaped = await self.executor.run(_read, self.store, capability, ids, shape)
        self._note_losses(capability.tenant, ids, found)
        return len(found), shaped

    async def has(
        self, capability: Capability, ids: Sequence[bytes], *, layout_epoch: int, verify: bool = False
    ) -> list[Verdict]:
        """Say which blocks are held, and stamp them if the capability has a collection epoch.

        Raises:
            HoldfastError: NOT_READY; WRONG_EPOCH under an older layout (0 is under none).
        """
        store = self.store
        if layout_epoch:
            check_epoch(layout_epoch, newest=self.cluster.layout_epoch)
        self.client_calls += 1
        verdicts = await self.executor.run(_has, store, capability, ids, verify)
        self.note_corrupt(capability.tenant, ids, verdicts)
        return verdicts

    async def scan(
        self, capability: Capability, part: ScanPart, *, limit: int
    ) -> tuple[list[BlockEntry], ScanPart | None]:
        """List up to `limit` blocks of a part; return those of the capability's kinds, and what is left to list.

        Raises:
            HoldfastError: NOT_READY.
        """
        entries, rest = await self.executor.run(scan_part, self.store, capability.tenant, part, limit=limit)
        return [entry for entry in entries if entry.kind in capability.kinds], rest

    async def delete(self, capability: Capability, ids: Sequence[bytes], *, cutoff: int) -> list[Verdict]:
        """Remove blocks that are stamped below `cutoff`.

        Raises:
            HoldfastError: NOT_READY; INVALID_ARGUMENT for no cut-off; as `BlockStore.delete`.
        """
        if not cutoff:
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "a delete names its cut-off; no block is stamped below 0")
        verdicts = await self.executor.run(_delete, self.store, capability, ids, cutoff)
        for block_id, verdict in zip(ids, verdicts, strict=True):
            if verdict is Verdict.OK:
                # It may have been set aside as corrupt, with no peer to give it.
                self.healing.forget(capability.tenant, block_id)
        gone = (Verdict.OK, Verdict.MISSING)
        self.deleted.add(
            capability.tenant,
            [block_id for block_id, verdict in zip(ids, verdicts, strict=True) if verdict in gone],
            cutoff=cutoff,
        )
        return verdicts

    async def settled(self) -> None:
        """Wait until every write that was accepted has settled."""
        while self._writing:
            await asyncio.wait(self._writing)

    async def close(self) -> None:
        """Wait for the writes under way, make everything durable and release the store's files."""
        await self.settled()
        if self._store is not None:
            await self.executor.run(self._store.close)

    def note_corrupt(self, tenant: int, ids: Sequence[bytes], verdicts: Sequence[Found]) -> None:
        """Pass on which of `ids` were found corrupt."""
        lost = [block_id for block_id, verdict in zip(ids, verdicts, strict=False) if verdict is Verdict.CORRUPT]
        if lost:
            self._on_loss(tenant, lost)

    def _note_losses(self, tenant: int, ids: Sequence[bytes], found: Sequence[Found]) -> None:
        """Pass on what was found corrupt, and what was missed of the partitions that this node owns."""
        self.note_corrupt(tenant, ids, found)
        layout = self.cluster.layout
        missed = [
            block_id
            for block_id, item in zip(ids, found, strict=False)
            if item is Verdict.MISSING and layout is not None and self.node_id in layout.owners_of_block(block_id)
        ]
        if missed:
            self._on_loss(tenant, missed)

    def _settle(self, epoch: int, writing: asyncio.Future[list[Verdict]]) -> None:
        self._writing.discard(writing)
        self._fence.leave(epoch)

    async def _open_store(self) -> None:
        layout = self.cluster.layout
        if self._store is None and layout is not None:
            self._store = await self.executor.run(self._home.open_store, layout.partition_of, self._observer)


# What follows runs in the executor.


def _keep(
    store: BlockStore, tenant: int, batch: Batch, kinds: frozenset[int], collection_epoch: int
) -> Future[list[Verdict]]:
    blocks: list[SealedView] = verified_blocks(batch, kinds)
    stamp = max(store.epoch, collection_epoch)
    if isinstance(store, SubmittingStore):
        return store.submit(tenant, blocks, stamp=stamp)
    done: Future[list[Verdict]] = Future()
    done.set_result(store.put(tenant, blocks, stamp=stamp))
    return done


def _read(
    store: BlockStore, capability: Capability, ids: Sequence[bytes], shape: Callable[[list[Found]], Shaped]
) -> tuple[list[Found], Shaped]:
    """Return verdicts as they were, and what `shape` makes of what the capability may see."""
    found = store.get(capability.tenant, ids[:BATCH_BLOCKS_MAX], bytes_max=BATCH_BYTES_TARGET)
    reached = capability.kinds_for("get")
    seen = [item if isinstance(item, Verdict) or kind_of(item.data) in reached else Verdict.DENIED for item in found]
    return found, shape(seen)


def _has(store: BlockStore, capability: Capability, ids: Sequence[bytes], verify: bool) -> list[Verdict]:
    # Who only looks keeps nothing alive; who works under a collection epoch leans on what it finds.
    epoch = capability.collection_epoch
    verdicts = store.has(capability.tenant, ids, verify=verify, stamp=max(store.epoch, epoch) if epoch else 0)
    if capability.kinds == KINDS:
        return verdicts
    kinds = store.kinds(capability.tenant, ids)
    return [
        verdict if kind is None or kind in capability.kinds else Verdict.DENIED
        for verdict, kind in zip(verdicts, kinds, strict=True)
    ]


def _delete(store: BlockStore, capability: Capability, ids: Sequence[bytes], cutoff: int) -> list[Verdict]:
    if capability.kinds == KINDS:
        return store.delete(capability.tenant, ids, cutoff=cutoff)
    kinds = store.kinds(capability.tenant, ids)
    allowed = [block_id for block_id, kind in zip(ids, kinds, strict=True) if kind is None or kind in capability.kinds]
    deleted = iter(store.delete(capability.tenant, allowed, cutoff=cutoff))
    return [next(deleted) if kind is None or kind in capability.kinds else Verdict.DENIED for kind in kinds]
