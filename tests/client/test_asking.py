"""Asking owners less while they have nothing: what is found all the same, and that no sum depends on it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from holdfast import StateManager, asking
from holdfast.asking import BARREN_BYTES, Asking
from holdfast.testing import MemoryCluster
from holdfast_core.model.limits import MIB
from holdfast_core.runtime.blocks.pool import NodePool
from tests.client.rig import Vm, noise


def test_nothing_is_asked_once_nothing_was_found_for_long_until_something_is() -> None:
    pace = Asking()
    for _ in range(4):
        assert pace.is_worth_it()
        pace.found_nothing(BARREN_BYTES // 4)
    assert not any(pace.is_worth_it() for _ in range(100))
    pace.found()
    assert pace.is_worth_it()
    pace.found_nothing(BARREN_BYTES - 1)
    assert pace.is_worth_it()


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of ids that owners were asked about, by question."""
    asked: list[int] = []
    ask = NodePool.has_blocks

    async def noted(self: NodePool, node_id: str, block_ids: bytes, capability: str, **settings: object) -> bytes:
        if "timeout_s" in settings:  # a coordinator asks too, and gives none
            asked.append(len(block_ids) // 32)
        return await ask(self, node_id, block_ids, capability, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(NodePool, "has_blocks", noted)
    return asked


def sums_of_two(manager: StateManager, folder: Path) -> list[dict[str, int]]:
    """The sums of a VM whose disk is all new, and of one that has other things first and then the same again."""
    folder.mkdir()
    first, second = Vm(manager, "first", folder), Vm(manager, "second", folder)
    first.volume(48 * MIB, [(0, noise(48 * MIB, 1))])
    second.volume(96 * MIB, [(0, noise(48 * MIB, 2) + noise(48 * MIB, 1))])
    found = []
    for vm in (first, second):
        vm.register()
        snapshot = vm.snapshot()
        vm.assert_restores(snapshot)
        sums = asdict(manager.point(snapshot).stats)
        # Index nodes hold ids, and how well those compress is up to the keys; what is sent is what this is about.
        index_bytes, sent_bytes = sums.pop("index_bytes"), sums.pop("sent_bytes")
        sums["stored_bytes"] -= index_bytes
        found.append(sums)
        assert sent_bytes >= sums["stored_bytes"] + index_bytes
    return found


@pytest.mark.slow
def test_sums_are_the_same_whether_owners_are_asked_or_tell_of_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, questions: list[int]
) -> None:
    found, counts = [], []
    for barren_bytes in (1 << 40, 16 * MIB):
        monkeypatch.setattr(asking, "BARREN_BYTES", barren_bytes)
        with MemoryCluster() as cluster, cluster.state_manager(workers=2) as manager:
            questions.clear()
            found.append(sums_of_two(manager, tmp_path / str(barren_bytes)))
            counts.append(sum(questions))
    assert found[1] == found[0]
    assert found[0][1]["deduplicated_bytes"] == 48 * MIB
    # It did leave questions out, and took them up again when it was told of what was there.
    assert counts[1] < counts[0]
