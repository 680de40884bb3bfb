"""A layout change that settles at once: owners have everything, older epochs end, and the rest is let go."""

from __future__ import annotations

from holdfast import StateManager
from holdfast.testing import MemoryCluster
from holdfast_coordinator import keyspace
from holdfast_core.model.block import SealedBlock
from holdfast_core.model.layout import Layout
from holdfast_core.runtime.metadata.store import Delete, MetadataStore, Put
from holdfast_proto.v1.common_pb2 import Layout as LayoutMessage
from holdfast_proto.v1.records_pb2 import GrantRecord
from tests.client.rig import store_of


def metadata_of(cluster: MemoryCluster) -> MetadataStore:
    """The metadata of the cluster's coordinator."""
    return cluster._coordinator._store  # type: ignore[union-attr,no-any-return]


def change_layout(manager: StateManager, *remove: str) -> int:
    """Apply the next layout without these nodes; returns its epoch."""
    return manager.apply_layout(manager.plan_layout(remove=remove).previous_epoch, remove=remove).epoch


def settle(cluster: MemoryCluster, nodes: int) -> Layout:
    """Bring every block to its newest owners, end the older epochs, and let go of what nobody owns."""
    newest = cluster.run(_retire(cluster, nodes))
    assert isinstance(newest, Layout)
    return newest


def move(cluster: MemoryCluster, manager: StateManager, nodes: int, *remove: str) -> None:
    """Change the layout, and settle it."""
    change_layout(manager, *remove)
    settle(cluster, nodes)


async def _retire(cluster: MemoryCluster, nodes: int) -> Layout:
    store = metadata_of(cluster)
    snapshot = await store.snapshot([keyspace.LAYOUT_EPOCHS_PREFIX])
    items = sorted(snapshot.items, key=lambda item: item.key)
    newest = Layout.from_message(LayoutMessage.FromString(items[-1].value))
    _bring(cluster, nodes, newest)
    await store.txn(
        [],
        [
            *(Delete(item.key) for item in items[:-1]),
            Put(keyspace.LAYOUT_HEAD, str(newest.epoch).encode()),
            Put(keyspace.LAYOUT_GRANT, GrantRecord(epoch=newest.epoch).SerializeToString()),
        ],
    )
    for number in range(nodes):
        blocks = store_of(cluster, number)
        for tenant in blocks.tenants():
            held = [entry.block_id for entry in blocks.scan(tenant, partition=None, after=b"", limit=1_000_000)]
            foreign = [each for each in held if f"node-{number + 1}" not in newest.owners_of_block(each)]
            blocks.delete(tenant, foreign)
    return newest


def _bring(cluster: MemoryCluster, nodes: int, newest: Layout) -> None:
    for number in range(nodes):
        source = store_of(cluster, number)
        for tenant in source.tenants():
            for entry in source.scan(tenant, partition=None, after=b"", limit=1_000_000):
                (found,) = source.get(tenant, [entry.block_id], bytes_max=1 << 30)
                if isinstance(found, SealedBlock):
                    for owner in newest.owners_of_block(entry.block_id):
                        store_of(cluster, int(owner.removeprefix("node-")) - 1).put(tenant, [found])
