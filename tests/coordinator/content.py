"""Volumes and objects sealed with the model alone, and a cluster of real nodes to put their blocks on."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from holdfast_coordinator import keyspace
from holdfast_coordinator.collection.epochs import present_epoch
from holdfast_coordinator.keys.chain import KeyChain
from holdfast_coordinator.records import parse
from holdfast_core.model.block import Codec, Kind, SealedBlock
from holdfast_core.model.keys import KeyRing
from holdfast_core.model.limits import TREE_FAN_OUT
from holdfast_core.model.records import object_mac
from holdfast_core.model.tree import ObjectTreeBuilder, VolumeLeaf, VolumeTreeBuilder
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.capability import CAPABILITY_METADATA_KEY
from holdfast_core.runtime.clock import SystemClock
from holdfast_core.runtime.metadata.store import MetadataStore
from holdfast_proto.v1 import cluster_pb2, state_pb2
from holdfast_proto.v1.blocks_pb2 import VERDICT_OK, DeleteBlocksRequest, PutBlocksRequest, PutBlocksResponse
from holdfast_proto.v1.blocks_pb2_grpc import BlockServiceStub
from holdfast_proto.v1.common_pb2 import Grant
from holdfast_proto.v1.records_pb2 import CONSISTENCY_OFFLINE, ClusterRecord, VolumeRecord
from holdfast_storagenode.embedded import EmbeddedStorageNode
from holdfast_storagenode.healing.workers import HealingOptions
from tests.coordinator.rig import ADMIN_TOKEN, BLOCK_BYTES, Client, coordinator, eventually, master_keys, ring_of


@dataclass
class Sealed:
    """Sealed blocks by what they are for."""

    ring: KeyRing
    blocks: list[SealedBlock] = field(default_factory=list)
    index: list[SealedBlock] = field(default_factory=list)

    def keep(self, kind: Kind, plain: bytes) -> bytes:
        """Seal and remember a block; return its id."""
        index = kind is Kind.INDEX
        epoch = self.ring.structure_epoch_newest if index else self.ring.data_epoch_newest
        block = self.ring.sealer(kind, epoch).seal(plain, codec=Codec.STORED)
        (self.index if index else self.blocks).append(block)
        return block.id

    @property
    def everything(self) -> list[SealedBlock]:
        """All blocks, index nodes last."""
        return [*self.blocks, *self.index]


def seal_volume(
    ring: KeyRing,
    slots: Mapping[int, bytes],
    *,
    total: int,
    name: str = "root",
    bases: Mapping[int, bytes] | None = None,
) -> tuple[VolumeRecord, Sealed]:
    """Seal a volume of `total` positions that holds the given plaintexts and is zero elsewhere.

    `bases` are ids that positions name as bases, as if their blocks were deltas; a coordinator cannot tell.
    """
    based = bases or {}
    sealed = Sealed(ring)
    builder = VolumeTreeBuilder(total, lambda plain: sealed.keep(Kind.INDEX, plain))
    for leaf_index in sorted({slot // TREE_FAN_OUT for slot in slots}):
        here = sorted(slot for slot in slots if slot // TREE_FAN_OUT == leaf_index)
        builder.add_leaf(
            leaf_index,
            VolumeLeaf(
                slots=tuple(slot % TREE_FAN_OUT for slot in here),
                fingerprints=tuple(ring.fingerprint(slots[slot]) for slot in here),
                block_ids=tuple(sealed.keep(Kind.VOLUME, slots[slot]) for slot in here),
                base_ids=tuple(based.get(slot, b"") for slot in here),
            ),
        )
    record = VolumeRecord(
        name=name,
        size_bytes=total * BLOCK_BYTES,
        block_bytes=BLOCK_BYTES,
        root=builder.finish(),
        consistency=CONSISTENCY_OFFLINE,
        block_count=len(slots),
    )
    return record, sealed


def seal_object(
    begun: state_pb2.BeginObjectResponse, task_id: str, cuts: Sequence[bytes]
) -> tuple[state_pb2.CommitObjectRequest, Sealed]:
    """Seal an object of these cuts, with the commit that makes it visible."""
    ring = ring_of(begun.grant.keys)
    sealed = Sealed(ring)
    builder = ObjectTreeBuilder(lambda plain: sealed.keep(Kind.INDEX, plain))
    for cut in cuts:
        builder.add(ring.fingerprint(cut), sealed.keep(Kind.APPLICATION, cut), len(cut))
    root = builder.finish()
    size = sum(map(len, cuts))
    mac = object_mac(ring, tenant=ring.tenant, storage_id=begun.session_id, task_id=task_id, size_bytes=size, root=root)
    commit = state_pb2.CommitObjectRequest(
        session_id=begun.session_id, size_bytes=size, root=root, block_count=len(cuts), mac=mac
    )
    return commit, sealed


def random_blocks(seed: int, slots: Iterable[int]) -> dict[int, bytes]:
    """Return small random plaintexts for these positions."""
    source = random.Random(seed)
    return {slot: source.randbytes(64) for slot in slots}


async def put(grant: Grant, blocks: Sequence[SealedBlock], *, nodes: Sequence[str] = ()) -> None:
    """Put blocks on the nodes named, or on all."""
    async with NodePool() as pool:
        pool.update(grant.nodes)
        for node_id in nodes or pool.known():
            stream = pool.put_stream(
                node_id,
                grant.capability,
                serializer=PutBlocksRequest.SerializeToString,
                deserializer=PutBlocksResponse.FromString,
            )
            await stream.write(
                PutBlocksRequest(
                    sequence=1,
                    layout_epoch=grant.layouts[0].epoch,
                    block_ids=b"".join(block.id for block in blocks),
                    lengths=[len(block.data) for block in blocks],
                    blocks=b"".join(block.data for block in blocks),
                )
            )
            await stream.done_writing()
            answer = await stream.read()
            assert isinstance(answer, PutBlocksResponse)
            assert len(answer.verdicts) == len(blocks)


@dataclass
class Cluster:
    """A coordinator and real storage nodes in memory."""

    client: Client
    nodes: dict[str, EmbeddedStorageNode]
    store: MetadataStore

    async def is_ready(self) -> bool:
        """Whether the layout has formed and every node is up and knows it."""
        status = await self.client.cluster("GetClusterStatus", cluster_pb2.GetClusterStatusRequest())
        return status.state == "ready" and all(node.up and node.layout_epoch for node in status.nodes)

    async def destroy(self, grant: Grant, block_id: bytes) -> None:
        """Delete a block from every node, with a capability that no client gets."""
        item = await self.store.get(keyspace.CLUSTER)
        assert item is not None
        clock = SystemClock()
        chain = KeyChain(self.store, master_keys(), parse(item, ClusterRecord).message.cluster_id, clock)
        await chain.fresh()
        token = chain.capability_signer().mint(
            tenant=grant.keys.tenant,
            verbs=frozenset({"delete"}),
            kinds=frozenset({0, 1, 2}),
            ttl_s=60,
            now_unix_ms=clock.now_unix_ms(),
        )
        # As the next collection would, so that nodes refuse none that comes later.
        cutoff = (await present_epoch(self.store))[0] + 1
        async with NodePool() as pool:
            pool.update(grant.nodes)
            for node_id in pool.known():
                answer = await BlockServiceStub(pool.channel(node_id)).DeleteBlocks(
                    DeleteBlocksRequest(block_ids=block_id, cutoff=cutoff),
                    metadata=((CAPABILITY_METADATA_KEY, token),),
                )
                assert answer.verdicts == bytes([VERDICT_OK])


@asynccontextmanager
async def cluster(store: MetadataStore, *, nodes: int = 3, folder: Path | None = None) -> AsyncIterator[Cluster]:
    """Run a coordinator with storage nodes `node-1`…, in memory or below a folder, and a VM `vm-1`.

    The nodes repair nothing: these tests say on which nodes a block is.
    """
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(coordinator(store, nodes=nodes, node_lease_ttl_s=2.0))
        running: dict[str, EmbeddedStorageNode] = {}
        for number in range(1, nodes + 1):
            node = EmbeddedStorageNode(
                f"node-{number}",
                [client.address],
                zone=f"z{number}",
                heartbeat_s=0.2,
                token=ADMIN_TOKEN,
                data_dir=None if folder is None else folder / f"node-{number}",
                healing=HealingOptions(enabled=False),
            )
            await node.start()
            stack.push_async_callback(node.stop, 0.2)
            running[node.node_id] = node
        made = Cluster(client, running, store)
        await eventually(made.is_ready, "the cluster is ready")
        await client.register_vm()
        yield made
