"""The command as a whole: which commands there are, and how each kind of error ends."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Final

import typer

from holdfast.cli import (
    access,
    agent,
    audit,
    cluster,
    collection,
    files,
    keys,
    layouts,
    nodes,
    objects,
    pki,
    points,
    retention,
    serve,
    services,
    tenants,
    up,
    verify,
    vms,
)
from holdfast.cli.connection import root_options
from holdfast.cli.demo import command as demo
from holdfast.cli.exits import DONE, FAILED, INTERRUPTED, USAGE, exit_code, say
from holdfast_core.model.errors import HoldfastError

# The base of all of typer's complaints about what was typed; typer names only this one subclass of it in public.
_USAGE_ERROR: Final[type[Exception]] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="holdfast",
    # Help and errors stay plain text, for scripts and narrow terminals; it also saves a tenth of a second of imports.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
for part in (up, services, agent, points, retention, verify, serve, cluster, nodes, collection, demo):
    app.registered_commands.extend(part.app.registered_commands)
app.add_typer(vms.app, name="vm")
app.add_typer(retention.retention_app, name="retention")
app.add_typer(objects.app, name="app")
app.add_typer(files.app, name="files")
app.add_typer(serve.overlay_app, name="overlay")
app.add_typer(nodes.node_app, name="node")
app.add_typer(layouts.app, name="layout")
app.add_typer(pki.app, name="pki")
app.add_typer(tenants.app, name="tenant")
app.add_typer(access.app, name="access")
app.add_typer(audit.app, name="audit")
app.add_typer(keys.app, name="keys")


def _show_version(asked: bool) -> None:
    if asked:
        import importlib.metadata

        sys.stdout.write(f"holdfast {importlib.metadata.version('holdfast')}\n")
        raise typer.Exit


@app.callback()
@root_options
def _holdfast(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Keep the state of stateless VMs: snapshot, back up incrementally, throw away, rebuild bit for bit."""


@functools.cache
def command() -> Callable[..., object]:
    """The whole command line, made ready to take arguments; made once, since that takes a tenth of a second."""
    return typer.main.get_command(app)


def run(arguments: Sequence[str]) -> int:
    """Run one command line (without the program's name) and return its exit code; errors are told on stderr."""
    try:
        code = command()(args=list(arguments) or ["--help"], prog_name="holdfast", standalone_mode=False)
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


def main() -> None:
    """Run the command line of this process."""
    sys.exit(run(sys.argv[1:]))


def _usage_message(error: Exception) -> str:
    formatted = getattr(error, "format_message", None)
    text = formatted() if callable(formatted) else str(error)
    return str(text).rstrip(".")


if __name__ == "__main__":
    main()
