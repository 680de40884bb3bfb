"""Recovery points: `holdfast snapshot`, `backup`, `restore`, `points`, `show`, `forget`, `verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.cli.changed_file import read_changed
from holdfast.cli.connection import Connection, on_cluster
from holdfast.cli.exits import say
from holdfast.cli.output import format_seconds, format_time, print_facts, print_json, print_line, print_table, to_json
from holdfast.cli.progress import shown
from holdfast_core.model.limits import SAMPLE_DEFAULT
from holdfast_core.model.names import OBJECT_PREFIX
from holdfast_core.runtime.options import format_size

if TYPE_CHECKING:
    from holdfast import AsyncStateManager, StateManager
    from holdfast.results import ObjectInfo, PointInfo, TransferStats

app = typer.Typer()

VmArgument = Annotated[str, typer.Argument(metavar="VM", help="Name of the VM.")]
SnapshotArgument = Annotated[str, typer.Argument(metavar="SNAPSHOT", help="Snapshot that the lineage starts from.")]
TakeoverOption = Annotated[
    bool, typer.Option("--takeover", help="End another session that holds the VM, instead of being refused.")
]
BaseOption = Annotated[
    str, typer.Option("--base", metavar="POINT", help="A point of any VM whose content need not be sent again.")
]


@app.command("snapshot")
@on_cluster
def snapshot(connection: Connection, vm: VmArgument, base: BaseOption = "", takeover: TakeoverOption = False) -> None:
    """Save a VM's first point in time; prints its id."""
    with connection.manager() as manager, shown(f"snapshot of {vm}") as progress:
        point_id = manager.create_snapshot(vm, base=base, takeover=takeover, progress=progress)
        _report(connection, manager, point_id)


@app.command("backup")
@on_cluster
def backup(
    connection: Connection,
    vm: VmArgument,
    snapshot: SnapshotArgument,
    parent: Annotated[
        str, typer.Option("--parent", metavar="POINT", help="Build on this point, not on the newest one.")
    ] = "",
    base: BaseOption = "",
    takeover: TakeoverOption = False,
    changed: Annotated[
        Path | None,
        typer.Option(
            "--changed", metavar="FILE", help="JSON of the [offset, length] pairs that changed since --since."
        ),
    ] = None,
    since: Annotated[
        str,
        typer.Option("--since", metavar="POINT", help="Point that --changed counts from; used if it is the parent."),
    ] = "",
    sample: Annotated[
        float,
        typer.Option(
            "--sample", metavar="SHARE", help="Share of what is called unchanged to read all the same; 0 trusts."
        ),
    ] = SAMPLE_DEFAULT,
) -> None:
    """Save what changed since the newest point that descends from SNAPSHOT; prints the backup's id."""
    told = read_changed(changed) if changed is not None else None
    with connection.manager() as manager, shown(f"backup of {vm}") as progress:
        point_id = manager.incremental_backup(
            vm,
            snapshot,
            parent=parent,
            base=base,
            takeover=takeover,
            changed=told,
            since=since,
            sample=sample,
            progress=progress,
        )
        _report(connection, manager, point_id)


@app.command("restore")
@on_cluster
def restore(
    connection: Connection,
    snapshot: SnapshotArgument,
    backup: Annotated[
        str, typer.Argument(metavar="[BACKUP]", help="Backup to restore; the snapshot itself if not given.")
    ] = "",
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Directory to write to; must be empty or not exist.")
    ] = None,
    onto: Annotated[
        Path | None,
        typer.Option("--onto", metavar="DIR", help="Directory with older copies NAME.raw; fetches only what differs."),
    ] = None,
    image_format: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="Format of the images: raw or qcow2.")
    ] = "raw",
    durable: Annotated[bool, typer.Option("--durable", help="Return only when the files are on the disk.")] = False,
) -> None:
    """Rebuild a VM's volumes as DIR/NAME.raw, with vm.json and the VM's definition beside them; prints DIR."""
    if (to is None) == (onto is None):
        raise typer.BadParameter("say where: --to names a new directory, --onto one with older copies")
    with connection.manager() as manager, shown(f"restore of {backup or snapshot}") as progress:
        where = manager.restore_vm(
            snapshot, backup, target=to, onto=onto, image_format=image_format, durable=durable, progress=progress
        )
        report = manager.last_restore
    assert report is not None, "a restore has just ended"
    if connection.json:
        files = sorted(str(path) for path in where.iterdir())
        print_json(
            {
                "point_id": backup or snapshot,
                "target": str(where),
                "files": files,
                "fetched_bytes": report.fetched_bytes,
                "kept_bytes": report.kept_bytes,
            }
        )
        return
    if onto is not None:
        say(f"fetched {format_size(report.fetched_bytes)}, {format_size(report.kept_bytes)} were there already")
    print_line(str(where))


@app.command("points")
@on_cluster
def points(
    connection: Connection,
    vm: VmArgument,
    forgotten: Annotated[bool, typer.Option("--all", help="Show forgotten points too.")] = False,
) -> None:
    """List a VM's recovery points, oldest first."""
    with connection.manager() as manager:
        found = manager.points(vm, include_forgotten=forgotten)
    if connection.json:
        print_json(found)
        return
    rows = [
        (
            str(point.number),
            point.point_id,
            point.parent_id or "-",
            format_time(point.created_unix_ms),
            format_size(point.size_bytes),
            format_size(point.stats.changed_bytes),
            format_size(point.stats.stored_bytes),
            "forgotten" if point.forgotten else _consistency(point),
            format_time(point.lock.until_unix_ms) if point.lock else "-",
        )
        for point in found
    ]
    print_table(("NO", "ID", "PARENT", "TIME", "SIZE", "CHANGED", "STORED", "STATE", "LOCKED UNTIL"), rows)


@app.command("show")
@on_cluster
def show(
    connection: Connection,
    id: Annotated[str, typer.Argument(metavar="ID", help="Id of a snapshot, a backup or application data.")],
) -> None:
    """Show one recovery point or one piece of application data."""
    with connection.manager() as manager:
        found: PointInfo | ObjectInfo
        found = manager.application_data(id) if id.startswith(OBJECT_PREFIX) else manager.point(id)
    if connection.json:
        print_json(found)
        return
    told_apart = ("stats", "volumes", "definition", "lock")
    facts = {name: _fact(name, value) for name, value in to_json(found).items() if name not in told_apart}
    print_facts(facts)
    for volume in to_json(found).get("volumes", ()):
        print_line(
            f"volume {volume['name']}: {format_size(volume['size_bytes'])} in {volume['block_count']} blocks "
            f"of {format_size(volume['block_bytes'])}, {volume['consistency']}, read: {volume['reading']}"
        )
    lock = to_json(found).get("lock")
    if lock:
        print_line(f"locked until {format_time(lock['until_unix_ms'])} by {lock['principal']}")
    print_line(describe(found.stats))


@app.command("forget")
@on_cluster
def forget(
    connection: Connection, id: Annotated[str, typer.Argument(metavar="ID", help="Id of a snapshot or backup.")]
) -> None:
    """Forget a recovery point; the others stay whole, each is a complete image."""
    with connection.manager() as manager:
        manager.forget(id)
    if connection.json:
        print_json({"forgotten": id})


@app.command("verify")
@on_cluster
def verify(
    connection: Connection,
    id: Annotated[str, typer.Argument(metavar="ID", help="Id of a snapshot or backup.")],
    on_nodes: Annotated[
        bool, typer.Option("--on-nodes", help="Let the nodes read and hash; nothing is fetched or opened here.")
    ] = False,
) -> None:
    """Read everything that a recovery point consists of and check it, without restoring it."""
    with connection.manager() as manager, shown(f"check of {id}") as progress:
        report = manager.verify(id, node_only=on_nodes, progress=progress)
    if connection.json:
        print_json(report)
        return
    thin = f"; {report.thin_blocks} are not on every owner" if report.thin_blocks else ""
    print_line(f"{report.resource_id} is whole: {report.blocks} blocks checked{thin}")


def describe(stats: TransferStats) -> str:
    """Return what a session moved, in one line for people."""
    line = (
        f"{format_size(stats.logical_bytes)} in size, {format_size(stats.changed_bytes)} changed, "
        f"{format_size(stats.deduplicated_bytes)} known already, {format_size(stats.stored_bytes)} stored, "
        f"{format_size(stats.sent_bytes)} sent to all copies"
    )
    if stats.under_replicated_blocks:
        line += f"; {stats.under_replicated_blocks} blocks are not yet on every owner"
    return line


def transfer_json(manager: StateManager | AsyncStateManager, what: dict[str, str]) -> dict[str, Any]:
    """Return `what` was made, with the figures of the manager's last write."""
    transfer = manager.last_transfer
    figures = to_json(transfer) if transfer is not None else {}
    figures.pop("resource_id", None)
    return {**what, **figures}


def report_transfer(manager: StateManager | AsyncStateManager, what: str) -> None:
    """Say on stderr what the manager's last write moved."""
    transfer = manager.last_transfer
    if transfer is not None:
        for notice in transfer.notices:
            say(notice)
        say(f"{what}: {describe(transfer.stats)}; {format_seconds(transfer.committed_s)}")


def _report(connection: Connection, manager: StateManager, point_id: str) -> None:
    report_transfer(manager, point_id)
    if connection.json:
        print_json(transfer_json(manager, {"point_id": point_id}))
    else:
        print_line(point_id)


def _consistency(point: PointInfo) -> str:
    return ",".join(sorted({volume.consistency.value for volume in point.volumes}))


def _fact(name: str, value: Any) -> str:
    if name.endswith("_unix_ms"):
        return format_time(value)
    if isinstance(value, dict):
        return " ".join(f"{key}={text}" for key, text in value.items()) or "-"
    return format_size(value) if name.endswith("_bytes") else str(value)
