"""The benchmark of healing, small: a node of a real cluster is lost for good, and its blocks are copied again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.healing.clients import Client, Turn
from benchmarks.healing.goals import judge
from benchmarks.healing.run import REPLICAS, Sizes, measure

MIB = 1 << 20
GOOD: dict[str, Any] = {
    "node_bytes": 2_000_000_000,
    "copies_s": [10.0, 11.0],
    "repair": {"changed_s": 29.0},
    "clients": {
        "undisturbed": {"backup_mb_s": 100.0, "restore_mb_s": 200.0},
        "repair": {"backup_mb_s": 71.0, "restore_mb_s": 141.0},
        "scrub": {"backup_mb_s": 90.0, "restore_mb_s": 150.0},
    },
}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_lost_node_is_made_up_for_while_clients_work(tmp_path: Path) -> None:
    said: list[str] = []
    result = measure(tmp_path, Sizes(node_bytes=24 * MIB, volume_bytes=2 * MIB, turns=1, out_after_s=2.0), said.append)
    # A quarter of all blocks were on four nodes' lost one, of each of which the others made one copy.
    missing = result["blocks"] * REPLICAS // 4 * 65_536
    assert 0.9 * missing < result["repair"]["repaired_bytes"] < 1.2 * missing
    assert result["repair"]["lost_s"] > result["repair"]["changed_s"] > 0
    assert result["growth_s"] > 0
    assert all(speeds["backup_mb_s"] > 0 and speeds["restore_mb_s"] > 0 for speeds in result["clients"].values())
    assert len(judge(result)) == 5
    assert any("repair" in line for line in said)


def test_every_goal_of_a_good_run_is_met() -> None:
    verdicts = judge(GOOD)
    assert [verdict.met for verdict in verdicts] == [True] * 5
    assert "2.90 times" in verdicts[0].figure, "beside the faster copy"


@pytest.mark.parametrize(
    ("part", "worse", "at"),
    [
        ("repair", {"changed_s": 31.0}, 0),
        ("clients", GOOD["clients"] | {"repair": {"backup_mb_s": 69.0, "restore_mb_s": 141.0}}, 1),
        ("clients", GOOD["clients"] | {"scrub": {"backup_mb_s": 90.0, "restore_mb_s": 139.0}}, 4),
    ],
)
def test_a_worse_figure_is_short(part: str, worse: dict[str, Any], at: int) -> None:
    assert [verdict.met for verdict in judge(GOOD | {part: worse})] == [number != at for number in range(5)]


def test_only_what_was_over_in_time_counts(tmp_path: Path) -> None:
    client = Client(None, tmp_path, volume_bytes=10_000_000)  # type: ignore[arg-type]
    turns = [Turn(1.0, 2.0), Turn(2.0, 0.1, restore_inside=False), Turn(0.1, 0.1, backup_inside=False)]
    speeds = client.speeds([*turns, Turn(4.0, 0.1, restore_inside=False)])
    assert speeds.backup_mb_s == pytest.approx(5.0)
    with pytest.raises(RuntimeError, match="smaller volumes"):
        client.speeds([Turn(1.0, 1.0, restore_inside=False)])
