"""The README's walk through a VM's life, as it stands there, in one shell against a real cluster."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Up, environment
from tests.e2e.images import digest
from tests.meta.documents import fenced
from tests.meta.tree import text_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    cluster = Up(tmp_path / "data", ["--nodes", "3"]).start()
    yield cluster
    assert cluster.stop() == 0


def section(title: str) -> str:
    """The text of a section of the README."""
    _, _, rest = text_of(Path("README.md")).partition(f"## {title}\n")
    return rest.partition("\n## ")[0]


def test_the_life_of_a_vm(up: Up, tmp_path: Path) -> None:
    blocks = list(fenced(section("The life of a VM"), "sh"))
    assert len(blocks) >= 5
    work = tmp_path / "work"
    work.mkdir()
    program = tmp_path / "bin" / "holdfast"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m holdfast.cli.main "$@"\n')
    program.chmod(0o755)
    variables = {
        **environment(),
        "HOLDFAST_COORDINATOR": up.address,
        "PATH": os.pathsep.join([str(program.parent), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]),
    }
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run(
        [bash, "-euo", "pipefail", "-c", "\n".join(blocks)],
        cwd=work,
        env=variables,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith('{"loss": 0.03}\n')
    assert "for the task task-7" in done.stdout
    assert digest(work / "web-1-again" / "root.raw") == digest(work / "web-1.raw")
    assert up.ok("vm", "list", "--json") == "[]"
    assert up.run("points", "web-1").returncode == 3
