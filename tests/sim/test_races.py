"""Scripted races, each played once on the product as it is."""

from __future__ import annotations

from typing import Final

import pytest

from tests.sim import scripts
from tests.sim.cluster import Shape
from tests.sim.stage import Script, play

SCRIPTS: Final = (
    scripts.a_session_that_commits_between_the_reading_of_sessions_and_of_roots,
    scripts.a_session_that_commits_after_the_roots_were_read,
    scripts.an_index_rebuilt_while_a_session_leans_on_a_stamp,
    scripts.a_put_against_a_delete_that_is_under_way,
    scripts.a_delete_that_comes_a_collection_late,
    scripts.a_lease_that_lapses_before_a_late_commit,
    scripts.a_parent_that_is_forgotten_in_mid_session,
    scripts.what_nobody_needs_is_gone_after_two_collections,
    scripts.corrupt_copies_of_what_nobody_needs_are_gone_after_two_collections,
    scripts.a_put_against_a_delete_of_corrupt_copies,
    scripts.a_layout_change_while_a_session_leans_on_old_owners,
    scripts.a_drain_and_a_kill_at_once,
    scripts.a_write_that_is_under_way_when_the_layout_changes,
    scripts.a_commit_whose_transaction_comes_after_its_lease,
    scripts.a_drop_while_an_owner_lacks_the_block,
    scripts.what_is_lost_beyond_the_promise_is_told_and_healed,
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_race(script: Script) -> None:
    stage = play(script, Shape(nodes=5 if script in WIDE else 4))
    assert not stage.checker.violations


WIDE: Final = (scripts.a_drain_and_a_kill_at_once, scripts.a_write_that_is_under_way_when_the_layout_changes)
