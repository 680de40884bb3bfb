"""The documents agree with the program: commands, options, variables, errors, tests that they name, and links."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

from holdfast.cli.exits import exit_code
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.status import status_name
from tests.meta import commands, documents
from tests.meta.tree import text_of, tracked

ADR: Final = Path("docs/adr")


def test_the_changelog_has_a_place_for_what_is_new() -> None:
    headings = re.findall(r"^## \[(.+?)\]", text_of(Path("CHANGELOG.md")), re.MULTILINE)
    assert headings[0] == "Unreleased"


def test_the_index_of_decisions_is_complete() -> None:
    files = {path.name for path in tracked() if path.parent == ADR} - {"README.md", "template.md"}
    index = text_of(ADR / "README.md")
    assert files
    assert set(re.findall(r"\]\((\d{4}-[\w.-]+\.md)\)", index)) == files
    for name in files:
        title = text_of(ADR / name).partition("\n")[0]
        number, _, words = title.removeprefix("# ").partition(" ")
        assert number.strip(":.") == name[:4], title
        assert words.removeprefix("— ").strip() in index, title


def test_links_lead_somewhere() -> None:
    assert not {str(path): broken for path in documents.markdown_files() if (broken := documents.broken_links(path))}


def test_tests_that_documents_name_exist() -> None:
    named = {str(path): documents.tests_named(text_of(path)) for path in documents.markdown_files()}
    assert sum(map(len, named.values())) > 20
    assert not {
        str(path): gone for path in documents.markdown_files() if (gone := documents.missing_tests(text_of(path)))
    }


def test_a_test_that_does_not_exist_is_missed() -> None:
    assert documents.missing_tests("see `tests/meta/test_documents.py::test_nothing`")
    assert documents.missing_tests("see `tests/nowhere.py`")
    assert not documents.missing_tests("see `tests/meta/test_documents.py::test_links_lead_somewhere`")


def test_every_invariant_is_guarded_or_says_that_it_is_not() -> None:
    rows = documents.table_rows(text_of(Path("docs/invariants.md")), "#")
    assert [row[0] for row in rows] == [str(number) for number in range(1, 10)]
    for number, _, guards in rows:
        assert documents.tests_named(guards) or "not yet guarded" in guards, f"invariant {number}"


def test_the_table_of_errors_is_the_program_s() -> None:
    rows = {row[0].strip("`"): row[1:] for row in documents.table_rows(text_of(Path("docs/errors.md")), "code")}
    assert set(rows) == {code.name for code in ErrorCode}
    for code in ErrorCode:
        _, retryable, status, exits_with = rows[code.name]
        assert retryable == ("yes" if HoldfastError(code, "").retryable else "no"), code
        assert status.strip("`") == status_name(code), code
        assert int(exits_with) == exit_code(HoldfastError(code, "")), code


def test_every_row_of_bad_input_names_its_test() -> None:
    rows = documents.table_rows(text_of(Path("docs/errors.md")), "input")
    assert len(rows) >= 20
    for row in rows:
        assert row[1].strip("`") in ErrorCode.__members__, row
        assert documents.tests_named(row[2]), row


@pytest.mark.parametrize("path", documents.markdown_files(), ids=str)
def test_commands_that_documents_show_are_the_program_s(path: Path) -> None:
    refused = []
    for line in documents.command_lines(text_of(path)):
        try:
            commands.check(line)
        except commands.Mistyped as error:
            refused.append(str(error))
    assert not refused


def test_the_readme_shows_commands_and_a_wrong_one_is_refused() -> None:
    assert len(documents.command_lines(text_of(Path("README.md")))) > 8
    for wrong in (["snapshots", "vm"], ["snapshot"], ["backup", "vm", "snap-x", "--parents", "p"]):
        with pytest.raises(commands.Mistyped):
            commands.check(wrong)


def test_every_option_and_variable_is_documented() -> None:
    text = text_of(Path("docs/configuration.md"))
    for leaf in [(), *commands.leaves()]:
        for name in commands.options_of(leaf):
            assert f"`{name}" in text or name in {"--help", "-h"}, f"holdfast {' '.join(leaf)} {name}"
        for name in commands.variables_of(leaf):
            assert f"`{name}`" in text, f"holdfast {' '.join(leaf)} {name}"


def test_every_variable_that_documents_name_is_read_by_a_program() -> None:
    known = {name for leaf in commands.leaves() for name in commands.variables_of(leaf)}
    source = "\n".join(text_of(path) for path in tracked() if path.suffix == ".py")
    for path in documents.markdown_files():
        for name in re.findall(r"\bHOLDFAST_[A-Z_]*[A-Z]\b", text_of(path)):
            assert name in known or f'"{name}"' in source, f"{path}: {name}"
