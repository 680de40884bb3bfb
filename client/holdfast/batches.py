"""Batches on their way to their owners, and when each is safe.

Pure bookkeeping without a wait: `uploader` decides, `sender` moves bytes. A batch's blocks share one set of owners and
one set of those that still lack them, so it is at quorum, complete or lost as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from holdfast_core.model.block import SealedBlock, verify
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import ERROR_BLOCK_IDS_MAX
from holdfast_proto.v1.blocks_pb2 import VERDICT_PRESENT


class Counted(NamedTuple):
    """What a block was counted as when it was placed as one that nobody has; some node may turn out to have had it."""

    sealed_bytes: int
    plain_bytes: int
    is_index: bool


class Batch:
    """Some blocks for some nodes.

    Attributes:
        sequence: number within the session, the same on every stream.
        block_ids: what it carries.
        counted: of each block what it was counted as, None where it does not count as stored.
        wire: the serialised request, which ends with the blocks' bytes.
        sealed_bytes: sum of the blocks' bytes.
        layout_epoch: epoch that chose the targets.
        targets: nodes that it goes to.
        acknowledged: nodes that hold it durably, of `targets`.
        failed: nodes of `targets` that will not, with why.
        sent_again: whether a stream broke before it was acknowledged; a node may then have it from us.
    """

    __slots__ = (
        "_lengths",
        "_needed",
        "_present",
        "acknowledged",
        "block_ids",
        "counted",
        "failed",
        "layout_epoch",
        "moved",
        "sealed_bytes",
        "sent_again",
        "sequence",
        "targets",
        "wire",
    )

    def __init__(
        self,
        blocks: Sequence[SealedBlock],
        *,
        counted: Sequence[Counted | None] = (),
        wire: bytes,
        sequence: int,
        layout_epoch: int,
        targets: Sequence[str],
        needed: int,
    ) -> None:
        """Take blocks; `needed` acknowledgements of `targets` make the write quorum."""
        self.sequence = sequence
        self.block_ids = tuple([block.id for block in blocks])
        self.counted = counted or (None,) * len(blocks)
        self._lengths = tuple([len(block.data) for block in blocks])
        self.wire = wire
        self.sealed_bytes = sum(self._lengths)
        self.layout_epoch = layout_epoch
        self.targets = tuple(targets)
        self.acknowledged: set[str] = set()
        self.failed: dict[str, HoldfastError] = {}
        self.moved = False
        self.sent_again = False
        self._needed = needed
        self._present: set[int] = set()

    def blocks(self) -> list[SealedBlock]:
        """Return the blocks, taken from the request's bytes and verified; they are not kept twice."""
        at = len(self.wire) - self.sealed_bytes
        blocks = []
        for block_id, length in zip(self.block_ids, self._lengths, strict=True):
            blocks.append(verify(block_id, self.wire[at : at + length]))
            at += length
        return blocks

    def take_verdicts(self, verdicts: bytes) -> list[int]:
        """Take what a node says of each block; return the positions of those that it is the first to have had before.

        None where the batch was sent again: what a node has of it may have come with the first try.
        """
        if self.sent_again or VERDICT_PRESENT not in verdicts:
            return []
        present = {at for at, verdict in enumerate(verdicts) if verdict == VERDICT_PRESENT} - self._present
        self._present |= present
        return sorted(present)

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
