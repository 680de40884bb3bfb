"""What the documents say, in a form that can be compared with the program."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from tests.meta.tree import parsed, text_of, tracked

_TEST_ID = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def markdown_files() -> list[Path]:
    """Every Markdown file of the tree."""
    return [path for path in tracked() if path.suffix == ".md"]


def tests_named(text: str) -> list[tuple[str, str]]:
    """(file, function or empty) of every test that a text names in backticks."""
    return [(match.group(1), match.group(2) or "") for match in _TEST_ID.finditer(text)]


def missing_tests(text: str) -> list[str]:
    """Tests that a text names and that do not exist."""
    present = set(tracked())
    missing = []
    for file, function in tests_named(text):
        if Path(file) not in present:
            missing.append(file)
        elif function and function not in _functions(Path(file)):
            missing.append(f"{file}::{function}")
    return missing


def _functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def broken_links(path: Path) -> list[str]:
    """Links of a document to files of the tree that do not exist."""
    targets = (
        target for target in _LINK.findall(text_of(path)) if "://" not in target and not target.startswith("mailto:")
    )
    folders = {parent for file in tracked() for parent in file.parents}
    known = {*tracked(), *folders}
    return [target for target in targets if _inside(path.parent, target) not in known]


def _inside(folder: Path, target: str) -> Path:
    parts: list[str] = list(folder.parts)
    for part in Path(target).parts:
        if part == "..":
            parts.pop()
        else:
            parts.append(part)
    return Path(*parts)


def fenced(text: str, language: str) -> Iterator[str]:
    """The code blocks of one language."""
    for match in _FENCE.finditer(text):
        if match.group(1) == language:
            yield match.group(2)


def command_lines(text: str) -> list[list[str]]:
    """The `holdfast` command lines of a text's shell blocks, as words without the program's name and any redirection.

    A line may begin with `$ `, with variables, or with `id=$(`; a trailing backslash continues it.
    """
    lines = []
    for block in fenced(text, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            lines += [shlex.split(found) for found in re.findall(r"(?:^|[\s(|/])holdfast (\S[^|>)#&]*)", line)]
    return lines


def table_rows(text: str, first_cell: str) -> list[list[str]]:
    """The rows, as stripped cells, of the Markdown table whose heading row starts with `first_cell`."""
    rows: list[list[str]] = []
    inside = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not line.startswith("|"):
            inside = False
        elif inside and not set(cells[0]) <= {"-", ":"}:
            rows.append(cells)
        elif cells[0] == first_cell:
            inside = True
    return rows
