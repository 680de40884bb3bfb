"""That what records name is durable, and for how long that stays so: the barrier, tied to layouts and to damage.

What was checked holds while the layouts are those that it was checked under and no damage was recorded or healed since.
Whoever acts on it puts both into the conditions of its transaction.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from holdfast_coordinator import keyspace
from holdfast_coordinator.barrier import Barrier, Findings, not_durable
from holdfast_coordinator.damage import Damage
from holdfast_coordinator.metrics import CoordinatorMetrics
from holdfast_coordinator.view import ClusterView, LayoutSet
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.metadata.store import Condition, ModRevisionIs

Check = Callable[[Barrier, frozenset[bytes]], Awaitable[Findings]]
"""Checks trees, given what is recorded as damaged."""


@dataclass(frozen=True, slots=True)
class Checked:
    """That everything named is durable, and while what holds."""

    layout_revision: int
    mark: Condition
    findings: Findings

    @property
    def conditions(self) -> list[Condition]:
        """What must still hold when the transaction is applied."""
        return [ModRevisionIs(keyspace.LAYOUT_HEAD, self.layout_revision), self.mark]


class Durability:
    """Checks durability for one tenant."""

    def __init__(
        self,
        *,
        damage: Damage,
        view: ClusterView,
        barrier: Callable[[LayoutSet, int], Barrier],
        metrics: CoordinatorMetrics,
    ) -> None:
        """Bind to the cluster; `barrier` makes one for a set of layouts and a collection epoch."""
        self._damage = damage
        self._view = view
        self._barrier = barrier
        self._metrics = metrics

    async def still(self, before: Checked | None, check: Check, *, collection_epoch: int) -> Checked | None:
        """Check unless an earlier check of the same still holds; None: layouts or damage changed, decide anew.

        What is found is stamped with `collection_epoch`, that of the session whose commit this is; 0 for none.

        Raises:
            HoldfastError: what the barrier raises; NOT_DURABLE for blocks that are damaged and stay so.
        """
        mark = await self._damage.mark()
        layout_set = await self._view.current_layouts()
        if before is not None and (before.layout_revision, before.mark) == (layout_set.revision, mark):
            return before
        if layout_set.newest is None:
            raise HoldfastError(ErrorCode.NOT_READY, "there is no layout yet, so nothing can be durable")
        damaged = await self._damage.ids()
        with self._metrics.barrier():
            try:
                findings = await check(self._barrier(layout_set, collection_epoch), damaged)
            except HoldfastError as error:
                if error.code is ErrorCode.WRONG_EPOCH:
                    # A node knows a newer layout than we read: it is in the store by now.
                    await self._view.fresh()
                    return None
                if await self._view.changed_since(layout_set.layouts):
                    # What was asked of owners that have let go since says nothing.
                    return None
                raise
            if findings.suspects:
                lost = await self._damage.heal(findings.suspects, layout_set.layouts)
                if lost:
                    raise not_durable(lost)
                # The records are gone, so the next round vouches again; what was reported meanwhile it sees too.
                return None
        return Checked(layout_set.revision, mark, findings)
