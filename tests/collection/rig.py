"""A cluster in one process whose collections can be started, watched and looked behind."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from holdfast_core.model.block import SealedBlock
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.metadata.store import MetadataStore
from holdfast_proto.v1 import state_pb2
from holdfast_proto.v1.blocks_pb2 import VERDICT_OK
from holdfast_proto.v1.collection_pb2 import (
    CollectionReport,
    GetCollectionRequest,
    GetCollectionResponse,
    StartCollectionRequest,
)
from holdfast_proto.v1.common_pb2 import Grant
from holdfast_proto.v1.records_pb2 import ObjectRecord, PointRecord, VolumeRecord
from holdfast_storagenode.memory import MemoryStore
from holdfast_storagenode.store import Verdict
from tests.coordinator.content import Cluster, Sealed, cluster, put, random_blocks, seal_object, seal_volume
from tests.coordinator.rig import Client, eventually, point_commit, ring_of

TOTAL = 300


@dataclass
class Saved:
    """A point or object that was made, and its blocks."""

    record: Any
    sealed: Sealed

    @property
    def ids(self) -> list[bytes]:
        """Ids of all its blocks, index nodes last."""
        return [block.id for block in self.sealed.everything]


@dataclass
class Collecting:
    """A cluster to collect in."""

    cluster: Cluster

    @property
    def client(self) -> Client:
        """A client of the coordinator."""
        return self.cluster.client

    async def begin(self, **fields: Any) -> Any:
        """Begin a point of `vm-1`."""
        return await self.client.begin(**fields)

    async def write(
        self,
        begun: Any,
        slots: Mapping[int, bytes],
        *,
        nodes: Sequence[str] = (),
        bases: Mapping[int, bytes] | None = None,
    ) -> tuple[VolumeRecord, Sealed]:
        """Seal a volume and put its blocks under the session's capability."""
        volume, sealed = seal_volume(ring_of(begun.grant.keys), slots, total=TOTAL, bases=bases)
        await put(begun.grant, sealed.everything, nodes=nodes)
        return volume, sealed

    async def commit(self, begun: Any, volume: VolumeRecord) -> PointRecord:
        """Commit a point of one volume."""
        made: PointRecord = await self.client.commit(point_commit(begun, [volume]))
        return made

    async def save(self, slots: Mapping[int, bytes], *, vm_id: str = "vm-1", **fields: Any) -> Saved:
        """Make a point of these blocks."""
        begun = await self.client.begin(vm_id, **fields)
        volume, sealed = await self.write(begun, slots)
        return Saved(await self.commit(begun, volume), sealed)

    async def save_object(self, cuts: Sequence[bytes], *, task_id: str = "task-1") -> Saved:
        """Make an object of these cuts."""
        nonce = random_blocks(len(cuts), [0])[0][:16]
        begun = await self.client.state("BeginObject", state_pb2.BeginObjectRequest(task_id=task_id, nonce=nonce))
        request, sealed = seal_object(begun, task_id, cuts)
        await put(begun.grant, sealed.everything)
        record: ObjectRecord = (await self.client.state("CommitObject", request)).object
        return Saved(record, sealed)

    async def forget(self, point_id: str) -> None:
        """Forget a point."""
        await self.client.state("ForgetPoint", state_pb2.ForgetPointRequest(point_id=point_id))

    async def start(self, *, dry_run: bool = False) -> Any:
        """Begin a collection."""
        return await self.client.collection("StartCollection", StartCollectionRequest(dry_run=dry_run))

    async def state(self) -> GetCollectionResponse:
        """Return how collection stands."""
        answer: GetCollectionResponse = await self.client.collection("GetCollection", GetCollectionRequest())
        return answer

    async def ended(self, epoch: int, *, dry_run: bool = False) -> CollectionReport:
        """Wait until a collection has ended; return its report."""

        async def over() -> bool:
            state = await self.state()
            found = state.planned if dry_run else state.last
            return not state.HasField("running") and found.epoch == epoch

        await eventually(over, f"collection {epoch} ends")
        state = await self.state()
        return state.planned if dry_run else state.last

    async def collect(self, *, dry_run: bool = False) -> CollectionReport:
        """Collect; return the report."""
        begun = await self.start(dry_run=dry_run)
        return await self.ended(begun.epoch, dry_run=dry_run)

    async def copies(
        self, grant: Grant, block_ids: Iterable[bytes], *, nodes: Iterable[str] | None = None
    ) -> dict[bytes, int]:
        """Return how many of the nodes (all, if none are named) have each block; the grant is a reader's."""
        ids = list(block_ids)
        counts = dict.fromkeys(ids, 0)
        async with NodePool() as pool:
            pool.update(grant.nodes)
            for node_id in self.cluster.nodes if nodes is None else nodes:
                verdicts = await pool.has_blocks(node_id, b"".join(ids), grant.capability)
                for block_id, verdict in zip(ids, verdicts, strict=True):
                    counts[block_id] += verdict == VERDICT_OK
        return counts

    def rot(self, node_id: str, block_ids: Iterable[bytes], *, tenant: int = 1) -> None:
        """Let a node's copies rot and be found rotten."""
        store = self.store_of(node_id)
        for block_id in block_ids:
            store.overwrite(tenant, block_id, b"rot")
            assert store.has(tenant, [block_id], verify=True) == [Verdict.CORRUPT]

    def store_of(self, node_id: str) -> MemoryStore:
        """Return what a node in memory keeps its blocks in."""
        store = self.cluster.nodes[node_id].core.store
        assert isinstance(store, MemoryStore)
        return store

    async def reader_grant(self, point: PointRecord) -> Grant:
        """Return what a reader of a point gets; it stamps nothing."""
        request = state_pb2.RefreshGrantRequest(resource_id=point.point_id)
        grant: Grant = (await self.client.state("RefreshGrant", request)).grant
        return grant


def ids_of(blocks: Iterable[SealedBlock]) -> list[bytes]:
    """Return ids."""
    return [block.id for block in blocks]


@asynccontextmanager
async def collecting(store: MetadataStore, **options: Any) -> AsyncIterator[Collecting]:
    """Run a cluster with nodes in memory."""
    async with cluster(store, **options) as made:
        yield Collecting(made)
