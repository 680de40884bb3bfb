"""What owners said counts while the layouts are those that they were asked under, and no longer."""

from __future__ import annotations

from typing import Any, cast

import pytest

from holdfast_coordinator import keyspace
from holdfast_coordinator.barrier import Barrier, Findings, not_durable
from holdfast_coordinator.damage import Damage
from holdfast_coordinator.durability import Durability
from holdfast_coordinator.keyspace import TenantKeyspace
from holdfast_coordinator.metrics import CoordinatorMetrics
from holdfast_coordinator.records import each
from holdfast_coordinator.view import ClusterView
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.clock import SystemClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import MetadataStore, Put
from holdfast_core.runtime.metrics import new_registry
from holdfast_proto.v1 import state_pb2
from holdfast_proto.v1.common_pb2 import Layout
from tests.coordinator.content import cluster, random_blocks, seal_volume
from tests.coordinator.faults import FaultyStore
from tests.coordinator.rig import coordinator, refused, ring_of
from tests.coordinator.test_commit import TOTAL, save_blocks

SPACE = TenantKeyspace(1)


async def next_epoch(store: MetadataStore) -> None:
    """Make a layout with the same owners under the next epoch."""
    items = (await store.snapshot([keyspace.LAYOUT_EPOCHS_PREFIX])).items
    layout = Layout.FromString(max(items, key=lambda item: item.key).value)
    layout.epoch += 1
    await store.txn(
        [],
        [
            Put(keyspace.layout_epoch(layout.epoch), layout.SerializeToString()),
            Put(keyspace.LAYOUT_HEAD, str(layout.epoch).encode()),
        ],
    )


@pytest.mark.parametrize("code", [ErrorCode.MISSING, ErrorCode.NOT_DURABLE, ErrorCode.UNREACHABLE])
async def test_a_check_that_fails_while_the_layouts_change_is_made_anew(store: SqliteStore, code: ErrorCode) -> None:
    async with coordinator(store) as client:
        await client.form_layout()
        view, clock = ClusterView(store), SystemClock()
        nobody = cast("Any", None)
        damage = Damage(store, SPACE, nobody, view, nobody, nobody, nobody)
        durability = Durability(
            damage=damage, view=view, barrier=nobody_asks, metrics=CoordinatorMetrics(new_registry(), clock)
        )

        async def fails(barrier: Barrier, damaged: frozenset[bytes]) -> Findings:
            raise HoldfastError(code, "not there")

        async def fails_late(barrier: Barrier, damaged: frozenset[bytes]) -> Findings:
            await next_epoch(store)
            raise not_durable([bytes(32)])

        await refused(code, durability.still(None, fails, collection_epoch=1))
        assert await durability.still(None, fails_late, collection_epoch=1) is None
        await refused(code, durability.still(None, fails, collection_epoch=1))


def nobody_asks(layout_set: object, collection_epoch: int) -> Barrier:
    """A barrier for checks that fail by themselves."""
    return cast("Barrier", None)


async def test_damage_is_not_recorded_once_the_layouts_have_changed() -> None:
    inner = await SqliteStore.open(":memory:", SystemClock())
    store = FaultyStore(inner)
    try:
        async with cluster(store) as running:
            client = running.client
            slots = random_blocks(1, range(10))
            snapshot = await save_blocks(client, slots)
            grant = (await client.begin(takeover=True)).grant
            _, sealed = seal_volume(ring_of(grant.keys), slots, total=TOTAL)
            gone = sealed.blocks[3].id
            await running.destroy(grant, gone)
            report = state_pb2.ReportDamageRequest(block_ids=gone, resource_id=snapshot.point_id)
            store.before_next_commit(lambda: next_epoch(inner), about="/damage/ids/")
            await refused(ErrorCode.CONFLICT, client.state("ReportDamage", report))
            assert [item async for item in each(inner, SPACE.damage_ids_prefix)] == []
            assert (await client.state("ReportDamage", report)).recorded == 1
    finally:
        await inner.close()
