"""What trees reach, for sums: ids collected in bounded memory, and their sealed lengths as the nodes know them.

Ids are hashes, so those that begin with k zero bits are a fair sample of one in 2**k. A collection keeps everything
until it would grow too large, then halves its sample as often as needed: exact for most tenants, else an estimate.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import grpc.aio

from holdfast_coordinator.barrier import NODES_PER_READ, Walk
from holdfast_coordinator.commit_rules import positions
from holdfast_core.model.block import Opener, SealedBlock
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.names import split_ids
from holdfast_core.model.tree import DiffWalk, NewReferences, ObjectScan
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.blocks.reader import BlockReader
from holdfast_core.runtime.capability import CAPABILITY_METADATA_KEY
from holdfast_core.runtime.status import error_from_rpc
from holdfast_proto.v1.blocks_pb2 import ScanBlocksRequest
from holdfast_proto.v1.blocks_pb2_grpc import BlockServiceStub
from holdfast_proto.v1.records_pb2 import ObjectRecord, PointRecord, VolumeRecord

SAMPLED_IDS_MAX: Final = 1_000_000
# Index nodes that one call may read; about 160 GB of distinct content in blocks of 64 KiB.
INDEX_NODES_MAX: Final = 20_000
_SCAN_TIMEOUT_S: Final = 30.0
_ID_PREFIX_BYTES: Final = 4
_ID_PREFIX_BITS: Final = 32


class IdSample:
    """Distinct ids, or a fair sample of them. Pure.

    Attributes:
        ids: the ids kept.
        bits: how many leading zero bits an id needs to be kept; each stands for 2**bits ids.
    """

    def __init__(self, most: int = SAMPLED_IDS_MAX) -> None:
        """Keep at most about `most` ids."""
        self.ids: set[bytes] = set()
        self.bits = 0
        self._most = most

    def add(self, ids: Iterable[bytes]) -> None:
        """Add ids, repeats included."""
        self.ids.update(ids if not self.bits else filter(self._sampled, ids))
        while len(self.ids) > self._most:
            self.narrow(self.bits + 1)

    def narrow(self, bits: int) -> None:
        """Keep only ids that begin with so many zero bits, so that two samples can be compared."""
        if bits > self.bits:
            self.bits = bits
            self.ids = set(filter(self._sampled, self.ids))

    def _sampled(self, block_id: bytes) -> bool:
        return in_sample(block_id, self.bits)


def in_sample(block_id: bytes, bits: int) -> bool:
    """Return whether an id begins with so many zero bits. Pure."""
    return int.from_bytes(block_id[:_ID_PREFIX_BYTES], "big") >> (_ID_PREFIX_BITS - bits) == 0


class Collector:
    """Collects what trees reach, within what one call may read."""

    def __init__(self, reader: BlockReader, opener: Opener) -> None:
        """Bind to the nodes; `opener` needs the structure key alone."""
        self._reader = reader
        self._opener = opener
        self._read = 0

    async def collect(self, walks: Iterable[Walk]) -> IdSample:
        """Walk trees and return the ids of their index nodes, blocks and bases.

        Raises:
            HoldfastError: LIMIT_EXCEEDED if that takes more index nodes than one call may read; MISSING, CORRUPT or
                UNREACHABLE if one cannot be read.
        """
        sample = IdSample()
        for walk in walks:
            while not walk.done:
                wanted = walk.wanted(NODES_PER_READ)
                self._read += len(wanted)
                if self._read > INDEX_NODES_MAX:
                    raise HoldfastError(
                        ErrorCode.LIMIT_EXCEEDED, f"more than {INDEX_NODES_MAX} index nodes would have to be read"
                    )
                blocks = await self._reader.fetch(wanted, what="the index")
                for ids in await asyncio.to_thread(self._digest, walk, blocks):
                    sample.add(ids)
        return sample

    def _digest(self, walk: Walk, blocks: Mapping[bytes, SealedBlock]) -> NewReferences:
        walk.feed({block_id: self._opener.open(block) for block_id, block in blocks.items()})
        return walk.take()


def volume_walks(points: Iterable[PointRecord]) -> Iterator[Walk]:
    """Yield walks that together find all that the points reach; each looks only where it differs from the one before.

    Pure. Points of one VM come oldest first, so that neighbours share most of their trees.
    """
    before: dict[tuple[str, str, int], VolumeRecord] = {}
    for point in points:
        for volume in point.volumes:
            place = (point.vm_id, volume.name, volume.block_bytes)
            old = before.get(place)
            before[place] = volume
            yield DiffWalk(volume.root, positions(volume), old.root if old else b"", positions(old) if old else 0)


def object_walks(objects: Iterable[ObjectRecord]) -> Iterator[Walk]:
    """Yield walks that find all that the objects reach. Pure."""
    for stored in objects:
        yield ObjectScan(stored.root, block_count=stored.block_count, size_bytes=stored.size_bytes)


async def sealed_lengths(
    pool: NodePool, node_ids: Sequence[str], capability: str, wanted: set[bytes]
) -> dict[bytes, int]:
    """Return the sealed length of each wanted block, in bytes, from as few of the nodes as have them all.

    A block that no node lists is left out: it is lost, and adds nothing to any sum.

    Raises:
        HoldfastError: UNREACHABLE if none of the nodes answers.
    """
    found: dict[bytes, int] = {}
    failure: HoldfastError | None = None
    answered = False
    for node_id in node_ids:
        if len(found) == len(wanted):
            break
        try:
            stream = BlockServiceStub(pool.channel(node_id)).ScanBlocks(
                ScanBlocksRequest(), metadata=((CAPABILITY_METADATA_KEY, capability),), timeout=_SCAN_TIMEOUT_S
            )
            async for answer in stream:
                listed = zip(split_ids(answer.block_ids), answer.lengths, strict=True)
                found.update((block_id, length) for block_id, length in listed if block_id in wanted)
            answered = True
        except grpc.aio.AioRpcError as error:
            failure = error_from_rpc(error, peer=f"storage node {node_id}")
    if failure is not None and not answered:
        raise failure
    return found
