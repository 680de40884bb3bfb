"""How a node's copies stand: what its workers write down, and what its heartbeats say."""

from __future__ import annotations

from typing import Final

from holdfast_proto.v1.common_pb2 import NodeHealing

# Beyond that a node only says that there are many.
_UNREPAIRED_REMEMBERED_MAX: Final = 100_000


class HealingStatus:
    """Figures that the workers of one node share. Belongs to one event loop.

    Attributes:
        synced_epoch: newest layout epoch that this node has synced all of its partitions of, 0 for none.
        partitions: partitions that it owns in the newest layout.
        partitions_synced: those that are synced.
        partitions_at_risk: those that are not because too few old owners answered.
        foreign_blocks: blocks of partitions that it owns in no living layout.
        repaired_blocks: blocks that it got from peers since it started.
        repaired_bytes: their sealed bytes.
        wrong_blocks: blocks that peers sent with bytes that are not theirs.
        dropped_blocks: foreign blocks that it let go of since it started.
        handed_blocks: blocks that it handed to owners who lacked them.
        scrub_permille: share of all blocks that the present round of scrubbing has read, in thousandths.
        scrubbed_unix_ms: Unix time at which the last whole round ended, milliseconds; 0 for never.
    """

    def __init__(self) -> None:
        """Begin with nothing known."""
        self.synced_epoch = 0
        self.partitions = 0
        self.partitions_synced = 0
        self.partitions_at_risk = 0
        self.foreign_blocks = 0
        self.repaired_blocks = 0
        self.repaired_bytes = 0
        self.wrong_blocks = 0
        self.dropped_blocks = 0
        self.handed_blocks = 0
        self.scrub_permille = 0
        self.scrubbed_unix_ms = 0
        self._unrepaired: dict[tuple[int, bytes], float] = {}

    def repaired(self, tenant: int, block_id: bytes, *, size_bytes: int) -> None:
        """Count a block that came from a peer and was lacking."""
        self.repaired_blocks += 1
        self.repaired_bytes += size_bytes
        self.forget(tenant, block_id)

    def unrepaired(self, tenant: int, block_id: bytes, *, now_s: float) -> None:
        """Note that no peer that was reached could give a block which this node lacks, or holds corrupt."""
        if len(self._unrepaired) < _UNREPAIRED_REMEMBERED_MAX or (tenant, block_id) in self._unrepaired:
            self._unrepaired[tenant, block_id] = now_s

    def forget(self, tenant: int, block_id: bytes) -> None:
        """Note that a block is here, wherever it came from, or is needed no longer."""
        self._unrepaired.pop((tenant, block_id), None)

    def unrepaired_since(self) -> dict[tuple[int, bytes], float]:
        """Return by (tenant, id) when `unrepaired` was told last of what is not forgotten since."""
        return dict(self._unrepaired)

    @property
    def unrepaired_count(self) -> int:
        """How many that are."""
        return len(self._unrepaired)

    def message(self, *, collection_epoch: int) -> NodeHealing:
        """Return the figures as heartbeats carry them."""
        return NodeHealing(
            synced_epoch=self.synced_epoch,
            partitions=self.partitions,
            partitions_synced=self.partitions_synced,
            partitions_at_risk=self.partitions_at_risk,
            foreign_blocks=self.foreign_blocks,
            unrepaired_blocks=self.unrepaired_count,
            repaired_blocks=self.repaired_blocks,
            repaired_bytes=self.repaired_bytes,
            scrub_permille=self.scrub_permille,
            scrubbed_unix_ms=self.scrubbed_unix_ms,
            collection_epoch=collection_epoch,
        )
