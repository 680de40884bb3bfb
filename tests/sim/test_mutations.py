"""Does the checker bite? The product with one protection switched off, and what finds that out.

Scripts find what takes one interleaving of many; where chance is enough, a stated number of seeds is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pytest

import holdfast_coordinator.collection.collector as collector
import holdfast_coordinator.healing.steward as steward
from holdfast_coordinator import keyspace
from holdfast_coordinator.healing.stewardship import Situation, StewardRules, Stewardship, plan_stewardship
from holdfast_coordinator.records import Stored
from holdfast_core.runtime.metadata.store import Exists
from holdfast_storagenode.fence import Fence
from holdfast_storagenode.healing.drop import Dropper
from tests.sim import scripts
from tests.sim.cluster import Shape
from tests.sim.disk import Disk, SimStore
from tests.sim.history import draw_plan, run_history
from tests.sim.stage import Broken, Script, play

Mutation = Callable[[pytest.MonkeyPatch], None]

_SEEDS_MAX: Final = 20
_WIDE: Final = Shape(nodes=5)


def no_floor_at_sync(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SimStore, "raise_floor", lambda self, partitions, epoch: None)


def drop_without_confirmation(patch: pytest.MonkeyPatch) -> None:
    async def everything(self: Any, living: Any, page: Any, epoch: int) -> list[bytes]:
        return list(page.ids)

    patch.setattr(Dropper, "_confirmed", everything)


def retire_before_synced(patch: pytest.MonkeyPatch) -> None:
    def hasty(situation: Situation, rules: StewardRules) -> Stewardship:
        return Stewardship(retire=True) if situation.living > 1 else plan_stewardship(situation, rules)

    patch.setattr(steward, "plan_stewardship", hasty)


def delete_that_ignores_stamps(patch: pytest.MonkeyPatch) -> None:
    delete = SimStore.delete

    def careless(self: SimStore, tenant: int, ids: Any, *, cutoff: int | None = None) -> Any:
        with pytest.MonkeyPatch.context() as inside:
            inside.setattr(Disk, "stamp_of", lambda self, partition, copy: -1)
            return delete(self, tenant, ids, cutoff=cutoff)

    patch.setattr(SimStore, "delete", careless)


def puts_and_questions_that_do_not_stamp(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SimStore, "_stamp", lambda self, partition, key, epoch: None)


def cut_off_that_ignores_sessions(patch: pytest.MonkeyPatch) -> None:
    async def present(store: Any, space: Any, epoch: int) -> int:
        return epoch

    patch.setattr(collector, "lowest_session_epoch", present)


def commit_of_any_session(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Stored, "the_same", property(lambda self: Exists(keyspace.CLUSTER)))


def fence_that_is_told_too_early(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Fence, "fenced_epoch", lambda self, newest: newest)


@pytest.mark.parametrize(
    ("mutation", "script"),
    [
        (no_floor_at_sync, scripts.a_layout_change_while_a_session_leans_on_old_owners),
        (drop_without_confirmation, scripts.a_drop_while_an_owner_lacks_the_block),
        (retire_before_synced, scripts.a_layout_change_while_a_session_leans_on_old_owners),
        (delete_that_ignores_stamps, scripts.a_put_against_a_delete_that_is_under_way),
        (puts_and_questions_that_do_not_stamp, scripts.a_put_against_a_delete_that_is_under_way),
        (cut_off_that_ignores_sessions, scripts.a_parent_that_is_forgotten_in_mid_session),
        (commit_of_any_session, scripts.a_commit_whose_transaction_comes_after_its_lease),
        (fence_that_is_told_too_early, scripts.a_write_that_is_under_way_when_the_layout_changes),
    ],
    ids=lambda given: given.__name__,
)
def test_a_script_finds_it(mutation: Mutation, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation(monkeypatch)
    with pytest.raises(Broken, match="invariant"):
        play(script, _WIDE if script is scripts.a_write_that_is_under_way_when_the_layout_changes else Shape())


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutation",
    [retire_before_synced, puts_and_questions_that_do_not_stamp, cut_off_that_ignores_sessions],
    ids=lambda given: given.__name__,
)
def test_chance_finds_it(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation(monkeypatch)
    violations = (violation for seed in range(_SEEDS_MAX) for violation in run_history(draw_plan(seed)).violations)
    assert any("invariant" in violation for violation in violations), f"{_SEEDS_MAX} histories have not found it"
