"""Many small blocks, made and stored as fast as may be: half of them a volume's, half of them nobody's.

They are sealed by several processes and written to the nodes' stores directly while these stand still: what is measured
is the collection, and blocks that came over the wire would lie there just the same.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from holdfast_core.model.block import Codec, Kind, SealedBlock, verify
from holdfast_core.model.keys import KeyRing, TenantSecrets
from holdfast_core.model.layout import Layout
from holdfast_core.model.limits import TREE_FAN_OUT
from holdfast_core.model.tree import VolumeLeaf, VolumeTreeBuilder
from holdfast_proto.v1.common_pb2 import Grant, TenantKeys
from holdfast_storagenode.home import open_directory
from holdfast_storagenode.segments.engine import EngineOptions
from holdfast_storagenode.segments.observer import StoreObserver

PLAIN_BYTES: Final = 64
STAMP: Final = 1
_PORTION: Final = 128 * TREE_FAN_OUT
_PUT_BLOCKS: Final = 4096


@dataclass(frozen=True, slots=True)
class Portion:
    """Some sealed blocks in order, with what a leaf says of each."""

    fingerprints: list[bytes]
    ids: list[bytes]
    sealed: list[bytes]


def seal_portion(keys: bytes, first: int, count: int) -> Portion:
    """Seal the blocks from number `first` on; every number has bytes of its own."""
    ring = KeyRing(TenantSecrets.from_message(TenantKeys.FromString(keys)))
    sealer = ring.sealer(Kind.VOLUME, ring.data_epoch_newest)
    numbers = range(first, first + count)
    plains = [hashlib.blake2b(number.to_bytes(8, "little"), digest_size=PLAIN_BYTES).digest() for number in numbers]
    blocks = [sealer.seal(plain, codec=Codec.STORED) for plain in plains]
    return Portion(
        [ring.fingerprint(plain) for plain in plains], [block.id for block in blocks], [block.data for block in blocks]
    )


def sealed_portions(grant: Grant, count: int, *, first: int, processes: int) -> Iterator[Portion]:
    """Yield `count` blocks from number `first` on, portion by portion."""
    keys = grant.keys.SerializeToString()
    starts = range(first, first + count, _PORTION)
    sizes = [min(_PORTION, first + count - at) for at in starts]
    # Not forked: this process has channels open.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(partial(seal_portion, keys), starts, sizes)


class VolumeBlocks:
    """A volume's index, as its blocks come."""

    def __init__(self, grant: Grant, count: int) -> None:
        """Prepare the tree of a volume whose `count` positions all hold something."""
        ring = KeyRing(TenantSecrets.from_message(grant.keys))
        self._sealer = ring.sealer(Kind.INDEX, ring.structure_epoch_newest)
        self._builder = VolumeTreeBuilder(count, self._keep)
        self._leaf = 0
        self.index: list[SealedBlock] = []

    def add(self, portion: Portion) -> None:
        """Add a portion, which begins a leaf."""
        for at in range(0, len(portion.ids), TREE_FAN_OUT):
            ids = tuple(portion.ids[at : at + TREE_FAN_OUT])
            fingerprints = tuple(portion.fingerprints[at : at + TREE_FAN_OUT])
            leaf = VolumeLeaf(tuple(range(len(ids))), fingerprints, ids, (b"",) * len(ids))
            self._builder.add_leaf(self._leaf, leaf)
            self._leaf += 1

    def finish(self) -> bytes:
        """Return the root."""
        return self._builder.finish()

    def _keep(self, plain: bytes) -> bytes:
        block = self._sealer.seal(plain, codec=Codec.ZSTD)
        self.index.append(block)
        return block.id


class Stores:
    """The stores of nodes that do not run, open to be written to."""

    def __init__(self, folders: Sequence[tuple[str, Path]], layout: Layout) -> None:
        """Open the directories of the nodes named."""
        self._layout = layout
        self._homes = {
            node_id: open_directory(folder, node_id=node_id, options=EngineOptions(), random_bytes=secrets.token_bytes)
            for node_id, folder in folders
        }
        self._stores = {
            node_id: home.open_store(layout.partition_of, StoreObserver()) for node_id, home in self._homes.items()
        }

    def put(self, tenant: int, blocks: Sequence[SealedBlock]) -> None:
        """Put blocks on their owners."""
        for at in range(0, len(blocks), _PUT_BLOCKS):
            batch = blocks[at : at + _PUT_BLOCKS]
            for node_id, store in self._stores.items():
                own = [block for block in batch if node_id in self._layout.owners_of_block(block.id)]
                store.put(tenant, own, stamp=STAMP)

    def put_portion(self, tenant: int, portion: Portion) -> None:
        """Put a portion on its owners."""
        pairs = zip(portion.ids, portion.sealed, strict=True)
        self.put(tenant, [verify(block_id, data) for block_id, data in pairs])

    def close(self) -> None:
        """Close the stores and give the directories up."""
        for store in self._stores.values():
            store.close()
        for home in self._homes.values():
            home.close()
