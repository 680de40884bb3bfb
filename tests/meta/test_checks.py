"""Each check of this folder finds a planted fault, and passes what is right."""

from __future__ import annotations

import ast

import pytest

from tests.meta import checks

HANDLER = "try:\n    f()\nexcept {}:\n    {}"
POLL = "def wait():\n    while not done() and time.monotonic() < end:\n        time.sleep(0.01)"


@pytest.mark.parametrize(
    ("check", "wrong", "right"),
    [
        (checks.long_functions, "def f():\n" + "    x = 1\n" * 70, "def f():\n" + "    x = 1\n" * 69),
        (checks.undocumented_names, "x = 1", "'Doc.'"),
        (checks.undocumented_names, "'Doc.'\nasync def f(): ...", "'Doc.'\nasync def f():\n    'Doc.'"),
        (checks.undocumented_names, "'Doc.'\nclass A:\n    'Doc.'\n    def f(self): ...", "'Doc.'\ndef _f(): ..."),
        (checks.broad_excepts, "try:\n    f()\nexcept:\n    g()", HANDLER.format("OSError", "g()")),
        (checks.broad_excepts, HANDLER.format("(OSError, Exception)", "g()"), HANDLER.format("Exception", "raise")),
        (
            checks.broad_excepts,
            HANDLER.format("BaseException as e", "raise X from e"),
            HANDLER.format("BaseException as e", "raise e"),
        ),
        (checks.swallowed_errors, HANDLER.format("OSError", "pass"), "with suppress(OSError):\n    f()"),
        (checks.skipped_tests, "@pytest.mark.skipif(x)\ndef test(): ...", "@pytest.mark.slow\ndef test(): ..."),
        (checks.skipped_tests, "def test():\n    pytest.skip('no')", "items.skip(1)"),
        (checks.sleeps, "time.sleep(1)", "asyncio.sleep(1)"),
        (checks.sleeps, "while not done():\n    time.sleep(1)", POLL),
        (checks.assertionless_tests, "def test_f():\n    f()", "def test_f():\n    assert f()"),
        (checks.assertionless_tests, "def test_f():\n    f()", "def f():\n    assert x\ndef test_f():\n    f()"),
        (checks.status_code_uses, "import grpc\ngrpc.StatusCode.OK", "import grpc\ngrpc.RpcError"),
        (checks.status_code_uses, "from grpc import StatusCode", "from grpc import RpcError"),
    ],
)
def test_a_check_of_syntax_can_fail(check: object, wrong: str, right: str) -> None:
    assert callable(check)
    assert check(ast.parse(wrong))
    assert not check(ast.parse(right))


@pytest.mark.parametrize(
    ("check", "wrong", "right"),
    [
        (checks.unfinished_marks, "x = 1  # TODO: more", "# what remains to be done is nothing"),
        (checks.machine_paths, "see /Users/bert/thing", "see tests/root/thing"),
        (checks.machine_paths, "cp /home/anna/x .", "the home of x"),
        (
            checks.uncommented_proto_items,
            "// A.\nmessage A {\n  // B.\n  string b = 1;\n  bytes c = 2;\n}",
            "// A.\nmessage A {\n  // B.\n  string b = 1;\n}",
        ),
        (checks.uncommented_proto_items, "message A {}", "// A.\nmessage A {}"),
        (
            checks.uncommented_proto_items,
            "// S.\nservice S {\n  rpc A(B) returns (C);\n}",
            "// S.\nservice S {\n  // A.\n  rpc A(B) returns (C);\n}",
        ),
    ],
)
def test_a_check_of_text_can_fail(check: object, wrong: str, right: str) -> None:
    assert callable(check)
    assert check(wrong)
    assert not check(right)


def test_imports_are_found_in_every_form() -> None:
    tree = ast.parse("import a.b\nfrom c import d\ndef f():\n    from e.g import h as i")
    assert [name for _, name in checks.imported_modules(tree)] == ["a.b", "c", "c.d", "e.g", "e.g.h"]
