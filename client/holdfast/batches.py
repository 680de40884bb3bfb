"""Batches on their way to their owners, and when each is safe.

Pure bookkeeping without a wait: `uploader` decides, `sender` moves bytes. A batch's blocks share one set of owners and
one set of those that still lack them, so it is at quorum, complete or lost as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence

from holdfast_core.model.block import SealedBlock, verify
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import ERROR_BLOCK_IDS_MAX


class Batch:
    """Some blocks for some nodes.

    Attributes:
        sequence: number within the session, the same on every stream.
        block_ids: what it carries.
        wire: the serialised request, which ends with the blocks' bytes.
        sealed_bytes: sum of the blocks' bytes.
        layout_epoch: epoch that chose the targets.
        targets: nodes that it goes to.
        acknowledged: nodes that hold it durably, of `targets`.
        failed: nodes of `targets` that will not, with why.
    """

    __slots__ = (
        "_lengths",
        "_needed",
        "acknowledged",
        "block_ids",
        "failed",
        "layout_epoch",
        "moved",
        "sealed_bytes",
        "sequence",
        "targets",
        "wire",
    )

    def __init__(
        self,
        blocks: Sequence[SealedBlock],
        *,
        wire: bytes,
        sequence: int,
        layout_epoch: int,
        targets: Sequence[str],
        needed: int,
    ) -> None:
        """Take blocks; `needed` acknowledgements of `targets` make the write quorum."""
        self.sequence = sequence
        self.block_ids = tuple([block.id for block in blocks])
        self._lengths = tuple([len(block.data) for block in blocks])
        self.wire = wire
        self.sealed_bytes = sum(self._lengths)
        self.layout_epoch = layout_epoch
        self.targets = tuple(targets)
        self.acknowledged: set[str] = set()
        self.failed: dict[str, HoldfastError] = {}
        self.moved = False
        self._needed = needed

    def blocks(self) -> list[SealedBlock]:
        """Return the blocks, taken from the request's bytes and verified; they are not kept twice."""
        at = len(self.wire) - self.sealed_bytes
        blocks = []
        for block_id, length in zip(self.block_ids, self._lengths, strict=True):
            blocks.append(verify(block_id, self.wire[at : at + length]))
            at += length
        return blocks

    @property
    def at_quorum(self) -> bool:
        """Whether enough owners hold it."""
        return len(self.acknowledged) >= self._needed

    @property
    def lost(self) -> bool:
        """Whether enough owners can no longer come to hold it."""
        return len(self.targets) - len(self.failed) < self._needed

    @property
    def settled(self) -> bool:
        """Whether every target has answered, or another batch carries its blocks now."""
        return self.moved or len(self.acknowledged) + len(self.failed) >= len(self.targets)

    def loss(self) -> HoldfastError:
        """Return the error of a batch that is lost: NO_QUORUM, or what a full or refusing node said."""
        reasons = sorted(self.failed.items())
        for code in (ErrorCode.DENIED, ErrorCode.DISK_FULL):
            for _, error in reasons:
                if error.code is code:
                    return error
        return HoldfastError(
            ErrorCode.NO_QUORUM,
            "too few owners took a block: " + "; ".join(dict.fromkeys(error.message for _, error in reasons)),
            facts={"failed_nodes": ",".join(node for node, _ in reasons)},
            block_ids=self.block_ids[:ERROR_BLOCK_IDS_MAX],
        )
