"""The cluster as a whole: `holdfast status` and `stats`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.cli.connection import Connection, on_cluster
from holdfast.cli.output import print_facts, print_json, print_line, print_table
from holdfast_core.runtime.options import format_size

if TYPE_CHECKING:
    from holdfast.results import Stats

app = typer.Typer()


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
