"""A coordinator that dies, or loses the store's answer, at every store call of a steward's step.

Whatever happens, the store holds the state before the step or the one after it, whole, with one record in the log for
each change; and the next steward brings what is left to its end.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Final

import pytest

from holdfast_coordinator.healing.history import read_history
from holdfast_coordinator.view import ClusterState
from holdfast_core.model.errors import HoldfastError
from holdfast_core.runtime.clock import ManualClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_proto.v1.common_pb2 import NodeHealing, NodeState
from tests.coordinator.faults import Crash, Fault, FaultyStore
from tests.coordinator.healing_rig import OUT_AFTER_S, Fleet, Seat, seat
from tests.coordinator.ledgers import read_log

# More calls than one step makes; each test ends when the fault no longer strikes.
CALLS_MAX: Final = 30
FIVE: Final = (1, 2, 3, 4, 5)
FOUR: Final = (1, 2, 3, 4)


async def _died(failing: Seat, faults: FaultyStore, fault: Fault, at: int) -> bool:
    """Let a steward take one step that is interrupted; return whether the fault struck."""
    faults.arm(fault, at=at)
    with suppress(Crash, HoldfastError):
        await failing.parts.steward.step()
    struck = faults.struck
    faults.arm(None)
    return struck


def _epochs(state: ClusterState) -> list[int]:
    return [layout.epoch for layout in state.layout_set.layouts]


async def _check_whole(store: SqliteStore, state: ClusterState) -> None:
    """Check that layouts, states, grant, accounts and log tell one story."""
    newest = state.layout_set.newest
    assert newest is not None
    out = {name for name, decided in state.states.items() if decided.out}
    assert {node.node_id for node in newest.nodes} == state.records.keys() - out
    history = await read_history(store)
    assert [change.epoch for change in history] == list(range(newest.epoch, 0, -1))
    settled = len(state.layout_set.layouts) == 1
    assert [bool(change.settled_unix_ms) for change in history[:1]] == [settled]
    if newest.epoch > 1:
        assert (state.layout_set.granted_epoch == newest.epoch) == settled
    log = [record for record in (await read_log(store)).records if record.principal == "coordinator"]
    actions = [(record.action, record.details["epoch"]) for record in log if record.outcome == "OK"]
    assert len(actions) == len(set(actions))
    made = [int(epoch) for action, epoch in actions if action in ("layout.form", "layout.change")]
    assert made == list(range(1, newest.epoch + 1))


@pytest.mark.slow
@pytest.mark.parametrize("fault", list(Fault))
async def test_a_change_that_is_interrupted_anywhere_happened_whole_or_not_at_all(
    store: SqliteStore, clock: ManualClock, fault: Fault
) -> None:
    healthy = Fleet(await seat(store, clock), clock)
    await healthy.run(4, FIVE)
    done = 0
    for at in range(CALLS_MAX):
        await healthy.seat.parts.lease.close()
        faults = FaultyStore(store)
        failing = Fleet(await seat(faults, clock, seed=10 + at), clock, syncs=False, known=healthy.known)
        await failing.run(4, FIVE)
        await failing.run(OUT_AFTER_S + 8, FOUR)
        clock.advance(2.0)
        assert failing.members() == list(FIVE)
        await failing.seat.view.fresh()
        struck = await _died(failing.seat, faults, fault, at)
        await failing.seat.parts.lease.close()
        state = await healthy.seat.view.fresh()
        await _check_whole(store, state)
        done += state.states["node-5"] == NodeState(out=True)
        # The next steward has to see it through, and takes the node back.
        await healthy.run(OUT_AFTER_S + 30, FOUR)
        assert healthy.members() == list(FOUR)
        await healthy.run(40, FIVE)
        assert healthy.members() == list(FIVE)
        state = await healthy.seat.view.fresh()
        assert len(_epochs(state)) == 1
        await _check_whole(store, state)
        if not struck:
            break
    assert 4 < at < CALLS_MAX - 1
    assert 0 < done <= at + 1


@pytest.mark.slow
@pytest.mark.parametrize("fault", list(Fault))
async def test_an_end_of_layouts_that_is_interrupted_anywhere_happened_whole_or_not_at_all(
    store: SqliteStore, clock: ManualClock, fault: Fault
) -> None:
    healthy = Fleet(await seat(store, clock), clock, syncs=False)
    await healthy.run(4, FIVE)
    retired = 0
    for at in range(CALLS_MAX):
        # Out or back: two layouts are alive, and all nodes of the newest say that they are synced.
        up = FOUR if healthy.members() == list(FIVE) else FIVE
        await healthy.run(OUT_AFTER_S + 30, up)
        newest = healthy.seat.view.state.layout_set.newest
        assert newest is not None
        await healthy.seat.parts.lease.close()
        faults = FaultyStore(store)
        failing = await seat(faults, clock, seed=10 + at)
        await failing.parts.lease.step()
        for number in up:
            await healthy.beat(number, NodeHealing(synced_epoch=newest.epoch))
        before = await failing.view.fresh()
        assert _epochs(before) == [newest.epoch, newest.epoch - 1]
        struck = await _died(failing, faults, fault, at)
        await failing.parts.lease.close()
        after = await healthy.seat.view.fresh()
        await _check_whole(store, after)
        if _epochs(after) == [newest.epoch]:
            retired += 1
            assert after.layout_set.revision > before.layout_set.revision
        else:
            assert after.layout_set == before.layout_set
        await healthy.seat.look()
        state = await healthy.seat.view.fresh()
        assert _epochs(state) == [newest.epoch]
        await _check_whole(store, state)
        if not struck:
            break
    assert 4 < at < CALLS_MAX - 1
    assert 0 < retired <= at + 1
