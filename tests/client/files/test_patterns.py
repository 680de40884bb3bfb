"""Patterns mean what they mean in .gitignore: compared with git, and with the walk of a tree."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast import ErrorCode
from holdfast_core.model.files.patterns import SECRET_PATTERNS, exactly, select
from tests.client.rig import error_of

PATTERNS = (
    *("*.pt", "/top", "a/b", "**/out/*.csv", "logs/", "logs/**", "step-[0-9]?.bin", "[!a-c]x", "[^a-c]x", "\\*x"),
    *("**", "**/x", "a/**/x", "a/*/x", "*", "/*", "a*/x", "x?", "[]x]y", "a/", "/a/", "[[]x", "?"),
)
PATHS = (
    *(
        "x.pt",
        "d/x.pt",
        "top",
        "d/top",
        "a/b",
        "d/a/b",
        "out/r.csv",
        "d/out/r.csv",
        "d/out/e/r.csv",
        "logs",
        "d/logs/f",
    ),
    *("logs/f", "logs/d/f", "step-12.bin", "step-ab.bin", "ax", "dx", "*x", "x", "a/x", "a/d/x", "a/d/e/x", "ab/x"),
    *("xy", "]y", "a/x/y", "[x", "d/[x", "é", "a/é/x"),
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty repository, for git's own opinion."""
    folder = tmp_path_factory.mktemp("repository")
    subprocess.run(["git", "init", "-q", folder], check=True)
    return folder


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_what_git_ignores(repository: Path, pattern: str) -> None:
    (repository / ".git" / "info" / "exclude").write_text(pattern + "\n")
    asked = "".join(f"{path}\0" for path in PATHS)
    command = ["git", "-C", str(repository), "check-ignore", "--no-index", "-z", "--stdin"]
    said = subprocess.run(command, input=asked, capture_output=True, text=True, check=False).stdout
    selection = select([pattern])
    ours = {path for path in PATHS if selection.wants(path.encode().split(b"/"), directory=False)}
    assert ours == {path for path in said.split("\0") if path}


@pytest.mark.parametrize("pattern", ["", "/", "!x", "[x", "a/../b", "a//b", "./a", "x\\", "a\0b", "[b-a]", "x" * 5000])
def test_malformed_patterns_are_refused(pattern: str) -> None:
    for call in (lambda: select([pattern]), lambda: select([], [pattern])):
        assert error_of(call).code is ErrorCode.INVALID_ARGUMENT


def test_exclusion_wins_and_is_not_walked_into() -> None:
    selection = select(["a/b/c"], ["a/b"])
    wanted, below = selection.descend(b"a", directory=True)
    assert not wanted
    assert below is not None
    assert below.descend(b"b", directory=True) == (False, None)
    assert selection.descend(b"other", directory=True) == (False, None)


names = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda name: name not in (".", "..")
)


@given(st.lists(names, min_size=1, max_size=4), st.lists(names, min_size=1, max_size=4))
def test_an_exact_path_matches_itself_and_what_is_below(path: list[str], other: list[str]) -> None:
    selection = select([exactly("/".join(path))])
    assert selection.wants([name.encode() for name in path], directory=False)
    assert selection.wants([name.encode() for name in [*path, *other]], directory=False)
    if other[: len(path)] != path:
        assert not selection.wants([name.encode() for name in other], directory=False)


def test_the_document_lists_the_secret_patterns() -> None:
    text = (Path(__file__).parents[3] / "docs" / "files.md").read_text()
    (block,) = [part.split("```")[0] for part in text.split("```text\n")[1:]]
    assert block.split() == list(SECRET_PATTERNS)
