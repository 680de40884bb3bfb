"""`holdfast pki`: certificates for clusters without a PKI of their own. Works on files alone, no cluster is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from holdfast.cli.connection import Connection
from holdfast.cli.output import format_time, print_facts, print_json, print_line
from holdfast_core.runtime.clock import SystemClock

app = typer.Typer(help="Make certificates for mutual TLS, without a PKI of your own.")

KindName = Literal["admin", "client", "node", "coordinator", "agent"]
_DirArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the authority.")]
_JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
_DAYS_MAX: Final = 36_500


@app.command("init")
def init(
    context: typer.Context,
    folder: _DirArgument,
    trust_domain: Annotated[
        str, typer.Option("--trust-domain", metavar="NAME", help="What all principals begin with: spiffe://NAME/.")
    ] = "holdfast",
    days: Annotated[
        int, typer.Option("--days", metavar="N", min=1, max=_DAYS_MAX, help="How long the authority is valid.")
    ] = 3650,
    json: _JsonOption = False,
) -> None:
    """Make a certificate authority: DIR/ca.pem for everybody, DIR/ca.key for nobody; prints the path of ca.pem."""
    # Imported here: reading and writing certificates takes a while to load, and other commands need none of it.
    from holdfast.pki import init_authority

    path = init_authority(folder, clock=SystemClock(), trust_domain=trust_domain, days=days)
    if _wants_json(context, json):
        print_json({"ca": path, "trust_domain": trust_domain})
    else:
        print_line(str(path))


@app.command("issue")
def issue(
    context: typer.Context,
    folder: _DirArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the owner: a person, a program, a machine.")],
    kind: Annotated[KindName, typer.Option("--kind", help="What the owner is; part of its principal.")],
    host: Annotated[
        list[str] | None,
        typer.Option(
            "--host",
            metavar="HOST",
            help="Name or IP address that it is reached by. Repeatable; servers have localhost anyway.",
        ),
    ] = None,
    days: Annotated[int, typer.Option("--days", metavar="N", min=1, max=_DAYS_MAX, help="How long it is valid.")] = 90,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FOLDER", help="Where to put the files; DIR/NAME if not given."),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Put them in the place of older ones; running services take them over.")
    ] = False,
    json: _JsonOption = False,
) -> None:
    """Make a key and a certificate: FOLDER/ca.pem, cert.pem and key.pem, for --tls-ca, --tls-cert and --tls-key."""
    from holdfast.pki import Kind
    from holdfast.pki import issue as issue_certificate

    issued = issue_certificate(
        folder,
        name,
        kind=Kind(kind),
        clock=SystemClock(),
        hosts=host or (),
        days=days,
        output=output,
        replace=replace,
    )
    if _wants_json(context, json):
        print_json(issued)
        return
    print_facts({"folder": str(issued.folder), "principal": issued.principal, "ends": format_time(issued.ends_unix_ms)})


def _wants_json(context: typer.Context, asked: bool) -> bool:
    """Whether --json stands after the command or before it."""
    return asked or (isinstance(context.obj, Connection) and context.obj.json)
