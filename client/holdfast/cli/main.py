"""Where the command begins: what is typed goes to what it names, and each kind of error to its end."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Final

import typer

from holdfast.cli.exits import DONE, FAILED, INTERRUPTED, USAGE, exit_code, say
from holdfast.cli.services import SERVICES, run_service
from holdfast_core.model.errors import HoldfastError

# The base of all of typer's complaints about what was typed; typer names only this one subclass of it in public.
_USAGE_ERROR: Final[type[Exception]] = typer.BadParameter.__mro__[1]


def run(arguments: Sequence[str]) -> int:
    """Run one command line (without the program's name) and return its exit code; errors are told on stderr."""
    try:
        code = _called(list(arguments) or ["--help"])
    except HoldfastError as error:
        say(error.message)
        return exit_code(error)
    except _USAGE_ERROR as error:
        say(f"{_usage_message(error)}; `holdfast --help` tells more")
        return USAGE
    except (KeyboardInterrupt, typer.Abort):
        say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # Who read our output (`| head`) has gone; a second complaint when Python flushes at exit helps nobody.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:  # noqa: BLE001  # the outermost frame: a user gets one line, a developer the traceback
        say(f"a fault of Holdfast: {type(error).__name__}: {error}; HOLDFAST_TRACEBACK=1 shows where")
        if os.environ.get("HOLDFAST_TRACEBACK"):
            traceback.print_exc()
        return FAILED
    if code == INTERRUPTED:
        say("interrupted")
    return code if isinstance(code, int) else DONE


def _called(arguments: list[str]) -> object:
    """Run what a command line names, and return what it returns."""
    if arguments[0] in SERVICES:
        # Straight on: to load and set up all other commands takes a quarter of the time that a service takes to start.
        return run_service(arguments[0], arguments[1:])
    from holdfast.cli.app import command

    return command()(args=arguments, prog_name="holdfast", standalone_mode=False)


def main() -> None:
    """Run the command line of this process."""
    sys.exit(run(sys.argv[1:]))


def _usage_message(error: Exception) -> str:
    formatted = getattr(error, "format_message", None)
    text = formatted() if callable(formatted) else str(error)
    return str(text).rstrip(".")


if __name__ == "__main__":
    main()
