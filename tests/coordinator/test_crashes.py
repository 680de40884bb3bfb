"""A coordinator that dies, or loses the store's answer, at every single store call of Begin and of Commit.

The client then does what every client does: the same request again, to another coordinator. Whatever the call was, one
point comes of it, numbers have no gap, and no session is left behind.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from holdfast_coordinator import keyspace
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.clock import ManualClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_proto.v1 import state_pb2
from holdfast_proto.v1.records_pb2 import PointRecord
from tests.coordinator.faults import Fault, FaultyStore
from tests.coordinator.lifecycle import register, vm_of
from tests.coordinator.rig import Client, coordinator, empty_object_commit, zero_commit

# More calls than any of the operations makes; each test ends when the fault no longer strikes.
CALLS_MAX = 40


@dataclass
class Pair:
    """A coordinator that will fail, one that will not, and the store under both."""

    failing: Client
    healthy: Client
    faults: FaultyStore
    store: SqliteStore

    async def interrupted(self, fault: Fault, at: int, name: str, request: Any) -> tuple[Any, bool]:
        """Call the failing coordinator, then the healthy one if it did not answer.

        Returns the answer, and whether the fault struck at all.
        """
        self.faults.arm(fault, at=at)
        try:
            answer = await self.failing.state(name, request)
        except HoldfastError as error:
            # A dead process answers nothing; here its last breath arrives as INTERNAL.
            if error.code not in (ErrorCode.INTERNAL, ErrorCode.UNREACHABLE):
                raise
            answer = await self.healthy.state(name, request)
        struck = self.faults.struck
        self.faults.arm(None)
        return answer, struck

    async def check_definitions(self, points: Sequence[PointRecord]) -> None:
        """Every point has the definition of its VM, and no definition is of anything else."""
        prefix = keyspace.TenantKeyspace(1).point_definitions_prefix
        found = {item.key: (item.value, item.lease_id) for item in (await self.store.snapshot([prefix])).items}
        assert found == dict.fromkeys((prefix + point.point_id for point in points), (b"<x/>", 0))

    async def open_sessions(self) -> list[str]:
        """Return the keys of all sessions and of all VMs that are held."""
        root = keyspace.TenantKeyspace(1).sessions_prefix.removesuffix("sessions/")
        found = await self.store.snapshot([root + "sessions/", root + "vm-sessions/"])
        return [item.key for item in found.items]


@pytest.fixture
async def pair(store: SqliteStore, clock: ManualClock) -> AsyncIterator[Pair]:
    faults = FaultyStore(store)
    async with coordinator(faults, clock=clock) as failing, coordinator(store, clock=clock, seed=2) as healthy:
        await healthy.form_layout()
        # The failing coordinator learns of the layout now, so that its calls are the same each time.
        await failing.form_layout()
        yield Pair(failing, healthy, faults, store)


@pytest.mark.parametrize("fault", list(Fault))
async def test_a_begin_that_is_interrupted_anywhere_ends_in_one_session(pair: Pair, fault: Fault) -> None:
    random_bytes = random.Random(1).randbytes
    await register(pair.healthy, vm_of("parent", definition=b"<x/>", definition_name="x.xml"))
    snapshot = await pair.healthy.save("parent")
    number = 1
    for at in range(CALLS_MAX):
        nonce = random_bytes(16)
        request = state_pb2.BeginPointRequest(
            vm_id="parent", nonce=nonce, incremental=True, snapshot_id=snapshot.point_id
        )
        begun, struck = await pair.interrupted(fault, at, "BeginPoint", request)
        assert len(await pair.open_sessions()) == 2
        made = await pair.healthy.commit(zero_commit(begun))
        number += 1
        assert made.number == number
        assert await pair.open_sessions() == []
        if not struck:
            break
    assert 8 < at < CALLS_MAX - 1
    points = await pair.healthy.points("parent")
    assert len(points) == number
    await pair.check_definitions(points)


@pytest.mark.parametrize("fault", list(Fault))
async def test_a_commit_that_is_interrupted_anywhere_makes_one_point(pair: Pair, fault: Fault) -> None:
    await register(pair.healthy, vm_of("parent", definition=b"<x/>", definition_name="x.xml"))
    snapshot = await pair.healthy.save("parent")
    for at in range(CALLS_MAX):
        begun = await pair.healthy.begin("parent", incremental=True, snapshot_id=snapshot.point_id)
        request = zero_commit(begun)
        answer, struck = await pair.interrupted(fault, at, "CommitPoint", request)
        first = answer.point
        again = (await pair.failing.state("CommitPoint", request)).point
        assert first == again
        assert first.number == at + 2
        assert await pair.open_sessions() == []
        if not struck:
            break
    assert 5 < at < CALLS_MAX - 1
    points = await pair.healthy.points("parent")
    assert [point.number for point in points] == list(range(1, at + 3))
    assert len({point.point_id for point in points}) == len(points)
    await pair.check_definitions(points)


@pytest.mark.parametrize("fault", list(Fault))
async def test_an_objects_begin_and_commit_that_are_interrupted_anywhere_make_one_object(
    pair: Pair, fault: Fault
) -> None:
    random_bytes = random.Random(2).randbytes
    for at in range(CALLS_MAX):
        request = state_pb2.BeginObjectRequest(task_id="task-1", nonce=random_bytes(16))
        begun, begin_struck = await pair.interrupted(fault, at, "BeginObject", request)
        commit = empty_object_commit(begun, "task-1")
        answer, commit_struck = await pair.interrupted(fault, at, "CommitObject", commit)
        made = answer.object
        assert made.storage_id == begun.session_id
        assert await pair.open_sessions() == []
        listed = (await pair.healthy.state("ListObjects", state_pb2.ListObjectsRequest(task_id="task-1"))).objects
        assert len(listed) == at + 1
        if not begin_struck and not commit_struck:
            break
    assert 4 < at < CALLS_MAX - 1


@pytest.mark.parametrize("fault", list(Fault))
async def test_a_takeover_that_is_interrupted_anywhere_fences_the_first_and_leaves_one_session(
    pair: Pair, fault: Fault
) -> None:
    await pair.healthy.register_vm("vm-1")
    for at in range(CALLS_MAX):
        fenced = await pair.healthy.begin("vm-1")
        request = state_pb2.BeginPointRequest(vm_id="vm-1", nonce=random.Random(at).randbytes(16), takeover=True)
        begun, struck = await pair.interrupted(fault, at, "BeginPoint", request)
        with pytest.raises(HoldfastError) as caught:
            await pair.healthy.commit(zero_commit(fenced))
        assert caught.value.code is ErrorCode.SESSION_LAPSED
        assert (await pair.healthy.commit(zero_commit(begun))).number == at + 1
        if not struck:
            break
    assert 5 < at < CALLS_MAX - 1
