"""What the conformance suite runs on; `conftest` makes one of every kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from holdfast_core.model.block import SealedBlock
from holdfast_storagenode.store import BlockStore, PartitionOf


@dataclass(frozen=True, slots=True)
class Rig:
    """A store under test, how to damage a block behind its back, how it files ids, and the store behind the wire."""

    store: BlockStore
    rot: Callable[[int, SealedBlock], None]
    partition_of: PartitionOf
    behind: BlockStore
