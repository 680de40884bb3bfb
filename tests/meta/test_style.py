"""STYLE's habits, measured on every file."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from tests.meta import checks
from tests.meta.tree import PRODUCT_FOLDERS, is_generated, parsed, python_files, text_of, tracked

CATCHES_EVERYTHING: Final = {
    "client/holdfast/cli/main.py": "the outermost frame of the command says what failed in one line",
    "core/holdfast_core/runtime/calls.py": "the outermost frame of a call logs a fault once and answers INTERNAL",
}
"""Files that may catch every error, each with the reason."""


def findings(paths: Iterable[Path], check: Callable[[ast.Module], list[str]]) -> list[str]:
    """What a check finds in files, each finding led by its path."""
    return [f"{path}:{finding}" for path in paths for finding in check(parsed(path))]


def lines_of(path: Path) -> int:
    """Number of lines of a file."""
    return text_of(path).count("\n")


def test_there_is_something_to_measure() -> None:
    assert len(list(python_files(*PRODUCT_FOLDERS))) > 30
    assert len(list(python_files("tests"))) > 30


def test_no_file_is_too_long() -> None:
    long = {str(path): lines_of(path) for path in python_files() if lines_of(path) > checks.FILE_LINES_MAX}
    assert not long, f"files of more than {checks.FILE_LINES_MAX} lines"


def test_the_median_product_file_is_short() -> None:
    lines = [lines_of(path) for path in python_files(*PRODUCT_FOLDERS) if path.name != "__init__.py"]
    assert statistics.median(lines) <= checks.MEDIAN_FILE_LINES_MAX


def test_every_function_fits_a_screen() -> None:
    assert not findings(python_files(), checks.long_functions)


def test_every_public_name_is_documented() -> None:
    assert not findings(python_files(*PRODUCT_FOLDERS), checks.undocumented_names)


def test_no_error_is_caught_by_a_net() -> None:
    files = [path for path in python_files() if str(path) not in CATCHES_EVERYTHING]
    assert not findings(files, checks.broad_excepts)
    assert not findings(python_files(*PRODUCT_FOLDERS), checks.swallowed_errors)


def test_no_test_can_be_left_out() -> None:
    assert not findings(python_files("tests"), checks.skipped_tests)


def test_every_test_asserts_something() -> None:
    assert not findings(python_files("tests"), checks.assertionless_tests)


def test_tests_wait_for_conditions() -> None:
    assert not findings(python_files("tests"), checks.sleeps)


def test_nothing_is_marked_as_left_to_do() -> None:
    assert not [f"{path}:{each}" for path in text_files() for each in checks.unfinished_marks(text_of(path))]


def test_no_file_names_a_folder_of_one_machine() -> None:
    assert not [f"{path}:{each}" for path in text_files() for each in checks.machine_paths(text_of(path))]


def text_files() -> list[Path]:
    """Every file that people write as text, but for the checks and their planted faults, and golden bytes."""
    return [
        path
        for path in tracked()
        if not is_generated(path)
        and path.parts[:2] not in {("tests", "meta"), ("tests", "golden")}
        and path.suffix in {".py", ".md", ".toml", ".yaml", ".yml", ".proto", ".txt", ".sh", ".cfg", ""}
    ]
