"""Merkle trees as in RFC 9162, section 2.1, over SHA-256: hashes, appending, proofs and their checks.

A tree over n leaves splits at the largest power of two below n. So leaves are only ever added at its right edge, and a
*complete subtree* (a power of two of leaves, beginning at a multiple of as many) never changes once it is there. All
that is kept of a tree to append to it are the roots of the complete subtrees it is made of: its frontier.

Proofs are made from such roots. A caller that has to fetch them asks `inclusion_ranges` or `consistency_ranges` for the
ranges of leaves whose roots make up the proof and `complete_subtrees` for what each range takes; one that has them at
hand uses `inclusion_path` and `consistency_path`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from holdfast_core.model.errors import ErrorCode, HoldfastError

HASH_BYTES: Final = 32
EMPTY_ROOT: Final = hashlib.sha256(b"").digest()

_LEAF: Final = b"\x00"
_NODE: Final = b"\x01"

Subtree = Callable[[int, int], bytes]
"""Returns the root of the complete subtree over the leaves [start, end)."""

Range = tuple[int, int]
"""Leaves from the first number up to, and without, the second."""


def leaf_hash(line: bytes) -> bytes:
    """Return the hash of a leaf, here of a record's line without its end."""
    return hashlib.sha256(_LEAF + line).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return the hash of an inner node above two others."""
    return hashlib.sha256(_NODE + left + right).digest()


@dataclass(frozen=True, slots=True)
class Frontier:
    """A tree as far as it takes to append to it.

    Attributes:
        size: leaves.
        hashes: roots of the complete subtrees that make up the tree, largest first: one for each bit of `size`.
    """

    size: int = 0
    hashes: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        if self.size < 0 or len(self.hashes) != self.size.bit_count():
            raise HoldfastError(
                ErrorCode.CORRUPT,
                f"a tree of {self.size} records is not made up of {len(self.hashes)} complete subtrees",
            )
        if any(len(each) != HASH_BYTES for each in self.hashes):
            raise HoldfastError(ErrorCode.CORRUPT, f"a hash of a tree of {self.size} records has not 32 bytes")

    @property
    def root(self) -> bytes:
        """Root of the tree."""
        return _folded(self.hashes)

    def append(self, leaf: bytes) -> Frontier:
        """Return the tree with one more leaf, given by its hash."""
        return self.extended((leaf,))

    def extended(self, leaves: Iterable[bytes]) -> Frontier:
        """Return the tree with more leaves, given by their hashes in order."""
        size, hashes = self.size, list(self.hashes)
        for leaf in leaves:
            above = leaf
            rest = size
            while rest & 1:
                above = node_hash(hashes.pop(), above)
                rest >>= 1
            hashes.append(above)
            size += 1
        return Frontier(size, tuple(hashes))


def _folded(roots: Sequence[bytes]) -> bytes:
    """Return the root above complete subtrees that stand side by side, largest first."""
    if not roots:
        return EMPTY_ROOT
    above = roots[-1]
    for left in reversed(roots[:-1]):
        above = node_hash(left, above)
    return above


def complete_subtrees(start: int, end: int) -> list[Range]:
    """Return the complete subtrees that make up the leaves [start, end) of a tree, largest first.

    `start` must be a multiple of the largest of them, as in all ranges of this module.

    Raises:
        HoldfastError: INVALID_ARGUMENT for a range that no subtree of any tree has.
    """
    found: list[Range] = []
    at = start
    while at < end:
        width = 1 << ((end - at).bit_length() - 1)
        if start < 0 or at % width:
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"no subtree is over the records {start} to {end - 1}")
        found.append((at, at + width))
        at += width
    return found


def tree_root(start: int, end: int, subtree: Subtree) -> bytes:
    """Return the root over the leaves [start, end), a range as `complete_subtrees` takes it.

    Raises:
        HoldfastError: INVALID_ARGUMENT for another range.
    """
    return _folded([subtree(*each) for each in complete_subtrees(start, end)])


def inclusion_ranges(index: int, size: int) -> list[Range]:
    """Return the ranges of leaves whose roots prove that leaf `index` is in the tree over `size`, from the leaf up.

    Raises:
        HoldfastError: INVALID_ARGUMENT if the tree has no such leaf.
    """
    if not 0 <= index < size:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"a log of {size} records has no record {index}")
    ranges: list[Range] = []
    start, end = 0, size
    while end - start > 1:
        middle = start + _split(end - start)
        if index < middle:
            ranges.append((middle, end))
            end = middle
        else:
            ranges.append((start, middle))
            start = middle
    return ranges[::-1]


def inclusion_path(index: int, size: int, subtree: Subtree) -> list[bytes]:
    """Return the hashes that prove that leaf `index` is in the tree over `size` leaves, from the leaf up.

    Raises:
        HoldfastError: INVALID_ARGUMENT if the tree has no such leaf.
    """
    return [tree_root(start, end, subtree) for start, end in inclusion_ranges(index, size)]


def consistency_ranges(old: int, new: int) -> list[Range]:
    """Return the ranges of leaves whose roots prove that the tree over `new` leaves begins with that over `old`.

    Empty where nothing needs to be shown: an empty tree is the beginning of all, and a tree that of itself.

    Raises:
        HoldfastError: INVALID_ARGUMENT if `old` is larger than `new`.
    """
    if not 0 <= old <= new:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"a log of {new} records does not begin with one of {old}")
    if old in (0, new):
        return []
    ranges: list[Range] = []
    start, end = 0, new
    while end != old:
        middle = start + _split(end - start)
        if old <= middle:
            ranges.append((middle, end))
            end = middle
        else:
            ranges.append((start, middle))
            start = middle
    if start:
        # The old tree's root is not itself a node of the new one: it must be built from what the path holds.
        ranges.append((start, end))
    return ranges[::-1]


def consistency_path(old: int, new: int, subtree: Subtree) -> list[bytes]:
    """Return the hashes that prove that the tree over `new` leaves begins with the tree over `old`.

    Raises:
        HoldfastError: INVALID_ARGUMENT if `old` is larger than `new`.
    """
    return [tree_root(start, end, subtree) for start, end in consistency_ranges(old, new)]


def root_from_inclusion(index: int, size: int, leaf: bytes, path: Sequence[bytes]) -> bytes:
    """Return the root that the tree over `size` leaves has if `leaf` (a hash) is its leaf `index` and `path` is right.

    The caller compares it with a root it trusts (RFC 9162, section 2.1.3.2).

    Raises:
        HoldfastError: CORRUPT if the path has not the length that it must have.
    """
    if not 0 <= index < size:
        raise HoldfastError(ErrorCode.CORRUPT, f"the proof is about record {index} of a log of {size} records")
    ranges = inclusion_ranges(index, size)
    _check_length(path, len(ranges))
    above = leaf
    for (start, _), other in zip(ranges, path, strict=True):
        above = node_hash(above, other) if start > index else node_hash(other, above)
    return above


def check_consistency(old: int, new: int, old_root: bytes, new_root: bytes, path: Sequence[bytes]) -> None:
    """Check that the tree over `new` leaves with `new_root` begins with the one over `old` leaves with `old_root`.

    Raises:
        HoldfastError: CORRUPT if the path does not prove it (RFC 9162, section 2.1.4.2).
    """
    if not 0 <= old <= new:
        raise HoldfastError(ErrorCode.CORRUPT, f"the proof is that a log of {new} records begins with one of {old}")
    ranges = consistency_ranges(old, new)
    _check_length(path, len(ranges))
    if old == 0:
        same_start, same_end = old_root == EMPTY_ROOT, new > 0 or new_root == EMPTY_ROOT
    elif old == new:
        same_start = same_end = old_root == new_root
    else:
        # Where the old tree is a subtree of the new one, its root is where both begin and the path leaves it out.
        whole = ranges[0][1] != old
        old_above = new_above = old_root if whole else path[0]
        for (start, _), other in list(zip(ranges, path, strict=True))[0 if whole else 1 :]:
            if start >= old:
                new_above = node_hash(new_above, other)
            else:
                old_above, new_above = node_hash(other, old_above), node_hash(other, new_above)
        same_start, same_end = old_above == old_root, new_above == new_root
    if not (same_start and same_end):
        raise HoldfastError(
            ErrorCode.CORRUPT, f"the log of {new} records does not begin with the log of {old} records: it was changed"
        )


def _split(size: int) -> int:
    """Return the largest power of two below `size`, which is at least 2."""
    return 1 << ((size - 1).bit_length() - 1)


def _check_length(path: Sequence[bytes], expected: int) -> None:
    if len(path) != expected or any(len(each) != HASH_BYTES for each in path):
        raise HoldfastError(ErrorCode.CORRUPT, f"the proof has {len(path)} hashes, not {expected} of 32 bytes")
