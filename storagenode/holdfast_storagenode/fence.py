"""The fence between layout epochs: which writes are under way, and under which epoch each was accepted.

A node refuses writes under an older layout than it knows. Those that it accepted before may still be under way; only
when they have settled, durable or failed, may it say that it fences the newer epoch (docs/healing.md). Belongs to one
event loop.
"""

from __future__ import annotations

from holdfast_core.model.errors import ErrorCode, HoldfastError


class Fence:
    """Counts writes in flight by epoch."""

    def __init__(self) -> None:
        """Begin with no write under way."""
        self._under_way: dict[int, int] = {}

    def enter(self, epoch: int, *, newest: int) -> None:
        """Accept a write under `epoch`, which counts as under way until `leave`; `newest` is what the node knows.

        Raises:
            HoldfastError: NOT_READY where the node knows no layout yet, WRONG_EPOCH for one older than `newest`.
        """
        if not newest:
            raise HoldfastError(
                ErrorCode.NOT_READY, "the cluster has no layout yet; this node takes no blocks until then"
            )
        check_epoch(epoch, newest=newest)
        self._under_way[epoch] = self._under_way.get(epoch, 0) + 1

    def leave(self, epoch: int) -> None:
        """Say that a write that was accepted under `epoch` has settled."""
        left = self._under_way[epoch] - 1
        if left:
            self._under_way[epoch] = left
        else:
            del self._under_way[epoch]

    def fenced_epoch(self, newest: int) -> int:
        """Return the newest epoch, at most `newest`, of which no write under an older one is under way any more."""
        return min(newest, *self._under_way) if self._under_way else newest


def check_epoch(epoch: int, *, newest: int) -> None:
    """Return if a call under the layout of `epoch` may be served by a node that knows `newest`.

    Raises:
        HoldfastError: WRONG_EPOCH for an older one.
    """
    if epoch < newest:
        raise HoldfastError(
            ErrorCode.WRONG_EPOCH,
            f"the layout of epoch {epoch} is older than epoch {newest}, which this node knows; refresh it",
            facts={"newest_epoch": str(newest)},
        )
