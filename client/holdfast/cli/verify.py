"""`holdfast verify`: whether a recovery point, application data, or all that a tenant has is whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from holdfast.cli.connection import Connection, on_cluster
from holdfast.cli.exits import DAMAGED, UNAVAILABLE, say
from holdfast.cli.output import print_json, print_line, print_table
from holdfast.cli.progress import shown
from holdfast.findings import ClusterVerifyReport, DamagedRange, DamageReason, VerifyReport
from holdfast_core.runtime.options import format_size

app = typer.Typer()


@app.command("verify")
@on_cluster
def verify(
    connection: Connection,
    id: Annotated[str, typer.Argument(metavar="[ID]", help="Id of a snapshot, a backup or application data.")] = "",
    everything: Annotated[bool, typer.Option("--all", help="Check all points and all application data.")] = False,
    on_nodes: Annotated[
        bool, typer.Option("--on-nodes", help="Let the nodes read and hash; nothing is fetched or opened here.")
    ] = False,
) -> None:
    """Read everything that a point, application data or a tenant consists of and check it, without restoring it."""
    if bool(id) == everything:
        raise typer.BadParameter("name a point or application data, or give --all")
    with connection.manager() as manager:
        if everything:
            told = manager.verify_all(node_only=on_nodes, progress=None)
            damage = [lost for resource in told.damaged for lost in resource.damage]
            print_json(told) if connection.json else _print_all(told)
        else:
            with shown(f"check of {id}") as progress:
                report = manager.survey(id, node_only=on_nodes, progress=progress)
            damage = list(report.damage)
            print_json(report) if connection.json else _print_one(report)
    if damage:
        say(f"{told_damage(damage)}")
        raise typer.Exit(DAMAGED if any(_is_lost(each) for each in damage) else UNAVAILABLE)


def told_damage(damage: Sequence[DamagedRange]) -> str:
    """Return how much is damaged, and why, in one line for people."""
    parts = []
    for ranges, why in (
        ([each for each in damage if _is_lost(each)], "lost"),
        ([each for each in damage if not _is_lost(each)], "not reachable now"),
    ):
        if ranges:
            size = format_size(sum(each.length for each in ranges))
            parts.append(f"{size} in {len(ranges)} range{'s' if len(ranges) > 1 else ''} {why}")
    return " and ".join(parts)


def _is_lost(damage: DamagedRange) -> bool:
    return damage.reason is not DamageReason.UNREACHABLE


def _print_one(report: VerifyReport) -> None:
    thin = _thin(report.thin_blocks)
    if not report.damage:
        print_line(f"{report.resource_id} is whole: {report.blocks} blocks checked{thin}")
        return
    print_line(f"{report.resource_id} is damaged: {report.blocks} blocks checked{thin}")
    print_table(("VOLUME", "OFFSET", "LENGTH", "REASON"), [_row(lost) for lost in report.damage])


def _print_all(report: ClusterVerifyReport) -> None:
    gone = f", {report.gone} forgotten meanwhile" if report.gone else ""
    print_line(
        f"{report.points} points and {report.objects} pieces of application data checked{gone}: "
        f"{report.blocks} blocks{_thin(report.thin_blocks)}; "
        f"{report.damaged_points} points and {report.damaged_objects} pieces of application data are damaged"
    )
    if report.damaged:
        rows = [(each.resource_id, each.owner, *_row(lost)) for each in report.damaged for lost in each.damage]
        print_table(("ID", "OF", "VOLUME", "OFFSET", "LENGTH", "REASON"), rows)


def _row(lost: DamagedRange) -> tuple[str, ...]:
    return lost.volume or "-", str(lost.offset), str(lost.length), lost.reason.value


def _thin(blocks: int) -> str:
    return f"; {blocks} are not on every owner" if blocks else ""
