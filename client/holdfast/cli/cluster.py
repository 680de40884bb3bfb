"""The cluster as a whole: `holdfast status`, `nodes`, `stats` and `layout show|plan|apply`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.cli.connection import Connection, on_cluster
from holdfast.cli.output import format_time, print_facts, print_json, print_line, print_table
from holdfast_core.runtime.options import format_size

if TYPE_CHECKING:
    from holdfast.results import LayoutInfo, NodeInfo, Stats

app = typer.Typer()
layout_app = typer.Typer(help="Show, plan and change which nodes own which blocks.")

RemoveOption = Annotated[
    list[str] | None, typer.Option("--remove", metavar="NODE", help="Leave this node out. Repeatable.")
]


@app.command("status")
@on_cluster
def status(connection: Connection) -> None:
    """Say how the cluster is."""
    with connection.manager() as manager:
        found = manager.cluster_status()
    if connection.json:
        print_json(found)
        return
    up = sum(node.up for node in found.nodes)
    print_facts(
        {
            "state": found.state,
            "writable": "yes" if found.writable else "no",
            "nodes": f"{up} up of {len(found.nodes)}",
            "copies": str(found.replicas),
            "layout": str(found.layout_epoch) if found.layout_epoch else "none yet",
            "VMs": str(found.vm_count),
            "points": str(found.point_count),
            "objects": str(found.object_count),
            "open sessions": str(found.session_count),
            "cluster": found.cluster_id,
        }
    )


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
            _node_state(node),
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


@app.command("stats")
@on_cluster
def stats(
    connection: Connection,
    vm: Annotated[str, typer.Argument(metavar="[VM]", help="Only this VM; everything if not given.")] = "",
) -> None:
    """Sum up what is kept and what it takes."""
    with connection.manager() as manager:
        found = manager.stats(vm)
    if connection.json:
        print_json(found)
        return
    facts = {
        "VMs": str(found.vm_count),
        "points": str(found.point_count),
        "objects": str(found.object_count),
        "logical": f"{format_size(found.logical_bytes)} (each point and object as if kept whole)",
        "stored": f"{format_size(found.stored_bytes)} (one copy, as added)",
        "exclusive": f"{_size_if_known(found.exclusive_bytes)} (used by these alone)",
        "shared": f"{_size_if_known(found.shared_bytes)} (used by others too)",
    }
    if found.cluster_used_bytes:  # not told to who may not see the whole cluster
        facts["on all nodes"] = f"{format_size(found.cluster_used_bytes)} (all copies, whole cluster)"
    print_facts(facts)
    _print_shares(found)


def _print_shares(found: Stats) -> None:
    """Print how it spreads over the nodes, and whether one of them has everything; nothing where that is not known."""
    if not found.share_blocks:
        return
    rows = [
        # Rounded down: 100% is said of a node that has everything, and of no other.
        (
            each.node_id,
            each.zone,
            str(each.blocks),
            format_size(each.bytes),
            f"{each.blocks * 100 // found.share_blocks}%",
        )
        for each in found.shares
    ]
    print_table(("NODE", "ZONE", "BLOCKS", "BYTES", "SHARE"), rows)
    print_line(describe_shares(found.share_blocks, {each.node_id: each.blocks for each in found.shares}))


def describe_shares(total: int, blocks: Mapping[str, int]) -> str:
    """Say whether a node holds all of `total` blocks, from what each of them holds. Pure."""
    whole = sorted(node_id for node_id, count in blocks.items() if count == total)
    if not whole:
        return "no node holds all of it"
    why = "as many replicas as nodes" if len(whole) == len(blocks) else "too few blocks to spread further"
    return f"{', '.join(whole)} {'holds' if len(whole) == 1 else 'hold'} all of it: {why}"


def _size_if_known(size_bytes: int | None) -> str:
    return "not known while nodes are down" if size_bytes is None else format_size(size_bytes)


@layout_app.command("show")
@on_cluster
def layout_show(connection: Connection) -> None:
    """Show the living layouts, newest first."""
    with connection.manager() as manager:
        found = manager.layout()
    if connection.json:
        print_json(found)
        return
    if not found.layouts:
        print_line(f"no layout yet: {found.nodes_registered} of {found.nodes_expected} nodes have registered")
    for layout in found.layouts:
        _print_layout(layout)


@layout_app.command("plan")
@on_cluster
def layout_plan(connection: Connection, remove: RemoveOption = None) -> None:
    """Say what the next layout would change; nothing changes yet."""
    with connection.manager() as manager:
        plan = manager.plan_layout(remove=remove or ())
    if connection.json:
        print_json(plan)
        return
    _print_layout(plan.layout)
    print_line(f"{plan.slots_moved} of {plan.slots_total} places move")
    for line in plan.explanation:
        print_line(line)
    removing = "".join(f" --remove {node}" for node in remove or ())
    print_line(f"to do it: holdfast layout apply --epoch {plan.previous_epoch}{removing}")


@layout_app.command("apply")
@on_cluster
def layout_apply(
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
        _print_layout(layout)


def _node_state(node: NodeInfo) -> str:
    if not node.up:
        return "down"
    return "full" if node.full else "up"


def _print_layout(layout: LayoutInfo) -> None:
    print_line(f"layout {layout.epoch}: {layout.partitions} partitions, {layout.replicas} copies")
    rows = [(node, layout.zones[node], str(slots)) for node, slots in sorted(layout.slots.items())]
    print_table(("NODE", "ZONE", "PLACES"), rows)
