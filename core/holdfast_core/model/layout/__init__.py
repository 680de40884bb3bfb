"""Layouts: which nodes own which partition of the hash space (DESIGN section 6), and the plan of the next one.

Only coordinators plan. For clients and nodes, the planner is not loaded before one of its names is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from holdfast_core.model.layout.table import Layout, LayoutNode

if TYPE_CHECKING:
    from holdfast_core.model.layout.plan import LayoutPlan, plan_layout

__all__ = ["Layout", "LayoutNode", "LayoutPlan", "plan_layout"]


def __getattr__(name: str) -> Any:
    """Load what plans."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from holdfast_core.model.layout import plan

    return getattr(plan, name)
