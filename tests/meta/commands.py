"""The real command line as data: which commands there are, and what they take.

Whatever a README or a compose file tells people to type is parsed here by the program that would run it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import typer.main

from holdfast.cli.main import app


class Mistyped(Exception):
    """The program would refuse this command line."""


@functools.cache
def root() -> Any:
    """The whole command `holdfast`."""
    return typer.main.get_command(app)


def find(words: Sequence[str]) -> tuple[Any, Any, list[str]]:
    """Find the command that words lead to: (command, its context, the words left over as its arguments).

    Raises:
        Mistyped: There is no such command.
    """
    command = root()
    context = command.context_class(command, info_name="holdfast")
    left = list(words)
    while hasattr(command, "list_commands"):
        name = left.pop(0) if left else ""
        inner = command.get_command(context, name)
        if inner is None:
            raise Mistyped(f"'{context.command_path}' has no command {name!r}; it has {command.list_commands(context)}")
        context = inner.context_class(inner, info_name=name, parent=context)
        command = inner
    return command, context, left


def options_of(words: Sequence[str]) -> set[str]:
    """The option names that a command takes."""
    command, _, _ = find(words)
    return {
        name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts) if name[0] == "-"
    }


def variables_of(words: Sequence[str]) -> set[str]:
    """The environment variables that a command reads its options from."""
    command, _, _ = find(words)
    found: set[str] = set()
    for parameter in command.params:
        variables = parameter.envvar or ()
        found.update([variables] if isinstance(variables, str) else variables)
    return found


def leaves(prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command, as the words that lead to it."""
    command = root()
    context = command.context_class(command, info_name="holdfast")
    for word in prefix:
        command = command.get_command(context, word)
        context = command.context_class(command, info_name=word, parent=context)
    if not hasattr(command, "list_commands"):
        return [prefix]
    return [leaf for name in command.list_commands(context) for leaf in leaves((*prefix, name))]


def check(line: Sequence[str]) -> None:
    """Check a command line (without the program's own name) against the program; nothing is run.

    Raises:
        Mistyped: A command, an option, a value or the number of arguments is wrong.
    """
    command, context, arguments = find(line)
    if "--help" in arguments:
        return
    try:
        command.make_context(context.info_name, list(arguments), parent=context.parent)
    except Exception as error:
        # The library's own error types are private to it; all of them mean that it refused the line.
        raise Mistyped(f"holdfast {' '.join(line)}: {error}") from error
