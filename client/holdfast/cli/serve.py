"""`holdfast serve`: a recovery point as network block devices; `holdfast overlay`: what guests wrote over it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from holdfast.cli.connection import Connection, on_cluster
from holdfast.cli.exits import say
from holdfast.cli.output import print_facts, print_json, print_line, print_now, print_table
from holdfast.cli.points import SnapshotArgument, TakeoverOption, report_transfer, transfer_json
from holdfast.cli.progress import shown
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.options import format_size, is_loopback, parse_size
from holdfast_core.runtime.signals import termination_signals

if TYPE_CHECKING:
    from holdfast import AsyncStateManager
    from holdfast.serving import PointServer
    from holdfast.serving.overlay import Overlay

app = typer.Typer()
overlay_app = typer.Typer(help="What guests wrote over served points.")

DEFAULT_LISTEN: Final = "127.0.0.1:10809"

OverlayArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Directory of the overlay.")]


@app.command("serve")
@on_cluster
def serve(
    connection: Connection,
    snapshot: SnapshotArgument,
    backup: Annotated[
        str, typer.Argument(metavar="[BACKUP]", help="Backup to serve; the snapshot itself if not given.")
    ] = "",
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help=f"Where to listen; {DEFAULT_LISTEN} if not said.")
    ] = "",
    socket: Annotated[
        Path | None, typer.Option("--socket", metavar="PATH", help="Listen on this Unix socket instead.")
    ] = None,
    overlay: Annotated[
        Path | None,
        typer.Option("--overlay", metavar="DIR", help="Keep what guests write here; without it they cannot write."),
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Refuse writes, and show what DIR has.")] = False,
    hydrate: Annotated[
        bool, typer.Option("--hydrate", help="Bring all of the point to DIR, behind the guests.")
    ] = False,
    save: Annotated[bool, typer.Option("--save", help="At the end, save DIR as a backup and print its id.")] = False,
    cache: Annotated[str, typer.Option("--cache", metavar="SIZE", help="Blocks kept in memory.")] = "64MiB",
    read_ahead: Annotated[
        str, typer.Option("--read-ahead", metavar="SIZE", help="What a reader that goes forward gets ahead; 0 is none.")
    ] = "4MiB",
) -> None:
    """Export a point's volumes over NBD; prints `ready URI` for each, and runs until SIGTERM or Ctrl-C.

    Blocks are fetched when a guest reads them, so that it can boot at once. What it has flushed to DIR survives a
    crash; the same command goes on there.
    """
    if save and (overlay is None or read_only):
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "--save needs an overlay that guests may write to")
    if not listen and socket is None:
        listen = DEFAULT_LISTEN
    if listen and not is_loopback(listen):
        say(f"whoever reaches {listen} can read the point and write to it: NBD has neither encryption nor login here")
    options = {
        "listen": listen,
        "socket": socket,
        "overlay": overlay,
        "read_only": read_only,
        "hydrate": hydrate,
        "cache_bytes": parse_size(cache),
        "read_ahead_bytes": parse_size(read_ahead),
        "hydrated": lambda name: say(f"volume {name} is all here"),
    }
    asyncio.run(_serve(connection, snapshot, backup, options, save=overlay if save else None))


async def _serve(
    connection: Connection, snapshot: str, backup: str, options: dict[str, Any], *, save: Path | None
) -> None:
    async with connection.async_manager() as manager:
        with termination_signals() as asked:
            opening = asyncio.ensure_future(manager.serve_point(snapshot, backup, **options))
            stopping = asyncio.ensure_future(asked.wait())
            await asyncio.wait((opening, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not opening.done():
                opening.cancel()
                await asyncio.wait((opening,))
                raise KeyboardInterrupt
            async with opening.result() as server:
                _announce(connection, server)
                watching = asyncio.ensure_future(_watch(server))
                await stopping
                say("stopping")
                watching.cancel()
        if save is not None:
            await _save(connection, manager, save)


def _announce(connection: Connection, server: PointServer) -> None:
    uris = {name: server.uri(name) for name in server.volumes}
    if connection.json:  # on one line, for who reads it while the command runs
        print_now(json.dumps({"point_id": server.point_id, "uris": uris}))
    else:
        print_now("\n".join(f"ready {uri}" for uri in uris.values()))


async def _watch(server: PointServer) -> None:
    """Say what stops a hydrate; the exports go on without it."""
    try:
        await server.hydrate_ended()
    except HoldfastError as error:
        say(f"the hydrate has stopped, and blocks are fetched as they are read: {error.message}")


async def _save(connection: Connection, manager: AsyncStateManager, directory: Path, *, takeover: bool = False) -> None:
    with shown(f"save of {directory}") as progress:
        point_id = await manager.save_overlay(directory, takeover=takeover, progress=progress)
    report_transfer(manager, point_id)
    if connection.json:
        print_json(transfer_json(manager, {"point_id": point_id}))
    else:
        print_line(point_id)


@overlay_app.command("save")
@on_cluster
def save_overlay(connection: Connection, directory: OverlayArgument, takeover: TakeoverOption = False) -> None:
    """Save what was written over a point as a backup of its VM; prints the backup's id. DIR stays."""

    async def run() -> None:
        async with connection.async_manager() as manager:
            await _save(connection, manager, directory, takeover=takeover)

    asyncio.run(run())


@overlay_app.command("show")
@on_cluster
def show_overlay(connection: Connection, directory: OverlayArgument) -> None:
    """Show what an overlay lies over and how much it holds; asks no cluster."""
    with _opened(directory) as overlay:
        manifest, written, fetched = overlay.manifest, overlay.written_bytes(), overlay.fetched_bytes()
    if connection.json:
        volumes = [
            {
                "name": volume.name,
                "size_bytes": volume.size_bytes,
                "written_bytes": written[volume.name],
                "fetched_bytes": fetched[volume.name],
            }
            for volume in manifest.volumes
        ]
        print_json({"vm_id": manifest.vm_id, "point_id": manifest.point_id, "volumes": volumes})
        return
    print_facts({"vm_id": manifest.vm_id, "point_id": manifest.point_id})
    rows = [
        (
            volume.name,
            format_size(volume.size_bytes),
            format_size(written[volume.name]),
            format_size(fetched[volume.name]),
        )
        for volume in manifest.volumes
    ]
    print_table(("VOLUME", "SIZE", "WRITTEN", "FETCHED"), rows)


@overlay_app.command("discard")
@on_cluster
def discard_overlay(connection: Connection, directory: OverlayArgument) -> None:
    """Remove an overlay with all that was written over its point; asks no cluster."""
    with _opened(directory) as overlay:
        overlay.discard()
    if connection.json:
        print_json({"discarded": str(directory)})


def _opened(directory: Path) -> Overlay:
    # Imported here: it brings the codecs, which other commands need not wait for.
    from holdfast.serving.overlay import Overlay

    return Overlay(directory, None)
