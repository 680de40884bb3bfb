"""The layout itself: partitions, their owners, and the way from a block's id to its nodes.

Consistent hashing with equal-sized partitions: the top bits of a seeded 32-bit mmh3 of the block id are the partition.
Every client computes the same answer, so no call a block is needed.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass, field
from typing import Final

import mmh3

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import NODES_MAX, PARTITIONS_MAX, REPLICAS_MAX
from holdfast_proto.v1 import common_pb2

_HASH_BITS: Final = 32
_OWNER_BYTES: Final = 2
_REMEMBERED: Final = 8


@dataclass(frozen=True, slots=True)
class LayoutNode:
    """A storage node as the layout knows it.

    Attributes:
        node_id: name, stable over restarts.
        zone: failure domain.
        capacity_bytes: weight for balance; a node of weight 0 owns nothing.
    """

    node_id: str
    zone: str
    capacity_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Which nodes own which partition.

    Attributes:
        epoch: number of the layout, 1 for the first.
        seed: seed of the hash over block ids, 32 bits.
        partitions: a power of two.
        replicas: owners a partition has.
        nodes: nodes of the layout; positions in it are what `owners` names.
        owners: partitions * replicas little-endian u16, partition by partition.
    """

    epoch: int
    seed: int
    partitions: int
    replicas: int
    nodes: tuple[LayoutNode, ...]
    owners: bytes = field(repr=False)
    _owners_by_partition: tuple[tuple[str, ...], ...] = field(init=False, repr=False, compare=False)
    _shift: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the form and spell the owners out.

        Raises:
            ValueError: numbers out of range, owners that do not exist, or one node twice in a partition.
        """
        check_dimensions(seed=self.seed, partitions=self.partitions, replicas=self.replicas)
        if self.epoch < 1:
            raise ValueError("epochs begin at 1")
        if len(self.nodes) > NODES_MAX or len({node.node_id for node in self.nodes}) != len(self.nodes):
            raise ValueError("nodes have distinct names and are not too many")
        if len(self.owners) != self.partitions * self.replicas * _OWNER_BYTES:
            raise ValueError("the table of owners has the wrong length")
        positions = struct.unpack(f"<{self.partitions * self.replicas}H", self.owners)
        if max(positions) >= len(self.nodes):
            raise ValueError("the table of owners names a node that is not there")
        names = [node.node_id for node in self.nodes]
        spelt = [names[position] for position in positions]
        table = tuple(tuple(spelt[at : at + self.replicas]) for at in range(0, len(spelt), self.replicas))
        if any(len(set(owners)) != self.replicas for owners in table):
            raise ValueError("a partition has one node twice")
        object.__setattr__(self, "_owners_by_partition", table)
        object.__setattr__(self, "_shift", _HASH_BITS - (self.partitions.bit_length() - 1))

    @property
    def write_quorum(self) -> int:
        """Owners that must hold a block durably before its write counts as done."""
        return self.replicas // 2 + 1

    def partition_of(self, block_id: bytes) -> int:
        """Return the partition that a block belongs to."""
        return mmh3.hash(block_id, self.seed, signed=False) >> self._shift

    def owners_of(self, partition: int) -> tuple[str, ...]:
        """Return the names of a partition's owners."""
        return self._owners_by_partition[partition]

    def owners_of_block(self, block_id: bytes) -> tuple[str, ...]:
        """Return the names of the nodes that own a block."""
        return self._owners_by_partition[mmh3.hash(block_id, self.seed, signed=False) >> self._shift]

    @classmethod
    def from_message(cls, message: common_pb2.Layout) -> Layout:
        """Read a layout from its message.

        Raises:
            HoldfastError: CORRUPT if it contradicts itself.
        """
        # The same few come with every grant and heartbeat, and spelling one out takes milliseconds.
        return _read(message.SerializeToString(deterministic=True))

    def to_message(self) -> common_pb2.Layout:
        """Return the layout as a message."""
        return common_pb2.Layout(
            epoch=self.epoch,
            seed=self.seed,
            partitions=self.partitions,
            replicas=self.replicas,
            nodes=[
                common_pb2.LayoutNode(node_id=node.node_id, zone=node.zone, capacity_bytes=node.capacity_bytes)
                for node in self.nodes
            ],
            owners=self.owners,
        )


def check_dimensions(*, seed: int, partitions: int, replicas: int) -> None:
    """Check what is fixed for the life of a cluster.

    Raises:
        ValueError: a number out of range.
    """
    if not 0 <= seed < 2**_HASH_BITS:
        raise ValueError("the seed has 32 bits")
    if not 1 <= partitions <= PARTITIONS_MAX or partitions & (partitions - 1):
        raise ValueError(f"the number of partitions is a power of two from 1 to {PARTITIONS_MAX}")
    if not 1 <= replicas <= REPLICAS_MAX:
        raise ValueError(f"a partition has 1 to {REPLICAS_MAX} owners")


@functools.lru_cache(maxsize=_REMEMBERED)
def _read(message_bytes: bytes) -> Layout:
    message = common_pb2.Layout.FromString(message_bytes)
    nodes = tuple(LayoutNode(node.node_id, node.zone, node.capacity_bytes) for node in message.nodes)
    try:
        return Layout(
            epoch=message.epoch,
            seed=message.seed,
            partitions=message.partitions,
            replicas=message.replicas,
            nodes=nodes,
            owners=message.owners,
        )
    except ValueError as error:
        raise HoldfastError(ErrorCode.CORRUPT, f"the layout of epoch {message.epoch} is broken: {error}") from error
