"""Layouts: which nodes own which partition of the hash space (DESIGN section 6), and the plan of the next one."""

from holdfast_core.model.layout.plan import LayoutPlan, plan_layout
from holdfast_core.model.layout.table import Layout, LayoutNode

__all__ = ["Layout", "LayoutNode", "LayoutPlan", "plan_layout"]
