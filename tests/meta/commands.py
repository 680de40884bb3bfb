"""The real command line as data: which commands there are, and what they take.

Whatever a README or a compose file tells people to type is parsed here by the program that would run it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Final

import typer
import typer.main

from holdfast.cli.app import app
from holdfast.cli.services import SERVICES, load_service

# The base of typer's complaints, which it does not name in public.
USAGE_ERROR: Final[type[Exception]] = typer.BadParameter.__mro__[1]


class Mistyped(Exception):
    """The program would refuse this command line."""


@functools.cache
def root() -> Any:
    """The whole command `holdfast`."""
    return typer.main.get_command(app)


@functools.cache
def service(name: str) -> Any:
    """The command of a service, as `holdfast NAME` builds it."""
    program = typer.Typer(add_completion=False)
    program.command()(load_service(name))
    return typer.main.get_command(program)


def find(words: Sequence[str]) -> tuple[Any, Any, list[str]]:
    """Find the command that words lead to: (command, its context's parent, the words left over as its arguments).

    Raises:
        Mistyped: There is no such command.
    """
    command, context, left = root(), None, list(words)
    while hasattr(command, "list_commands"):
        context = command.context_class(command, info_name=command.name, parent=context)
        # Options of the group itself stand before the command's name.
        _, left, _ = command.make_parser(context).parse_args(args=left)
        name = left.pop(0) if left else ""
        inner = service(name) if name in SERVICES else command.get_command(context, name)
        if inner is None:
            raise Mistyped(f"'{context.command_path}' has no command {name!r}; it has {command.list_commands(context)}")
        command = inner
    return command, context, left


def options_of(words: Sequence[str]) -> set[str]:
    """The option names that a command takes; for no words, those that stand before a command."""
    return {
        name
        for parameter in _parameters(words)
        for name in (*parameter.opts, *parameter.secondary_opts)
        if name.startswith("-")
    }


def variables_of(words: Sequence[str]) -> set[str]:
    """The environment variables that a command reads its options from, those of `holdfast` itself among them."""
    found: set[str] = set()
    for parameter in (*_parameters(words), *root().params):
        variables = parameter.envvar or ()
        found.update([variables] if isinstance(variables, str) else variables)
    return found


def _parameters(words: Sequence[str]) -> list[Any]:
    parameters: list[Any] = (find(words)[0] if words else root()).params
    return parameters


def leaves(prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command, as the words that lead to it."""
    command = root()
    for word in prefix:
        command = service(word) if word in SERVICES else command.get_command(None, word)
    if not hasattr(command, "list_commands"):
        return [prefix]
    return [leaf for name in command.list_commands(None) for leaf in leaves((*prefix, name))]


def check(line: Sequence[str]) -> None:
    """Check a command line (without the program's own name) against the program; nothing is run.

    Raises:
        Mistyped: A command, an option, a value or the number of arguments is wrong.
    """
    if list(line) in (["--help"], ["--version"]):
        return
    try:
        command, parent, arguments = find(line)
        if "--help" not in arguments:
            command.make_context(command.name, list(arguments), parent=parent)
    except USAGE_ERROR as error:
        raise Mistyped(f"holdfast {' '.join(line)}: {error}") from error
