"""Histories of whole clusters: some dozens at every run of the suite, `make test-sim` for hundreds and thousands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.sim.history import draw_plan, run_history

# Continuous integration goes on from the last of them: see .ci/run.
SEEDS: Final = range(36)
_CHUNK: Final = 12
_ROOT: Final = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("first", SEEDS[::_CHUNK])
def test_no_invariant_breaks_and_everything_comes_right(first: int) -> None:
    for seed in range(first, first + _CHUNK):
        outcome = run_history(draw_plan(seed))
        assert not outcome.violations, f"replay: python -m tests.sim --seed {seed} --trace"
        assert outcome.committed


@pytest.mark.slow
def test_a_seed_is_one_history_whatever_the_process() -> None:
    """Two runs here, and two processes that hash strings each in its own way, write the same trace."""
    seed = 5
    here = {run_history(draw_plan(seed)).digest for _ in range(2)}
    assert len(here) == 1
    for hash_seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-m", "tests.sim", "--seed", str(seed)],
            cwd=_ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=False,
        )
        assert f"trace {next(iter(here))}" in run.stdout, run.stdout + run.stderr


def test_seeds_are_different_histories() -> None:
    assert run_history(draw_plan(1)).digest != run_history(draw_plan(4)).digest


@pytest.mark.slow
def test_the_figures_of_many_histories_are_kept(tmp_path: Path) -> None:
    kept = tmp_path / "figures.json"
    run = subprocess.run(
        [sys.executable, "-m", "tests.sim", "--seeds", "2", "--from", "7", "--json", str(kept)],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    figures = json.loads(kept.read_text())
    alone = [run_history(draw_plan(seed)) for seed in (7, 8)]
    assert (figures["first_seed"], figures["histories"], figures["failed_seeds"]) == (7, 2, [])
    assert figures["commits"] == sum(outcome.committed for outcome in alone)
    assert f"{figures['commits']} commits" in run.stdout
