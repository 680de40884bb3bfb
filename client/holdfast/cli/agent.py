"""`holdfast agent`: the mission's calls as a gRPC service beside the VMs."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.cli.connection import Connection, on_cluster
from holdfast.cli.output import print_now
from holdfast.cli.parent import end_with_parent
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.options import TlsFiles, tls_files

if TYPE_CHECKING:
    from holdfast import AsyncStateManager

app = typer.Typer()

_NEEDED = ("grpc_health", "grpc_reflection", "prometheus_client", "structlog")


@app.command("agent")
@on_cluster
def agent(
    connection: Connection,
    listen: Annotated[
        str,
        typer.Option(
            "--listen",
            metavar="unix:PATH|HOST:PORT",
            envvar="HOLDFAST_AGENT_LISTEN",
            help="Where orchestrators call it; HOST:PORT needs TLS, --allow and --below.",
        ),
    ],
    restore_dir: Annotated[
        Path | None,
        typer.Option(
            "--restore-dir",
            metavar="DIR",
            envvar="HOLDFAST_RESTORE_DIR",
            help="Directory that VMs are restored below where a call names none.",
        ),
    ] = None,
    below: Annotated[
        list[Path] | None,
        typer.Option("--below", metavar="DIR", help="Touch only paths below this directory. Repeatable."),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            "--allow", metavar="URI", help="A principal, as its certificate names it, that may call over TLS."
        ),
    ] = None,
    agent_tls_ca: Annotated[
        Path | None, typer.Option("--agent-tls-ca", metavar="FILE", help="Certificates that sign the callers'.")
    ] = None,
    agent_tls_cert: Annotated[
        Path | None, typer.Option("--agent-tls-cert", metavar="FILE", help="The agent's certificate.")
    ] = None,
    agent_tls_key: Annotated[
        Path | None, typer.Option("--agent-tls-key", metavar="FILE", help="Its private key.")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option("--metrics", metavar="HOST:PORT", help="Where to serve Prometheus metrics.")
    ] = None,
) -> None:
    """Serve the calls to orchestrators on this host; prints one line "ready agent=…" and runs until SIGTERM."""
    check_installed()
    end_with_parent()
    tls = tls_files(ca=agent_tls_ca, cert=agent_tls_cert, key=agent_tls_key)
    manager = connection.asynchronous_manager(restore_dir=restore_dir)
    asyncio.run(_serve(manager, listen=listen, tls=tls, allow=allow or (), below=below or (), metrics=metrics))


async def _serve(
    manager: AsyncStateManager,
    *,
    listen: str,
    tls: TlsFiles | None,
    allow: Sequence[str],
    below: Sequence[Path],
    metrics: str | None,
) -> None:
    from holdfast.agent.serving import serve_agent

    async with manager:
        await serve_agent(
            manager,
            listen=listen,
            tls=tls,
            allow=allow,
            below=below,
            metrics_bind=metrics,
            started=lambda address: print_now(f"ready agent={address}"),
        )


def check_installed() -> None:
    """Check that what a service needs is there.

    Raises:
        HoldfastError: INVALID_ARGUMENT in a bare install.
    """
    if any(importlib.util.find_spec(name) is None for name in _NEEDED):
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT,
            "the agent is not part of the bare install; install it with: pip install 'holdfast[agent]'",
        )
