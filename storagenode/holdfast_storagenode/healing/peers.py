"""What a node asks of its peers. Over gRPC in a cluster (`grpc_peers`); directly where many nodes share a process.

What comes back is a claim of the peer's: whoever uses it checks ids against partitions, stamps against the epoch, and
bytes against ids.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from holdfast_core.model.block import Buffer
from holdfast_storagenode.batch import Batch
from holdfast_storagenode.store import BlockEntry, Holding, Verdict


@dataclass(frozen=True, slots=True)
class Comparison:
    """A peer's answer: the epoch that it fences, and what it holds of the first of the partitions asked for.

    The holdings were looked at after the fence.
    """

    fenced_epoch: int
    holdings: tuple[tuple[Holding, ...], ...]


Fetched: TypeAlias = Buffer | Verdict
"""Bytes that a peer says are the block, not hashed yet, or why there are none."""

FreshEpoch: TypeAlias = Callable[[], Awaitable[int]]
"""Returns the collection epoch as a coordinator read it after the call began; `Heartbeats.fresh_epoch`."""


class Peers(Protocol):
    """The other nodes, by name. Every call has a deadline of its own.

    Calls raise HoldfastError: UNREACHABLE where the node does not answer, else what it says (`PeerSide`).
    """

    async def compare(self, node_id: str, partitions: Sequence[int], *, layout_epoch: int) -> Comparison:
        """Ask what a node holds of the first of `partitions`, of one at least; see `PeerSide.compare`."""
        ...

    def listing(
        self, node_id: str, *, partitions: Sequence[int], tenant: int
    ) -> AsyncGenerator[list[BlockEntry], None]:
        """List a tenant's blocks in ascending partitions, in pages, in order of partitions and ids."""
        ...

    async def fetch(self, node_id: str, *, tenant: int, ids: Sequence[bytes], bytes_max: int) -> list[Fetched]:
        """Fetch blocks, one item an id; an answer of more than `bytes_max` bytes is CORRUPT."""
        ...

    async def confirm(
        self, node_id: str, *, tenant: int, ids: Sequence[bytes], layout_epoch: int, collection_epoch: int
    ) -> list[Verdict]:
        """Ask which blocks a node holds durably, stamped now; one verdict an id."""
        ...

    async def hand(self, node_id: str, *, tenant: int, batch: Batch, collection_epoch: int) -> list[Verdict]:
        """Give blocks to a node; one verdict an id, durable."""
        ...
