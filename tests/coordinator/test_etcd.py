"""Two coordinators at once over one real etcd: no point lost, none doubled, whatever meets at the same moment."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import pytest

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.metadata.etcd import EtcdStore
from holdfast_proto.v1 import cluster_pb2, state_pb2
from tests.coordinator.rig import Client, coordinator, empty_object_commit, eventually, refused, zero_commit
from tests.support.etcd import EtcdCluster

VMS = 3
WORKERS = 6
POINTS_PER_WORKER = 8


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with EtcdCluster(1, tmp_path_factory.mktemp("etcd")) as cluster:
        yield cluster


@pytest.fixture
async def pair(etcd: EtcdCluster) -> AsyncIterator[tuple[Client, Client]]:
    """Two coordinators that started at the same moment over an empty etcd."""
    await asyncio.to_thread(etcd.ctl, "del", "", "--prefix")
    async with AsyncExitStack() as stack:
        stores = [await EtcdStore.open(etcd.endpoints) for _ in range(2)]
        for store in stores:
            stack.push_async_callback(store.close)
        clients = await asyncio.gather(
            *(
                stack.enter_async_context(coordinator(store, session_ttl_s=3.0, node_lease_ttl_s=2.0, seed=seed))
                for seed, store in enumerate(stores)
            )
        )
        yield clients[0], clients[1]


async def _save_until_done(clients: tuple[Client, Client], vm_id: str, source: random.Random) -> str:
    """Make one point as an impatient client does: every call twice, to both coordinators in turn; retry if busy."""
    nonce = source.randbytes(16)
    while True:
        first, second = source.sample(clients, 2)
        request = state_pb2.BeginPointRequest(vm_id=vm_id, nonce=nonce, takeover=source.random() < 0.1)
        answers = await asyncio.gather(
            first.state("BeginPoint", request), second.state("BeginPoint", request), return_exceptions=True
        )
        won = [answer for answer in answers if not isinstance(answer, BaseException)]
        for answer in answers:
            if isinstance(answer, BaseException):
                assert isinstance(answer, HoldfastError), answer
                assert answer.code in (ErrorCode.BUSY, ErrorCode.CONFLICT), answer
        if not won:
            await asyncio.sleep(source.random() * 0.02)
            continue
        assert len({answer.session_id for answer in won}) == 1
        commit = zero_commit(won[0])
        results = await asyncio.gather(first.commit(commit), second.commit(commit), return_exceptions=True)
        made = [each for each in results if not isinstance(each, BaseException)]
        for each in results:
            if isinstance(each, BaseException):
                assert isinstance(each, HoldfastError), each
                assert each.code in (ErrorCode.SESSION_LAPSED, ErrorCode.CONFLICT), each
                assert not made or each.code is ErrorCode.CONFLICT, "a point is visible and its commit was refused"
        if made:
            assert all(point == made[0] for point in made)
            return str(made[0].point_id)
        nonce = source.randbytes(16)


@pytest.mark.slow
async def test_points_are_neither_lost_nor_doubled_under_contention(pair: tuple[Client, Client]) -> None:
    await pair[0].form_layout()
    for vm in range(VMS):
        await pair[vm % 2].register_vm(f"vm-{vm}")

    async def work(worker: int) -> list[tuple[str, str]]:
        source = random.Random(worker)
        vm_ids = [f"vm-{source.randrange(VMS)}" for _ in range(POINTS_PER_WORKER)]
        return [(vm_id, await _save_until_done(pair, vm_id, source)) for vm_id in vm_ids]

    acknowledged = [each for made in await asyncio.gather(*map(work, range(WORKERS))) for each in made]
    assert len(set(acknowledged)) == len(acknowledged) == WORKERS * POINTS_PER_WORKER
    for vm in range(VMS):
        expected = {point_id for vm_id, point_id in acknowledged if vm_id == f"vm-{vm}"}
        for client in pair:
            points = await client.points(f"vm-{vm}")
            assert {point.point_id for point in points} == expected
            assert [point.number for point in points] == list(range(1, len(expected) + 1))
    status = await pair[1].cluster("GetClusterStatus", cluster_pb2.GetClusterStatusRequest())
    assert (status.vm_count, status.point_count, status.session_count) == (VMS, len(acknowledged), 0)


async def test_two_that_start_at_once_make_one_cluster(pair: tuple[Client, Client]) -> None:
    answers = [await client.beat(1) for client in pair]
    assert answers[0].cluster_id == answers[1].cluster_id
    assert list(answers[0].verifying_keys) == list(answers[1].verifying_keys)
    assert len(answers[0].verifying_keys) == 1


async def test_the_first_layout_forms_once_whoever_gets_the_heartbeats(pair: tuple[Client, Client]) -> None:
    await asyncio.gather(*(pair[number % 2].beat(number) for number in range(1, 4)))
    layouts = [await client.cluster("GetLayout", cluster_pb2.GetLayoutRequest()) for client in pair]
    assert [layout.epoch for layout in layouts[0].layouts] == [1]
    assert layouts[0] == layouts[1]


@pytest.mark.slow
async def test_a_lease_is_carried_from_one_coordinator_to_the_other_and_ends_in_time(
    pair: tuple[Client, Client],
) -> None:
    lease_id = 0
    for client in (*pair, *pair):
        answer = await client.beat(1, lease_id=lease_id)
        assert lease_id in (0, answer.lease_id)
        lease_id = answer.lease_id

    async def down() -> bool:
        nodes = (await pair[1].cluster("ListNodes", cluster_pb2.ListNodesRequest())).nodes
        return not nodes[0].up

    assert not await down()
    # The lease has 2 s; etcd may take its time to expire leases, some seconds at most.
    await eventually(down, "the node is marked down", within_s=8)


@pytest.mark.slow
async def test_a_session_lapses_for_both(pair: tuple[Client, Client]) -> None:
    await pair[0].form_layout()
    await pair[0].register_vm()
    begun = await pair[0].begin()
    error = await refused(ErrorCode.BUSY, pair[1].begin())
    assert 0 < int(error.facts["seconds_left"]) <= 3

    async def free() -> bool:
        try:
            await pair[1].begin()
        except HoldfastError as error:
            if error.code is not ErrorCode.BUSY:
                raise
            return False
        return True

    await eventually(free, "the session lapses", within_s=10)
    for client in pair:
        await refused(ErrorCode.SESSION_LAPSED, client.commit(zero_commit(begun)))


async def test_objects_are_seen_by_both(pair: tuple[Client, Client]) -> None:
    await pair[0].form_layout()

    async def put(number: int) -> str:
        client = pair[number % 2]
        request = state_pb2.BeginObjectRequest(task_id="task", nonce=random.Random(number).randbytes(16))
        begun = await client.state("BeginObject", request)
        commit = empty_object_commit(begun, "task")
        return str((await pair[1 - number % 2].state("CommitObject", commit)).object.storage_id)

    made = await asyncio.gather(*map(put, range(10)))
    for client in pair:
        listed = (await client.state("ListObjects", state_pb2.ListObjectsRequest(task_id="task"))).objects
        assert {each.storage_id for each in listed} == set(made)
        assert [each.created_unix_ms for each in listed] == sorted(each.created_unix_ms for each in listed)


@pytest.mark.slow
async def test_a_vm_is_discarded_once_by_two_coordinators_at_once(pair: tuple[Client, Client]) -> None:
    first, second = pair
    await first.form_layout()
    await first.register_vm("short-lived")
    snapshot = await first.save("short-lived")
    for _ in range(64):
        newest = await first.save("short-lived", incremental=True, snapshot_id=snapshot.point_id)
    request = state_pb2.DiscardVmRequest(vm_id="short-lived", newest_point_id=newest.point_id)
    answers = await asyncio.gather(
        first.state("DiscardVm", request), second.state("DiscardVm", request), return_exceptions=True
    )
    receipts = [answer for answer in answers if not isinstance(answer, BaseException)]
    assert receipts
    for answer in answers:
        if isinstance(answer, BaseException):
            assert isinstance(answer, HoldfastError), answer
            assert answer.code is ErrorCode.CONFLICT, answer
    for receipt in (*receipts, await second.state("DiscardVm", request)):
        assert receipt == receipts[0]
    assert receipts[0].point_count == 65
    await refused(ErrorCode.NOT_FOUND, second.state("GetVm", state_pb2.GetVmRequest(vm_id="short-lived")))
    await refused(ErrorCode.NOT_FOUND, first.state("GetPoint", state_pb2.GetPointRequest(point_id=newest.point_id)))
