"""Collection: `holdfast gc`, `holdfast why` and `holdfast reclaimable`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.cli.connection import Connection, on_cluster
from holdfast.cli.output import format_seconds, format_time, print_facts, print_json, print_line, print_table
from holdfast.cli.progress import counted
from holdfast_core.runtime.options import format_size

if TYPE_CHECKING:
    from holdfast.collection import CollectionReport

app = typer.Typer()


@app.command("gc")
@on_cluster
def gc(
    connection: Connection,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only find out what would be deleted.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it has ended, and print what it did.")] = False,
    last: Annotated[bool, typer.Option("--last", help="Begin nothing: print how collection stands.")] = False,
) -> None:
    """Delete blocks that nothing reaches any more. A dry run is always waited for."""
    with connection.manager() as manager:
        if last:
            state = manager.collection_state()
            if connection.json:
                print_json(state)
                return
            found = [report for report in (state.running, state.last, state.planned) if report is not None]
            for report in found:
                _print_report(report)
            if not found:
                print_line("there was no collection yet")
            return
        if not wait and not dry_run:
            started = manager.start_collection()
            if connection.json:
                print_json(started)
                return
            how = "is under way already" if started.joined else "began"
            print_line(f"collection {started.epoch} {how}; see how it goes with: holdfast gc --last")
            return
        with counted("collection") as show:
            report = manager.collect(dry_run=dry_run, progress=lambda at: show(_progress(at)))
    if connection.json:
        print_json(report)
    else:
        _print_report(report)
    if report.failure:
        raise typer.Exit(1)


@app.command("why")
@on_cluster
def why(
    connection: Connection,
    block: Annotated[str, typer.Argument(metavar="BLOCK", help="Id of the block, 64 hexadecimal digits.")],
) -> None:
    """Say what holds a block, and where its copies are."""
    with connection.manager() as manager:
        found = manager.explain_block(block)
    if connection.json:
        print_json(found)
        return
    rows = [
        (
            holder.resource_id,
            holder.vm_id or holder.task_id or "-",
            holder.volume or "-",
            holder.role,
            "-" if holder.offset_bytes is None else str(holder.offset_bytes),
        )
        for holder in found.holders
    ]
    if rows:
        print_table(("HELD BY", "VM OR TASK", "VOLUME", "AS", "OFFSET"), rows)
        if found.more:
            print_line(f"and more than these {len(rows)}")
    else:
        print_line("nothing that you may list reaches this block")
    if found.damaged:
        print_line("it is recorded as damaged: whoever sends its content again heals it")
    copies = [(copy.node_id, copy.state, "yes" if copy.owner else "no") for copy in found.copies]
    print_table(("NODE", "COPY", "OWNER"), copies)


@app.command("reclaimable")
@on_cluster
def reclaimable(
    connection: Connection,
    vm: Annotated[str, typer.Argument(metavar="VM")],
    points: Annotated[
        list[str] | None, typer.Argument(metavar="[POINT]...", help="All that live if not given.")
    ] = None,
) -> None:
    """Say what forgetting points of a VM would free."""
    with connection.manager() as manager:
        found = manager.reclaimable(vm, points or ())
    if connection.json:
        print_json(found)
        return
    rows = [(point.point_id, format_size(point.bytes), str(point.blocks)) for point in found.points]
    print_table(("POINT ALONE", "FREES", "BLOCKS"), rows)
    about = "about " if found.estimated else ""
    print_line(
        f"all of them together: {about}{format_size(found.bytes)} in {found.blocks} blocks, "
        f"{format_size(found.copies_bytes)} with all copies"
    )


def _print_report(report: CollectionReport) -> None:
    """Print a report as people read it."""
    ended = report.ended_unix_ms
    took = f" after {format_seconds((ended - report.started_unix_ms) / 1000)}" if ended else ""
    what = "dry run" if report.dry_run else f"collection {report.epoch}"
    facts = {
        what: f"{report.phase}{took}, begun {format_time(report.started_unix_ms)}",
        "marked": f"{report.marked_blocks} blocks, from {report.points} points, {report.objects} objects, "
        f"{report.sessions} open sessions",
        "garbage": f"{report.garbage_copies} copies, {format_size(report.garbage_bytes)}",
        "young": f"{report.young_copies} copies, {format_size(report.young_bytes)} (open sessions may lean on them)",
    }
    if not report.dry_run:
        facts["deleted"] = f"{report.deleted_copies} copies"
        facts["freed"] = f"{format_size(report.deleted_bytes)} (disks get it back when segments are compacted)"
    if report.thin_blocks:
        facts["thin"] = f"{report.thin_blocks} blocks have fewer copies than they should; repair is on its way"
    if report.lost_blocks:
        facts["lost"] = f"{report.lost_blocks} blocks are on no node; they are recorded as damage"
    print_facts(facts)
    for node_id in report.nodes_left_out:
        print_line(f"left out: node {node_id} did not answer; what it holds is looked at next time")
    for tenant, reason in report.tenants_left_out.items():
        print_line(f"left out: tenant {tenant}: {reason}")
    if report.failure:
        print_line(f"failed: {report.failure}")


def _progress(report: CollectionReport) -> str:
    return (
        f"{report.phase}, {report.points} points, {report.listed_copies} copies looked at, "
        f"{report.deleted_copies} deleted"
    )
