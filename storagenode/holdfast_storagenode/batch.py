"""A batch of blocks that somebody sends: its form is checked first, then each block is hashed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from holdfast_core.model.block import Buffer, SealedView, check_form, unchanging_view, verify_view
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import BATCH_BLOCKS_MAX, BATCH_BYTES_MAX, BLOCK_ID_BYTES, SEALED_BYTES_MAX
from holdfast_core.model.names import split_ids


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch whose form was checked: the epoch of its layout, ids, and the bytes with the length of each block."""

    layout_epoch: int
    ids: list[bytes]
    lengths: list[int]
    data: Buffer


def make_batch(*, layout_epoch: int, packed_ids: bytes, lengths: Sequence[int], data: Buffer) -> Batch:
    """Return the batch if its form is right.

    Raises:
        HoldfastError: LIMIT_EXCEEDED above the limits, INVALID_ARGUMENT if ids, lengths and bytes do not fit together.
    """
    if len(packed_ids) > BATCH_BLOCKS_MAX * BLOCK_ID_BYTES:
        raise HoldfastError(ErrorCode.LIMIT_EXCEEDED, f"a batch takes at most {BATCH_BLOCKS_MAX} blocks")
    if len(data) > BATCH_BYTES_MAX:
        raise HoldfastError(ErrorCode.LIMIT_EXCEEDED, f"a batch takes at most {BATCH_BYTES_MAX} bytes of blocks")
    ids = split_ids(packed_ids)
    if not ids:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "the batch is empty")
    if len(lengths) != len(ids) or sum(lengths) != len(data):
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT,
            f"the batch has {len(ids)} ids, {len(lengths)} lengths that sum to {sum(lengths)}, and {len(data)} bytes",
        )
    if max(lengths) > SEALED_BYTES_MAX:
        raise HoldfastError(ErrorCode.LIMIT_EXCEEDED, f"a sealed block has at most {SEALED_BYTES_MAX} bytes")
    return Batch(layout_epoch, ids, list(lengths), data)


def batch_of(layout_epoch: int, blocks: Sequence[tuple[bytes, Buffer]]) -> Batch:
    """Return (id, bytes) as a batch. Raises as `make_batch`."""
    return make_batch(
        layout_epoch=layout_epoch,
        packed_ids=b"".join(block_id for block_id, _ in blocks),
        lengths=[len(data) for _, data in blocks],
        data=b"".join(data for _, data in blocks),
    )


def verified_blocks(batch: Batch, kinds: frozenset[int]) -> list[SealedView]:
    """Return the batch's blocks, each hashed and its form checked, where they lie in the message.

    Raises:
        HoldfastError: CORRUPT if one does not match its id or is no sealed block; DENIED if its kind is not in
            `kinds`.
    """
    blocks: list[SealedView] = []
    # Once a batch: should the message be one that can change, it is copied as a whole and not once a block.
    data = unchanging_view(batch.data)
    at = 0
    for block_id, length in zip(batch.ids, batch.lengths, strict=True):
        block = verify_view(block_id, data[at : at + length])
        if check_form(block.data) not in kinds:
            raise HoldfastError(
                ErrorCode.DENIED, "the capability does not allow this kind of block", block_ids=[block_id]
            )
        blocks.append(block)
        at += length
    return blocks
