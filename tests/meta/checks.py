"""Checks over source text. Each takes text or a syntax tree and returns what is wrong, one line a finding.

They are functions and not tests so that `test_checks.py` can show that each of them is able to fail.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Final

_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)

FILE_LINES_MAX: Final = 500
MEDIAN_FILE_LINES_MAX: Final = 200
FUNCTION_LINES_MAX: Final = 70

_UNFINISHED = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK)\b")
_MACHINE = re.compile(r"(?<![\w.])/(?:root|work|home/\w+|Users/\w+)/|/opt/pypi|localhost\.localdomain|\.internal\b")
_SKIPS = frozenset({"skip", "skipif", "xfail", "importorskip", "skipTest", "expectedFailure"})


def long_functions(tree: ast.Module) -> list[str]:
    """Functions of more than FUNCTION_LINES_MAX lines, decorators not counted."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, _FUNCTION):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES_MAX:
                found.append(f"{node.lineno}: {node.name} has {lines} lines")
    return found


def undocumented_names(tree: ast.Module) -> list[str]:
    """The module and each public class, function and method of it that has no docstring."""
    found = [] if ast.get_docstring(tree) else ["1: the module has no docstring"]
    found += [f"{node.lineno}: {name} has no docstring" for name, node in _public(tree, "") if not _documented(node)]
    return found


def _public(
    parent: ast.Module | ast.ClassDef, prefix: str
) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in parent.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _public(node, f"{prefix}{node.name}.")


def _documented(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    if ast.get_docstring(node):
        return True
    # An overload or a property's setter is the same name again, documented at its other place.
    decorators = [ast.unparse(each) for each in node.decorator_list]
    return any(each.endswith((".setter", "overload")) for each in decorators)


def broad_excepts(tree: ast.Module) -> list[str]:
    """Handlers that catch everything and do not raise it again as it came."""
    return [
        f"{node.lineno}: catches everything and does not raise it again"
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and _is_broad(node.type) and not _reraises(node)
    ]


def _is_broad(caught: ast.expr | None) -> bool:
    if caught is None:
        return True
    if isinstance(caught, ast.Tuple):
        return any(_is_broad(each) for each in caught.elts)
    return ast.unparse(caught).rpartition(".")[2] in {"Exception", "BaseException"}


def _reraises(handler: ast.ExceptHandler) -> bool:
    return isinstance(handler.body[-1], ast.Raise) and (
        handler.body[-1].exc is None
        or (isinstance(handler.body[-1].exc, ast.Name) and handler.body[-1].exc.id == handler.name)
    )


def swallowed_errors(tree: ast.Module) -> list[str]:
    """Handlers whose body is `pass` or `...` and that give no reason in place of it."""
    return [
        f"{node.lineno}: drops {ast.unparse(node.type) if node.type else 'everything'} without a word"
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
        and all(
            isinstance(each, ast.Pass)
            or (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant) and each.value.value is ...)
            for each in node.body
        )
    ]


def skipped_tests(tree: ast.Module) -> list[str]:
    """Places where a test could be left out."""
    return [
        f"{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in _SKIPS
        and ast.unparse(node.value).partition(".")[0] in {"pytest", "unittest", "self"}
    ]


def sleeps(tree: ast.Module) -> list[str]:
    """Calls of `time.sleep` other than between two looks at a condition, in a loop that ends at a deadline."""
    polling = set()
    for function in ast.walk(tree):
        if isinstance(function, _FUNCTION) and "monotonic()" in ast.unparse(function):
            loops = [node for node in ast.walk(function) if isinstance(node, ast.While)]
            polling |= {id(call) for loop in loops for call in _sleep_calls(loop)}
    return [f"{call.lineno}: {ast.unparse(call)}" for call in _sleep_calls(tree) if id(call) not in polling]


def _sleep_calls(tree: ast.AST) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"time.sleep", "sleep"}
    ]


def assertionless_tests(tree: ast.Module) -> list[str]:
    """Test functions that assert nothing: neither by themselves nor through a function of their file or a check."""
    functions = [node for node in ast.walk(tree) if isinstance(node, _FUNCTION)]
    checking: set[str] = set()
    while more := {each.name for each in functions if _asserts(each, checking)} - checking:
        checking |= more
    return [
        f"{each.lineno}: {each.name} asserts nothing"
        for each in functions
        if each.name.startswith("test_") and each.name not in checking
    ]


_CHECKING: Final = ("raises", "assert", "check", "expect", "require", "refuse", "must", "verify", "wait", "eventually")


def _asserts(function: ast.FunctionDef | ast.AsyncFunctionDef, checking: set[str]) -> bool:
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in checking or name.lstrip("_").startswith(_CHECKING):
                return True
    return False


def imported_modules(tree: ast.Module) -> list[tuple[int, str]]:
    """(line, dotted name) of every import; `from a import b` counts as a and as a.b."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, each.name) for each in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.lineno, node.module))
            found += [(node.lineno, f"{node.module}.{each.name}") for each in node.names]
    return found


def status_code_uses(tree: ast.Module) -> list[str]:
    """Uses of gRPC's `StatusCode`, however it is reached."""
    found = [f"{line}: imports {name}" for line, name in imported_modules(tree) if name.endswith(".StatusCode")]
    found += [
        f"{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "StatusCode"
    ]
    return found


def unfinished_marks(text: str) -> list[str]:
    """Lines with a mark that something is left to do."""
    return [f"{number}: {line.strip()}" for number, line in enumerate(text.splitlines(), 1) if _UNFINISHED.search(line)]


def machine_paths(text: str) -> list[str]:
    """Lines that name a folder of one particular machine."""
    return [f"{number}: {line.strip()}" for number, line in enumerate(text.splitlines(), 1) if _MACHINE.search(line)]


def uncommented_proto_items(text: str) -> list[str]:
    """Fields, messages, enums, their values, services and calls of a proto file that have no comment above them."""
    found = []
    previous = ""
    for number, line in enumerate(text.splitlines(), 1):
        item = line.strip()
        is_item = re.match(r"(message|enum|service|rpc|oneof)\s+\w+", item) or re.match(
            r"((repeated|optional)\s+)?(map<[^>]*>|[\w.]+)\s+\w+\s*=\s*\d+", item
        )
        if is_item and not item.startswith(("syntax", "option", "package")) and not previous.startswith("//"):
            found.append(f"{number}: {item}")
        previous = item
    return found
