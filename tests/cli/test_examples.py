"""The examples run as they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.harness import Up

EXAMPLE = Path(__file__).parents[2] / "examples" / "five_calls.py"


@pytest.mark.slow
def test_the_five_calls_in_memory() -> None:
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "identical"


@pytest.mark.slow
def test_the_five_calls_on_a_cluster_of_processes(tmp_path: Path) -> None:
    cluster = Up(tmp_path / "data", ["--nodes", "1"]).start()
    environment = {**os.environ, "HOLDFAST_COORDINATOR": cluster.address}
    done = subprocess.run(
        [sys.executable, EXAMPLE], capture_output=True, text=True, check=False, timeout=100, env=environment
    )
    assert cluster.stop() == 0
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "identical"


@pytest.mark.slow
def test_keeping_weights_saves_what_it_says() -> None:
    program = EXAMPLE.with_name("keep_weights.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1].removesuffix("% saved")) >= 95
