"""`holdfast coordinator`, `holdfast storagenode` and `holdfast health`: single services.

The services are other packages that the SDK does not import and a bare install cannot run. They are found by entry
point, and loaded only when they are asked for.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from holdfast.cli.exits import DONE, UNAVAILABLE
from holdfast.cli.output import print_line
from holdfast.cli.parent import end_with_parent
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.options import TlsFiles, tls_files

app = typer.Typer()

SERVICES: Final = ("coordinator", "storagenode")
"""The services by their names as commands."""

# Everything after the name is the service's own business, its --help too.
_PASS_ON: Final[dict[str, Any]] = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}

_HEALTH_METHOD: Final = "/grpc.health.v1.Health/Check"
_SERVING: Final = 1


@app.command("coordinator", context_settings=_PASS_ON)
def coordinator(context: typer.Context) -> None:
    """Run a coordinator: recovery points, layout, membership. `holdfast coordinator --help` lists its options."""
    raise typer.Exit(run_service("coordinator", context.args))


@app.command("storagenode", context_settings=_PASS_ON)
def storagenode(context: typer.Context) -> None:
    """Run a storage node: keeps blocks. `holdfast storagenode --help` lists its options."""
    raise typer.Exit(run_service("storagenode", context.args))


@app.command("health")
def health(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="A coordinator or storage node.")],
    service: Annotated[
        str, typer.Option("--service", metavar="NAME", help="One service of it, e.g. holdfast.v1.StateService.")
    ] = "",
    tls_ca: Annotated[Path | None, typer.Option("--tls-ca", metavar="FILE", envvar="HOLDFAST_TLS_CA")] = None,
    tls_cert: Annotated[Path | None, typer.Option("--tls-cert", metavar="FILE", envvar="HOLDFAST_TLS_CERT")] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", metavar="FILE", envvar="HOLDFAST_TLS_KEY")] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", metavar="SECONDS", min=0.1)] = 5.0,
) -> None:
    """Ask a service how it is by the standard gRPC health check; exit code 0 only if it serves."""
    files = tls_files(ca=tls_ca, cert=tls_cert, key=tls_key)
    serves = asyncio.run(check_health(address, service, tls=files, timeout_s=timeout_s))
    print_line("SERVING" if serves else "NOT_SERVING")
    if not serves:
        raise typer.Exit(UNAVAILABLE)


async def check_health(address: str, service: str = "", *, tls: TlsFiles | None, timeout_s: float) -> bool:
    """Return whether a service says SERVING.

    The two messages of the standard are one field each, a string and an enumeration; writing them by hand keeps the
    health package, which belongs to the servers, out of the bare install.

    Raises:
        HoldfastError: UNREACHABLE if it does not answer, NOT_FOUND if it has no such service.
    """
    import grpc.aio

    from holdfast_core.runtime.channels import open_channel
    from holdfast_core.runtime.status import error_from_rpc

    name = service.encode()
    if len(name) > 127:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "the service's name is too long")
    request = b"\x0a" + bytes([len(name)]) + name if name else b""
    channel = open_channel(address, tls=tls)
    check: Any = channel.unary_unary(_HEALTH_METHOD)
    try:
        answer: bytes = await check(request, timeout=timeout_s)
    except grpc.aio.AioRpcError as failure:
        raise error_from_rpc(failure, peer=address) from failure
    finally:
        await channel.close()
    return answer == bytes([0x08, _SERVING])


def load_service(name: str) -> Callable[..., None]:
    """Return the command of a service.

    Raises:
        HoldfastError: INVALID_ARGUMENT in a bare install.
    """
    bare = HoldfastError(
        ErrorCode.INVALID_ARGUMENT,
        f"the {name} is not part of the bare install; install it with: pip install 'holdfast[server]'",
    )
    found = tuple(importlib.metadata.entry_points(group="holdfast.commands", name=name))
    if not found:
        raise bare
    try:
        command: Callable[..., None] = found[0].load()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0].startswith("holdfast"):
            raise
        raise bare from error
    return command


def run_service(name: str, arguments: list[str]) -> int:
    """Run a service with its own arguments until it ends; returns the exit code.

    Raises:
        HoldfastError: as `load_service`, and what the service ends with.
    """
    end_with_parent()
    service = typer.Typer(add_completion=False, rich_markup_mode=None)
    service.command()(_loaded(name))
    code = typer.main.get_command(service)(args=arguments, prog_name=f"holdfast {name}", standalone_mode=False)
    return code if isinstance(code, int) else DONE


def _loaded(name: str) -> Callable[..., None]:
    """As `load_service`, in a process that becomes the service; what is there then is never garbage."""
    gc.disable()
    try:
        return load_service(name)
    finally:
        gc.freeze()
        gc.enable()
