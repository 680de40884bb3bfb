"""Old records as sealed blocks of the cluster's own tenant: how a segment's content becomes blocks and comes back.

Coordinators hold that tenant's keys, all of them the same; nodes see nothing of the log but how much of it there is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from google.protobuf.message import DecodeError

from holdfast_coordinator.keys.chain import KeyChain
from holdfast_coordinator.living_reader import living_reader
from holdfast_coordinator.view import ClusterView
from holdfast_core.model.block import Codec, Kind, SealedBlock
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.keys import KeyRing
from holdfast_core.model.limits import CAPABILITY_TTL_S, MIB
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.blocks.putting import put_to_quorum
from holdfast_core.runtime.clock import Clock
from holdfast_proto.v1.audit_pb2 import AuditSegment, AuditSegmentContent

# What is sealed at a time; a segment is about two of these.
_BLOCK_BYTES: Final = 1 * MIB
_VERBS: Final = frozenset({"put", "get"})
_KINDS: Final = frozenset({int(Kind.APPLICATION)})


class SegmentBlocks:
    """Writes and reads the blocks of segments. Belongs to one event loop."""

    def __init__(
        self,
        view: ClusterView,
        pool: NodePool,
        chain: KeyChain,
        ring: Callable[[], Awaitable[KeyRing]],
        clock: Clock,
    ) -> None:
        """Bind to the nodes.

        Args:
            view: knows the nodes and the layouts.
            pool: connections to the nodes.
            chain: mints the capability.
            ring: returns the keys of the cluster's own tenant.
            clock: for the capability's life.
        """
        self._view = view
        self._pool = pool
        self._chain = chain
        self._ring = ring
        self._clock = clock

    async def write(self, content: AuditSegmentContent, *, collection_epoch: int) -> tuple[list[bytes], int]:
        """Seal a segment's content and bring it to a write quorum of its owners, stamped with a collection epoch.

        Until it is recorded, that stamp alone keeps it from being collected: whoever records it compares the epoch.

        Returns:
            The ids of its blocks, in order, and the key epoch that they are sealed under. The same content under the
            same key makes the same blocks, so two coordinators that write it at once write it once.

        Raises:
            HoldfastError: NOT_READY before the first layout; NO_QUORUM if too few owners take them.
        """
        layout = self._view.state.layout_set.newest
        if layout is None:
            raise HoldfastError(ErrorCode.NOT_READY, "there is no layout yet, so no node to keep audit records")
        ring = await self._ring()
        epoch = ring.data_epoch_newest
        sealer = ring.sealer(Kind.APPLICATION, epoch)
        plain = content.SerializeToString(deterministic=True)

        def seal() -> list[SealedBlock]:
            view = memoryview(plain)
            return [
                sealer.seal(view[at : at + _BLOCK_BYTES], codec=Codec.ZSTD) for at in range(0, len(view), _BLOCK_BYTES)
            ]

        blocks = await asyncio.to_thread(seal)
        self._pool.update(self._view.state.nodes)
        await put_to_quorum(self._pool, layout, blocks, self._capability(ring.tenant, collection_epoch))
        return [block.id for block in blocks], epoch

    async def read(self, segment: AuditSegment) -> AuditSegmentContent:
        """Return what a segment holds, from whichever owners still have good copies.

        Raises:
            HoldfastError: CORRUPT, MISSING or UNREACHABLE, with the ids of the blocks; KEY_MISMATCH.
        """
        ring = await self._ring()
        reader = living_reader(self._view, self._pool, lambda: self._capability(ring.tenant))
        last = segment.first + segment.count - 1
        found = await reader.fetch(segment.block_ids, what=f"the audit log's records {segment.first} to {last}")
        opener = ring.opener()

        def opened() -> AuditSegmentContent:
            plain = b"".join(opener.open(found[block_id]) for block_id in segment.block_ids)
            return AuditSegmentContent.FromString(plain)

        try:
            return await asyncio.to_thread(opened)
        except DecodeError as error:
            message = f"the blocks of the audit log's records {segment.first} to {last} hold something else"
            raise HoldfastError(ErrorCode.CORRUPT, message, block_ids=segment.block_ids) from error

    def _capability(self, tenant: int, collection_epoch: int = 0) -> str:
        return self._chain.capability_signer().mint(
            tenant=tenant,
            verbs=_VERBS,
            kinds=_KINDS,
            ttl_s=CAPABILITY_TTL_S,
            now_unix_ms=self._clock.now_unix_ms(),
            collection_epoch=collection_epoch,
        )
