"""A node without its network: the fence between layouts, what it knows of its cluster, what peers may ask of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future

import pytest

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.layout import Layout
from holdfast_core.runtime.clock import ManualClock
from holdfast_core.runtime.logs import get_log
from holdfast_proto.v1.cluster_pb2 import HeartbeatRequest, HeartbeatResponse
from holdfast_proto.v1.common_pb2 import NodeStatus
from holdfast_storagenode.batch import batch_of
from holdfast_storagenode.cluster import ClusterKnowledge
from holdfast_storagenode.core import NodeCore
from holdfast_storagenode.healing.deleted import DeletedMemory
from holdfast_storagenode.healing.plan import Stage, cut_batches, differing, plan_sync
from holdfast_storagenode.heartbeats import Heartbeats
from holdfast_storagenode.home import MemoryHome
from holdfast_storagenode.living import Living, enough, fenced_needed
from holdfast_storagenode.memory import MemoryStore
from holdfast_storagenode.putting import ByteWindow
from holdfast_storagenode.segments.observer import StoreObserver
from holdfast_storagenode.store import BlockEntry, Holding, PartitionOf, Sealed, Verdict
from tests.storagenode.blocks import make_block, make_blocks
from tests.storagenode.cluster import CLUSTER_ID, eventually
from tests.storagenode.fleet import AtOnce, Fleet, capability, everywhere, table

BLOCKS = make_blocks(4)
BATCH = batch_of(1, [(block.id, block.data) for block in BLOCKS])


def answer(*layouts: Layout, revision: int = 1, granted: int = 0) -> HeartbeatResponse:
    """Return what a coordinator answers."""
    response = HeartbeatResponse(cluster_id=CLUSTER_ID, layout_revision=revision, granted_epoch=granted)
    if layouts:
        response.layout.CopyFrom(layouts[0].to_message())
        response.older_layouts.extend(layout.to_message() for layout in layouts[1:])
    return response


class SlowStore(MemoryStore):
    """A store whose writes are durable when the test says so."""

    def __init__(self, partition_of: PartitionOf) -> None:
        super().__init__(partition_of)
        self.waiting: list[Future[list[Verdict]]] = []

    def submit(self, tenant: int, blocks: Sequence[Sealed], *, stamp: int = 0) -> Future[list[Verdict]]:
        """Queue a write."""
        self.waiting.append(Future())
        return self.waiting[-1]


class SlowHome(MemoryHome):
    """A home with such a store."""

    def open_store(self, partition_of: PartitionOf, observer: StoreObserver) -> SlowStore:
        """Open it."""
        return SlowStore(partition_of)


async def slow_core() -> NodeCore:
    core = NodeCore(SlowHome("a", random_bytes=bytes), AtOnce())
    await core.learn(answer(everywhere(1, ["a", "b", "c"])))
    return core


async def test_a_layout_is_fenced_once_no_write_under_an_older_one_is_under_way() -> None:
    core = await slow_core()
    store = core.store
    assert isinstance(store, SlowStore)
    writing = [asyncio.create_task(core.put(1, BATCH)) for _ in range(2)]
    await eventually(lambda: len(store.waiting) == 2)
    await core.learn(answer(everywhere(2, ["a", "b", "d"]), everywhere(1, ["a", "b", "c"]), revision=2))
    assert core.cluster.layout_epoch == 2
    assert core.fenced_epoch == 1
    with pytest.raises(HoldfastError) as refused:
        await core.put(1, BATCH)
    assert refused.value.code is ErrorCode.WRONG_EPOCH
    with pytest.raises(HoldfastError) as refused:
        await core.has(capability(), [BLOCKS[0].id], layout_epoch=1)
    assert refused.value.code is ErrorCode.WRONG_EPOCH
    store.waiting[0].set_result([Verdict.OK] * 4)
    await writing[0]
    assert core.fenced_epoch == 1
    store.waiting[1].set_exception(HoldfastError(ErrorCode.DISK_FULL, "full"))
    with pytest.raises(HoldfastError):
        await writing[1]
    assert core.fenced_epoch == 2
    status = await core.status(address="x", zone="z", now_unix_ms=5)
    assert status.layout_epoch == 2


async def test_a_client_that_goes_away_leaves_its_write_under_way() -> None:
    core = await slow_core()
    store = core.store
    assert isinstance(store, SlowStore)
    writing = asyncio.create_task(core.put(1, BATCH))
    await eventually(lambda: len(store.waiting) == 1)
    writing.cancel()
    await asyncio.wait([writing])
    await core.learn(answer(everywhere(2, ["a", "b", "d"]), revision=2))
    assert core.fenced_epoch == 1, "the store may still make it durable"
    store.waiting[0].set_result([Verdict.OK] * 4)
    await core.settled()
    assert core.fenced_epoch == 2


async def test_a_write_under_a_layout_that_the_node_has_yet_to_hear_of_does_not_hold_it_back() -> None:
    core = await slow_core()
    store = core.store
    assert isinstance(store, SlowStore)
    writing = asyncio.create_task(core.put(1, batch_of(2, [(BLOCKS[0].id, BLOCKS[0].data)])))
    await eventually(lambda: len(store.waiting) == 1)
    await core.learn(answer(everywhere(2, ["a", "b", "d"]), revision=2))
    assert core.fenced_epoch == 2
    store.waiting[0].set_result([Verdict.OK])
    await writing


def test_layouts_never_go_back_and_come_as_a_set() -> None:
    one, two = everywhere(1, ["a", "b", "c"]), everywhere(2, ["a", "b", "d"])
    known = ClusterKnowledge()
    for response in (
        answer(two, one, revision=7),
        answer(one, revision=3),
        answer(revision=7),
        answer(two, revision=6, granted=2),
    ):
        news = known.judge(response)
        if news is not None:
            known.take(news)
    assert known.living == Living((two, one))
    news = known.judge(answer(two, revision=8, granted=2))
    assert news is not None
    known.take(news)
    assert known.living == Living((two,), 2)
    assert known.living.may_drop
    assert ClusterKnowledge(news).living == known.living, "what is saved says the same"


def test_what_is_old_at_once_is_not_saved() -> None:
    known = ClusterKnowledge()
    response = answer(everywhere(1, ["a", "b", "c"]))
    response.peer_capability = "secret"
    response.nodes.add(node_id="b", address="1.2.3.4:5")
    news = known.judge(response)
    assert news is not None
    assert b"secret" not in news.SerializeToString()
    known.take(news)
    known.hear(response)
    assert known.judge(response) is None
    assert (known.peer_capability, known.peers["b"].address) == ("secret", "1.2.3.4:5")


def test_an_older_layout_of_another_placement_is_refused() -> None:
    known = ClusterKnowledge(answer(everywhere(1, ["a", "b", "c"])))
    other = table(1, [("a", "b", "c")] * 16, nodes=["a", "b", "c"])
    with pytest.raises(HoldfastError) as refused:
        known.judge(answer(everywhere(2, ["a", "b", "c"]), other, revision=2))
    assert refused.value.code is ErrorCode.MISMATCH


async def test_a_fresh_epoch_is_one_that_was_read_after_the_question() -> None:
    core = NodeCore(MemoryHome("a", random_bytes=bytes), AtOnce())
    sent: list[HeartbeatRequest] = []
    gate = asyncio.Event()

    async def send(request: HeartbeatRequest) -> HeartbeatResponse:
        sent.append(request)
        response = answer(everywhere(1, ["a", "b", "c"]))
        response.collection_epoch = len(sent)
        await gate.wait()
        return response

    async def status() -> NodeStatus:
        return await core.status(address="x", zone="z", now_unix_ms=1)

    beats = Heartbeats(
        core,
        send,
        incarnation=b"i",
        interval_s=1.0,
        status=status,
        clock=ManualClock(),
        log=get_log("test"),
    )
    running = asyncio.create_task(beats.run())
    await eventually(lambda: len(sent) == 1)
    asked = asyncio.create_task(beats.fresh_epoch())
    gate.set()
    assert await asked == 2, "the heartbeat that was under way does not count"
    assert core.store.epoch >= 2
    assert sent[1].layout_revision == 1
    running.cancel()
    await asyncio.wait([running])


async def test_a_partition_is_shown_only_to_who_owns_it() -> None:
    fleet = Fleet("a", "b", "c", "d")
    fleet.tell(table(1, [("a", "b"), ("a", "c")] * 4, nodes=["a", "b", "c", "d"]))
    await fleet.beat()
    await fleet.put("a", BLOCKS)
    side, newest = fleet["a"].healing.peer_side, fleet["a"].core.cluster.layout
    assert newest is not None
    assert len((await side.compare("b", [0, 2], layout_epoch=1)).holdings) == 2
    block = next(block for block in make_blocks(100) if newest.partition_of(block.id) == 1)
    for work in (
        lambda: side.compare("b", [0, 1], layout_epoch=1),
        lambda: side.compare("d", [0], layout_epoch=1),
        lambda: side.compare("b", [8], layout_epoch=1),
        lambda: side.page("b", partitions=[1], tenant=1, after=b""),
        lambda: side.fetch("b", tenant=1, ids=[block.id], shape=list),
    ):
        with pytest.raises(HoldfastError) as refused:
            await work()
        assert refused.value.code is ErrorCode.DENIED
    with pytest.raises(HoldfastError) as refused:
        await side.compare("d", [0], layout_epoch=2)
    assert refused.value.code is ErrorCode.NOT_READY, "a newer layout may make it an owner"


async def test_blocks_are_taken_and_confirmed_only_by_who_owns_them() -> None:
    fleet = Fleet("a", "b", "c", "d")
    fleet.tell(table(1, [("a", "b"), ("a", "c")] * 4, nodes=["a", "b", "c", "d"]))
    await fleet.beat()
    newest = fleet["a"].core.cluster.layout
    assert newest is not None
    block = next(block for block in make_blocks(100) if newest.partition_of(block.id) == 1)
    side = fleet["b"].healing.peer_side
    given = batch_of(1, [(block.id, block.data)])
    for work in (
        side.hand(tenant=1, batch=given, collection_epoch=0),
        side.confirm(tenant=1, ids=[block.id], layout_epoch=1, collection_epoch=0),
    ):
        with pytest.raises(HoldfastError) as refused:
            await work
        assert refused.value.code is ErrorCode.DENIED
    side = fleet["c"].healing.peer_side
    old = batch_of(0, [(block.id, block.data)])
    for epoch, work in (
        (0, side.hand(tenant=1, batch=old, collection_epoch=0)),
        (2, side.confirm(tenant=1, ids=[block.id], layout_epoch=2, collection_epoch=0)),
    ):
        with pytest.raises(HoldfastError) as refused:
            await work
        assert refused.value.code is ErrorCode.WRONG_EPOCH, epoch
    wrong = batch_of(1, [(block.id, make_block(7).data)])
    with pytest.raises(HoldfastError) as refused:
        await side.hand(tenant=1, batch=wrong, collection_epoch=0)
    assert refused.value.code is ErrorCode.CORRUPT
    assert await side.hand(tenant=1, batch=given, collection_epoch=0) == [Verdict.OK]
    assert fleet["c"].ids() == {block.id}


async def test_a_peer_cannot_make_blocks_younger_than_the_present() -> None:
    fleet = Fleet("a", "b", "c")
    fleet.tell(everywhere(1, ["a", "b", "c"]))
    fleet.epoch = 3
    await fleet.beat()
    side = fleet["a"].healing.peer_side
    fleet.epoch = 5
    assert await side.hand(tenant=1, batch=BATCH, collection_epoch=4_000_000_000) == [Verdict.OK] * 4
    ids = [block.id for block in BLOCKS]
    await side.confirm(tenant=1, ids=ids, layout_epoch=1, collection_epoch=4_000_000_000)
    assert set(fleet["a"].stamps().values()) == {5}


def test_how_many_old_owners_it_takes() -> None:
    three, five = everywhere(1, ["a", "b", "c"]), everywhere(2, ["a", "b", "c", "d", "e"])
    assert (fenced_needed(three), fenced_needed(five)) == (2, 3)
    living = Living((everywhere(3, ["d", "e", "f"]), five, three))
    assert enough(living, 0, {"a", "b", "c"})
    assert not enough(living, 0, {"a", "d", "e"}), "one of the first layout"
    assert not enough(living, 0, {"a", "b"}), "two of the second"
    assert enough(Living((three,)), 0, set())
    left = Living((everywhere(3, ["d", "e", "f"]), three))
    assert not enough(left, 0, {"a"}, None), "who is registered is not known"
    assert not enough(left, 0, {"a"}, {"a", "b", "d"})
    assert enough(left, 0, {"a"}, {"a", "d"})
    assert not enough(left, 0, {"a"}, {"c", "d"}), "the one that is left has to be looked at"
    assert enough(left, 0, {"a", "b"}, {"c", "d"}), "what these two had is whole"
    assert enough(left, 0, set(), {"d"}), "nothing is left to look at"


def test_owners_that_were_given_up_are_not_waited_for() -> None:
    living = Living((everywhere(2, ["c", "d", "e"]), everywhere(1, ["a", "b", "c"])))
    assert not enough(living, 0, {"c"}), "who is registered is not known"
    assert not enough(living, 0, {"c"}, registered={"b", "c", "d", "e"}), "b may have what c has not"
    assert enough(living, 0, {"c"}, registered={"c", "d", "e"})
    assert not enough(living, 0, {"d", "e"}, registered={"c", "d", "e"}), "c is left, and has to be looked at"
    assert enough(living, 0, set(), registered={"d", "e"}), "nobody is left to look at"


def test_the_plan_asks_only_owners_that_are_up_about_what_they_own() -> None:
    layout = table(1, [("a", "b"), ("a", "c"), ("a", "b"), ("b", "c")], nodes=["a", "b", "c"])
    living, pending = Living((layout,)), {0: Stage.ALL, 1: Stage.ALL, 2: Stage.URGENT}
    ranks = {0: 2, 1: 1, 2: 2}
    first = plan_sync(living, pending, ranks, node_id="a", up={"b"}, partitions_max=10)
    assert first is not None
    assert (first.partitions, first.sources, first.live_owners) == ((1,), {}, 1)
    del pending[1]
    second = plan_sync(living, pending, ranks, node_id="a", up={"b"}, partitions_max=10)
    assert second is not None
    assert (second.stage, second.partitions, second.sources) == (Stage.URGENT, (2,), {"b": (2,)})
    assert plan_sync(living, {}, ranks, node_id="a", up={"b"}, partitions_max=10) is None


def test_only_what_may_hold_more_is_listed() -> None:
    own = (Holding(1, 2, b"x"), Holding(2, 1, b"y"))
    theirs = (Holding(1, 2, b"x"), Holding(2, 1, b"z"), Holding(3, 1, b"w"))
    assert differing(own, theirs) == (2, 3)
    assert differing(own, ()) == ()


def test_batches_are_cut_by_bytes_and_by_count() -> None:
    entries = [BlockEntry(bytes([number]) * 32, length, 0) for number, length in enumerate((5, 5, 50, 1, 1, 1, 1))]
    cut = cut_batches(entries, bytes_max=10, blocks_max=3)
    assert [[entry.length for entry in batch] for batch in cut] == [[5, 5], [50], [1, 1, 1], [1]]


def test_deleted_ids_are_remembered_to_a_bound() -> None:
    memory = DeletedMemory(2)
    memory.add(1, [b"a", b"b"], cutoff=5)
    memory.add(1, [b"a"], cutoff=4)
    memory.add(1, [b"c"], cutoff=6)
    assert len(memory) == 2
    assert memory.outlives(1, b"b", stamp=0), "the oldest went"
    assert not memory.outlives(1, b"a", stamp=4), "cut-offs never go back"
    assert memory.outlives(1, b"a", stamp=5)
    assert memory.outlives(2, b"a", stamp=0)


@pytest.mark.slow
async def test_a_window_lets_in_by_turns_and_forgets_who_gave_up() -> None:
    window = ByteWindow(10)
    await window.enter(8)
    first, second = asyncio.create_task(window.enter(5)), asyncio.create_task(window.enter(2))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not second.done(), "it stands behind the first"
    first.cancel()
    await second
    window.leave(8)
    window.leave(2)
    await window.enter(10)
