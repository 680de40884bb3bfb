"""The command as a whole: which commands there are."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Annotated

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
