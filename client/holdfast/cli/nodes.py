"""`holdfast nodes` lists the storage nodes, `holdfast node` decides of one: drain, weight, removal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.cli.connection import Connection, on_cluster
from holdfast.cli.layouts import print_plan
from holdfast.cli.output import format_time, print_json, print_line, print_table
from holdfast.standing import describe_node
from holdfast_core.runtime.options import format_size, parse_size

if TYPE_CHECKING:
    from holdfast.cluster import NodeDecision

app = typer.Typer()
node_app = typer.Typer(help="Drain, weigh and remove storage nodes.")

NodeArgument = Annotated[str, typer.Argument(metavar="NODE", help="Name of the node.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only say what would move.")]


@app.command("nodes")
@on_cluster
def nodes(connection: Connection) -> None:
    """List the storage nodes."""
    with connection.manager() as manager:
        found = manager.nodes()
    if connection.json:
        print_json(found)
        return
    rows = [
        (
            node.node_id,
            describe_node(node),
            node.zone,
            node.address,
            format_size(node.used_bytes),
            format_size(node.free_bytes),
            str(node.block_count),
            str(node.quarantined_count),
            format_time(node.last_seen_unix_ms),
        )
        for node in found
    ]
    print_table(("NODE", "STATE", "ZONE", "ADDRESS", "USED", "FREE", "BLOCKS", "BAD", "LAST SEEN"), rows)


@node_app.command("drain")
@on_cluster
def drain(connection: Connection, node: NodeArgument, dry_run: DryRunOption = False) -> None:
    """Let a node own nothing from now on; it hands over what it holds."""
    with connection.manager() as manager:
        decision = manager.set_node(node, draining=True, dry_run=dry_run)
    _print_decision(connection, decision, dry_run=dry_run)


@node_app.command("undrain")
@on_cluster
def undrain(connection: Connection, node: NodeArgument, dry_run: DryRunOption = False) -> None:
    """Take a node that drains back into the layout."""
    with connection.manager() as manager:
        decision = manager.set_node(node, draining=False, dry_run=dry_run)
    _print_decision(connection, decision, dry_run=dry_run)


@node_app.command("weight")
@on_cluster
def weight(
    connection: Connection,
    node: NodeArgument,
    size: Annotated[str, typer.Argument(metavar="SIZE", help="Its weight, e.g. 4TiB; 0 for its capacity.")],
    dry_run: DryRunOption = False,
) -> None:
    """Give a node another weight than its capacity; it owns more or less accordingly."""
    weight_bytes = parse_size(size)
    with connection.manager() as manager:
        decision = manager.set_node(node, weight_bytes=weight_bytes, dry_run=dry_run)
    _print_decision(connection, decision, dry_run=dry_run)


@node_app.command("remove")
@on_cluster
def remove(
    connection: Connection,
    node: NodeArgument,
    lost: Annotated[bool, typer.Option("--lost", help="It never comes back: what it alone holds is given up.")] = False,
) -> None:
    """End the membership of a node that is drained and stopped."""
    with connection.manager() as manager:
        manager.remove_node(node, lost=lost)
    if connection.json:
        print_json({"removed": node})
    else:
        print_line(f"{node} is removed")


def _print_decision(connection: Connection, decision: NodeDecision, *, dry_run: bool) -> None:
    if connection.json:
        print_json(decision)
        return
    if decision.plan is None:
        print_line("noted; it counts when the first layout forms" if not dry_run else "there is no layout yet")
        return
    print_plan(decision.plan)
    if dry_run:
        print_line("nothing has changed; leave out --dry-run to do it")
    elif decision.applied:
        print_line("done; `holdfast layout show` says how far it has come")
