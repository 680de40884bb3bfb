"""Which blocks a collection removed here, so that repair does not bring them back from a peer that still has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

# About 30 MB. What is forgotten earlier may come back, and the next collection removes it again.
DELETED_REMEMBERED_MAX: Final = 100_000


class DeletedMemory:
    """Remembers ids with the cut-off that they were deleted under, the newest ones; for as long as the node runs."""

    def __init__(self, remembered_max: int = DELETED_REMEMBERED_MAX) -> None:
        """Begin with nothing; remember so many ids at most."""
        self._remembered_max = remembered_max
        self._cutoffs: dict[tuple[int, bytes], int] = {}

    def __len__(self) -> int:
        """How many ids are remembered."""
        return len(self._cutoffs)

    def add(self, tenant: int, ids: Sequence[bytes], *, cutoff: int) -> None:
        """Remember that blocks stamped below `cutoff` were removed, or were not there when they should have been."""
        for block_id in ids:
            key = (tenant, block_id)
            before = self._cutoffs.pop(key, 0)
            self._cutoffs[key] = max(before, cutoff)
        while len(self._cutoffs) > self._remembered_max:
            del self._cutoffs[next(iter(self._cutoffs))]

    def outlives(self, tenant: int, block_id: bytes, *, stamp: int) -> bool:
        """Return whether a copy that a peer stamped so is none of those that were deleted here."""
        return stamp >= self._cutoffs.get((tenant, block_id), 0)
