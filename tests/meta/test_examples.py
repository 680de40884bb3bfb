"""The programs that the documents show run as they stand; tests/cli runs those of examples/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.meta import documents
from tests.meta.tree import ROOT, text_of


@pytest.mark.parametrize("document", ["README.md", "docs/sdk.md"])
def test_programs_in_documents_parse(document: str) -> None:
    programs = list(documents.fenced(text_of(Path(document)), "python"))
    assert programs
    for program in programs:
        compile(program, document, "exec", flags=0)


def test_the_program_of_the_readme_runs(tmp_path: Path) -> None:
    (program,) = documents.fenced(text_of(Path("README.md")), "python")
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    assert ran.returncode == 0, ran.stderr
    assert not list(tmp_path.iterdir())


def test_the_readme_says_what_a_fresh_machine_needs() -> None:
    text = text_of(Path("README.md"))
    for package in ("git", "make", "python3", "python3-venv", "e2fsprogs"):
        assert f"`{package}`" in text
    assert (ROOT / "LICENSE").is_file()
