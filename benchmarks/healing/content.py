"""Blocks that do not shrink, written to the nodes' stores directly while these stand still.

What is measured is the healing, and blocks that came over the wire would lie there just the same.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.collection.content import Stores
from holdfast_core.model.block import Codec, Kind
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.keys import KeyRing, TenantSecrets
from holdfast_core.model.layout import Layout
from holdfast_storagenode.cluster import ClusterKnowledge
from holdfast_storagenode.home import open_directory
from holdfast_storagenode.segments.engine import EngineOptions

TENANT: Final = 1
BLOCK_BYTES: Final = 64 * 1024
_AT_ONCE: Final = 512


def fill(nodes: Sequence[tuple[str, Path]], *, node_bytes: int, replicas: int) -> int:
    """Give each of the nodes, which do not run, about `node_bytes` of blocks under their layout; return the blocks.

    Nothing names the blocks: what is repaired is what nodes hold, and collections are not part of this.
    """
    blocks = node_bytes * len(nodes) // replicas // BLOCK_BYTES
    own = KeyRing(
        TenantSecrets(
            tenant=TENANT,
            data_root=secrets.token_bytes(32),
            data_epochs={1: secrets.token_bytes(32)},
            structure_root=secrets.token_bytes(32),
            structure_epochs={1: secrets.token_bytes(32)},
        )
    )
    sealer = own.sealer(Kind.VOLUME, own.data_epoch_newest)
    stores = Stores(nodes, layout_of(*nodes[0]))
    try:
        for at in range(0, blocks, _AT_ONCE):
            count = min(_AT_ONCE, blocks - at)
            stores.put(TENANT, [sealer.seal(os.urandom(BLOCK_BYTES), codec=Codec.STORED) for _ in range(count)])
    finally:
        stores.close()
    return blocks


def layout_of(node_id: str, folder: Path) -> Layout:
    """Return the layout that a node, which does not run, knew last.

    Raises:
        HoldfastError: NOT_READY where it knew none.
    """
    home = open_directory(folder, node_id=node_id, options=EngineOptions(), random_bytes=secrets.token_bytes)
    try:
        saved, knowledge = home.load_cluster(), ClusterKnowledge()
        if saved is not None:
            knowledge.take(saved)
    finally:
        home.close()
    if knowledge.layout is None:
        raise HoldfastError(ErrorCode.NOT_READY, f"{node_id} knows no layout")
    return knowledge.layout
