"""The verbs of make, the pins that they install, and what find-python says where something is missing."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Final

import pytest

from tests.meta.tree import ROOT, text_of

VERBS: Final = (
    *("setup", "demo", "test", "quick", "lint", "fmt", "protos", "verify-protos"),
    *("bench", "bench-reduction", "bench-vms", "bench-healing", "up", "compose-up", "clean"),
)


def recipes() -> dict[str, list[str]]:
    """Each target of the Makefile with its recipe's lines."""
    found: dict[str, list[str]] = {}
    target = ""
    for line in text_of(Path("Makefile")).splitlines():
        if line.startswith("\t"):
            found[target].append(line.strip())
        elif match := re.match(r"([\w./-]+):(?!=)", line):
            target = match.group(1)
            found[target] = []
    return found


def test_every_verb_is_there_and_is_one_line() -> None:
    assert set(VERBS) <= set(recipes())
    assert {name: lines for name, lines in recipes().items() if len(lines) > 1} == {}


def test_every_verb_calls_something_that_exists() -> None:
    for name, lines in recipes().items():
        for program in (line.split()[0] for line in lines):
            if program.startswith(("tools/", "deploy/")):
                assert os.access(ROOT / program, os.X_OK), f"{name} calls {program}"


def pins(file: str) -> dict[str, str]:
    """Names, as PyPI compares them, and versions of a constraints file."""
    found = {}
    for line in text_of(Path(file)).splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            found[re.sub(r"[-_.]+", "-", name).lower()] = version
    return found


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-protos.txt"])
def test_pins_are_names_and_versions_only(file: str) -> None:
    for line in text_of(Path(file)).splitlines():
        assert re.fullmatch(r"#.*|[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.+]*", line), line


def test_every_dependency_is_pinned_at_or_above_its_floor() -> None:
    project = tomllib.loads(text_of(Path("pyproject.toml")))
    groups = project["dependency-groups"]
    extras = project["project"]["optional-dependencies"]
    wanted = {
        "constraints.txt": [*project["project"]["dependencies"], *extras["server"], *extras["vm"], *groups["dev"]],
        "constraints-protos.txt": groups["protos"],
    }
    for file, requirements in wanted.items():
        for requirement in requirements:
            match = re.match(r"([\w.-]+)(?:[>=]=([\d.]+))?", requirement)
            assert match
            version = pins(file)[re.sub(r"[-_.]+", "-", match.group(1)).lower()]
            assert numbers(version) >= numbers(match.group(2) or "0"), f"{requirement} is pinned to {version}"


def numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version, for comparison."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


def find_python(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run tools/find-python where only `folder` is on the path."""
    return subprocess.run(
        ["/bin/sh", str(ROOT / "tools/find-python")],
        env={"PATH": str(folder), **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )


def plant(folder: Path, name: str, script: str) -> None:
    """Write an executable script."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    (folder / name).chmod(0o755)


OLD: Final = 'case "$2" in *version_info*) exit 1;; esac'
NO_VENV: Final = 'case "$2" in *ensurepip*) exit 1;; esac'
GOOD: Final = 'case "$2" in *executable*) echo "$0";; esac'


def test_without_a_python_it_says_what_to_install(tmp_path: Path) -> None:
    ran = find_python(tmp_path)
    assert ran.returncode == 1
    assert "apt install python3 python3-venv" in ran.stderr


def test_an_old_python_is_named(tmp_path: Path) -> None:
    plant(tmp_path, "python3", OLD)
    ran = find_python(tmp_path)
    assert ran.returncode == 1
    assert "found python3, but Holdfast needs Python >= 3.11" in ran.stderr


def test_a_missing_venv_is_named(tmp_path: Path) -> None:
    plant(tmp_path, "python3", NO_VENV)
    ran = find_python(tmp_path)
    assert ran.returncode == 1
    assert "install python3-venv" in ran.stderr


def test_a_newer_python_is_taken_where_the_first_is_old(tmp_path: Path) -> None:
    plant(tmp_path, "python3", OLD)
    plant(tmp_path, "python3.12", GOOD)
    assert find_python(tmp_path).stdout.strip() == str(tmp_path / "python3.12")


def test_the_python_that_is_asked_for_is_the_only_one_tried(tmp_path: Path) -> None:
    plant(tmp_path, "python3", GOOD)
    ran = find_python(tmp_path, PYTHON="python3.12")
    assert ran.returncode == 1
    assert "PYTHON=python3.12 is not a Python >= 3.11" in ran.stderr
