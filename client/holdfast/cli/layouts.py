"""`holdfast layout`: which nodes own which blocks, how far the last change has come, and how it came to that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.cli.connection import Connection, on_cluster
from holdfast.cli.output import format_time, print_json, print_line, print_table, to_json
from holdfast.standing import LayoutProgress, progress_of

if TYPE_CHECKING:
    from holdfast.cluster import LayoutChange, LayoutInfo, LayoutPlan

app = typer.Typer(help="Show, plan and change which nodes own which blocks.")

RemoveOption = Annotated[
    list[str] | None, typer.Option("--remove", metavar="NODE", help="Leave this node out. Repeatable.")
]


@app.command("show")
@on_cluster
def show(connection: Connection) -> None:
    """Show the living layouts, newest first, and how much is where the newest wants it."""
    with connection.manager() as manager:
        found = manager.layout()
        progress = progress_of(found, manager.nodes())
    if connection.json:
        print_json(to_json(found) | {"progress": to_json(progress)})
        return
    if not found.layouts:
        print_line(f"no layout yet: {found.nodes_registered} of {found.nodes_expected} nodes have registered")
        return
    print_layout(found.layouts[0])
    for older in found.layouts[1:]:
        print_line(f"layout {older.epoch} is alive until what it holds is where layout {progress.epoch} wants it")
    print_line(_progress_line(progress))


@app.command("plan")
@on_cluster
def plan(connection: Connection, remove: RemoveOption = None) -> None:
    """Say what the next layout would change; nothing changes yet."""
    with connection.manager() as manager:
        planned = manager.plan_layout(remove=remove or ())
    if connection.json:
        print_json(planned)
        return
    print_plan(planned)
    removing = "".join(f" --remove {node}" for node in remove or ())
    print_line(f"to do it: holdfast layout apply --epoch {planned.previous_epoch}{removing}")


@app.command("apply")
@on_cluster
def apply(
    connection: Connection,
    epoch: Annotated[
        int | None,
        typer.Option("--epoch", min=0, help="Epoch that the plan started from; refused if another came in between."),
    ] = None,
    remove: RemoveOption = None,
) -> None:
    """Make the planned layout the newest. Without --epoch it plans now and applies that."""
    with connection.manager() as manager:
        previous = manager.plan_layout(remove=remove or ()).previous_epoch if epoch is None else epoch
        layout = manager.apply_layout(previous, remove=remove or ())
    if connection.json:
        print_json(layout)
    else:
        print_layout(layout)


@app.command("history")
@on_cluster
def history(connection: Connection) -> None:
    """List the changes of the layout, newest first."""
    with connection.manager() as manager:
        changes = manager.layout_history()
    if connection.json:
        print_json(changes)
        return
    rows = [
        (
            str(change.epoch),
            format_time(change.made_unix_ms),
            format_time(change.settled_unix_ms),
            f"{change.slots_moved}/{change.slots_total}",
            change.reason,
            _came_and_went(change),
        )
        for change in changes
    ]
    print_table(("LAYOUT", "MADE", "SETTLED", "MOVED", "WHY", "NODES"), rows)


def print_layout(layout: LayoutInfo) -> None:
    """Print who has how many places of a layout."""
    print_line(f"layout {layout.epoch}: {layout.partitions} partitions, {layout.replicas} copies")
    rows = [(node, layout.zones[node], str(slots)) for node, slots in sorted(layout.slots.items())]
    print_table(("NODE", "ZONE", "PLACES"), rows)


def print_plan(planned: LayoutPlan) -> None:
    """Print a plan: the layout that it leads to, what moves, and why."""
    print_layout(planned.layout)
    print_line(f"{planned.slots_moved} of {planned.slots_total} places move")
    for line in planned.explanation:
        print_line(line)


def _progress_line(progress: LayoutProgress) -> str:
    at_risk = f"; {progress.at_risk} wait for former owners that cannot be reached" if progress.at_risk else ""
    if progress.living == 1:
        return f"settled: nothing is on its way{at_risk}"
    return f"{progress.synced} of {progress.slots} places have all that they hold{at_risk}"


def _came_and_went(change: LayoutChange) -> str:
    return " ".join([*(f"+{node}" for node in change.joined), *(f"-{node}" for node in change.left)]) or "-"
