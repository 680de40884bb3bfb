"""What a node is told with each heartbeat: layouts that it does not know yet, the epochs, its peers, its token."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from holdfast_coordinator import keyspace
from holdfast_coordinator.grants import without_counters
from holdfast_coordinator.records import parse
from holdfast_core.model.errors import ErrorCode
from holdfast_core.model.layout.plan import LayoutPlan
from holdfast_core.model.limits import PEER_CAPABILITY_TTL_S
from holdfast_core.runtime.capability import Capability, CapabilityVerifier
from holdfast_core.runtime.clock import ManualClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import Put
from holdfast_proto.v1 import cluster_pb2
from holdfast_proto.v1.common_pb2 import NodeHealing, NodeState, NodeStatus
from holdfast_proto.v1.records_pb2 import GrantRecord
from tests.coordinator.healing_rig import Fleet, seat
from tests.coordinator.rig import Client, coordinator, refused


def _epochs(answer: Any) -> list[int]:
    return [answer.layout.epoch, *(layout.epoch for layout in answer.older_layouts)]


def peer_token(answer: Any, clock: ManualClock) -> Capability:
    """Return what the answer's token allows, verified as nodes do it."""
    keys = {key.key_id: key.public_key for key in answer.verifying_keys}
    return CapabilityVerifier(answer.cluster_id, keys).verify(answer.peer_capability, now_unix_ms=clock.now_unix_ms())


async def test_layouts_come_only_to_a_node_that_does_not_know_them(client: Client) -> None:
    answer = await client.beat(1)
    assert (_epochs(answer), answer.layout_revision > 0) == ([1], True)
    known = await client.beat(1, layout_revision=answer.layout_revision)
    assert (known.HasField("layout"), list(known.older_layouts)) == (False, [])
    assert known.layout_revision == answer.layout_revision
    await client.beat(4)
    await client.cluster("ApplyLayout", cluster_pb2.ApplyLayoutRequest(previous_epoch=1))
    news = await client.beat(1, layout_revision=answer.layout_revision)
    assert _epochs(news) == [2, 1]
    assert news.layout_revision > answer.layout_revision


async def test_of_nodes_that_report_at_once_one_has_the_first_layout_planned(
    store: SqliteStore, clock: ManualClock
) -> None:
    planned: list[LayoutPlan] = []

    async def computing(plan: Callable[[], LayoutPlan]) -> LayoutPlan:
        await asyncio.sleep(0.05)  # others report meanwhile
        planned.append(plan())
        return planned[-1]

    fleet = Fleet(await seat(store, clock, nodes=5, computing=computing), clock)
    answers = await asyncio.gather(*(fleet.beat(number) for number in range(1, 6)))
    assert [answer.layout.epoch for answer in answers] == [1] * 5
    assert len(planned) == 1


async def test_a_node_told_of_a_layout_by_one_coordinator_hears_of_no_older_one_from_another(
    store: SqliteStore, clock: ManualClock
) -> None:
    async with coordinator(store, clock=clock) as one, coordinator(store, clock=clock) as other:
        await one.form_layout()
        await one.beat(4)
        for epoch in range(1, 12):
            await one.beat(4, capacity_bytes=(1 << 40) + epoch)
            await one.cluster("ApplyLayout", cluster_pb2.ApplyLayoutRequest(previous_epoch=epoch))
            told = await one.beat(1)
            assert _epochs(await other.beat(1)) == _epochs(told)
            assert (await other.beat(1)).layout_revision == told.layout_revision


async def test_the_collection_epoch_is_the_stores_own_of_this_moment(client: Client, store: SqliteStore) -> None:
    for epoch in (2, 7, 8):
        await store.txn([], [Put(keyspace.COLLECTION_EPOCH, str(epoch).encode())])
        assert (await client.beat(1)).collection_epoch == epoch


async def test_the_grant_comes_with_the_layout_set_that_it_belongs_to(client: Client, store: SqliteStore) -> None:
    before = await client.beat(1)
    assert before.granted_epoch == 0
    head = await store.get(keyspace.LAYOUT_HEAD)
    assert head is not None
    grant = Put(keyspace.LAYOUT_GRANT, GrantRecord(epoch=1).SerializeToString())
    await store.txn([], [Put(keyspace.LAYOUT_HEAD, head.value), grant])
    after = await client.beat(1, layout_revision=before.layout_revision)
    assert after.granted_epoch == 1
    assert after.layout_revision > before.layout_revision
    assert _epochs(after) == [1]


async def test_a_nodes_token_is_its_own_and_lives_for_half_its_time_at_least(
    client: Client, clock: ManualClock
) -> None:
    first = await client.beat(1)
    token = peer_token(first, clock)
    assert (token.verbs, token.node, token.tenant) == (frozenset({"peer"}), "node-1", 0)
    assert token.kinds == {0, 1, 2}
    assert peer_token(await client.beat(2), clock).node == "node-2"
    clock.advance(PEER_CAPABILITY_TTL_S / 2 - 1)
    assert (await client.beat(1)).peer_capability == first.peer_capability
    clock.advance(2)
    renewed = await client.beat(1)
    assert renewed.peer_capability != first.peer_capability
    left_ms = peer_token(renewed, clock).expires_unix_ms - clock.now_unix_ms()
    assert PEER_CAPABILITY_TTL_S * 500 < left_ms <= PEER_CAPABILITY_TTL_S * 1000 + 1000


async def test_who_does_not_speak_for_a_node_gets_no_token_of_it(client: Client) -> None:
    agent = Client(client.address, token=await client.new_token("agent"))
    await client.bind(
        ("admin", "admin", "*"), ("agent", "joins", "node/node-9"), tenant="*", roles={"joins": ["cluster.join"]}
    )
    try:
        await refused(ErrorCode.DENIED, agent.beat(1))
        await refused(ErrorCode.ALREADY_EXISTS, client.beat(1, incarnation=b"x" * 16))
        assert (await agent.beat(9)).peer_capability
    finally:
        await agent.close()


async def test_a_node_hears_where_the_others_are_and_nothing_of_what_they_hold(
    client: Client, clock: ManualClock
) -> None:
    await client.beat(2, used_bytes=7, block_count=3, healing=NodeHealing(foreign_blocks=4))
    clock.advance(6)
    await client.beat(3)
    clock.advance(6)
    others = (await client.beat(1)).nodes
    assert [(node.node_id, node.up) for node in others] == [("node-2", False), ("node-3", True)]
    assert others[0] == NodeStatus(node_id="node-2", address="127.0.0.1:1026", zone="zone-2")


async def test_what_was_decided_of_a_node_is_not_its_own_to_say(client: Client, store: SqliteStore) -> None:
    await client.beat(1, state=NodeState(draining=True, out=True))
    item = await store.get(keyspace.node_status("node-1"))
    assert item is not None
    assert not parse(item, NodeStatus).message.HasField("state")
    await store.txn([], [Put(keyspace.node_state("node-2"), NodeState(weight_bytes=5).SerializeToString())])
    listed = (await client.cluster("ListNodes", cluster_pb2.ListNodesRequest())).nodes
    assert [node.state for node in listed] == [NodeState(), NodeState(weight_bytes=5), NodeState()]


@pytest.mark.parametrize("field", ["healing", "state"])
def test_a_tenant_is_not_told_how_nodes_heal(field: str) -> None:
    status = NodeStatus(node_id="node-1", healing=NodeHealing(repaired_bytes=9), state=NodeState(out=True))
    assert not without_counters(status).HasField(field)  # type: ignore[arg-type]
