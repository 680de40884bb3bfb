"""How blocks spread over nodes, so that it can be shown that no node holds all of something. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from holdfast_core.model.layout import Layout


@dataclass(frozen=True, slots=True)
class NodeShare:
    """How much of something one node keeps.

    Attributes:
        node_id: its name.
        zone: its failure domain.
        blocks: distinct blocks that the layout puts there.
        bytes: their sealed bytes.
    """

    node_id: str
    zone: str
    blocks: int
    bytes: int


def spread(block_ids: Iterable[bytes], lengths: Mapping[bytes, int], layout: Layout) -> list[NodeShare]:
    """Return what each node of the layout keeps of distinct blocks, by name; unknown lengths count as 0 bytes.

    A node that keeps nothing is listed too: it is one more place where not all of it is.
    """
    blocks: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for block_id in block_ids:
        length = lengths.get(block_id, 0)
        for node_id in layout.owners_of_block(block_id):
            blocks[node_id] += 1
            sizes[node_id] += length
    return [
        NodeShare(node.node_id, node.zone, blocks[node.node_id], sizes[node.node_id])
        for node in sorted(layout.nodes, key=lambda node: node.node_id)
    ]
