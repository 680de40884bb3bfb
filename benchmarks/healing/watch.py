"""Looks at a cluster from outside: which layouts live, who has synced, what its processes use."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from benchmarks.collection.services import Processes
from holdfast.manager import StateManager

READY_S: Final = 120.0
HEALED_S: Final = 1800.0
_LOOK_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Healed:
    """How a cluster came to be whole again.

    Attributes:
        lost_s: seconds from the loss until full replication.
        changed_s: seconds from the layout change until full replication.
        cpu_s: processor seconds of all nodes, and of the coordinator, from the loss on.
        repaired_bytes: sealed bytes that nodes got from one another.
    """

    lost_s: float
    changed_s: float
    cpu_s: float
    repaired_bytes: int


def wait(condition: Callable[[], bool], what: str, *, within_s: float = READY_S) -> None:
    """Wait for something.

    Raises:
        RuntimeError: it did not come about in time.
    """
    deadline_s = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"not within {within_s:.0f} s: {what}")
        time.sleep(_LOOK_S)


def whole(manager: StateManager, *, epoch_min: int = 1) -> bool:
    """Return whether one layout lives, of `epoch_min` at least, and each of its nodes says that it has synced it."""
    layouts = manager.layout().layouts
    if len(layouts) != 1 or layouts[0].epoch < epoch_min:
        return False
    nodes = {node.node_id: node for node in manager.cluster_status().nodes}
    return all(
        nodes[name].healing.synced_epoch == layouts[0].epoch for name, slots in layouts[0].slots.items() if slots
    )


def epoch(manager: StateManager) -> int:
    """Return the newest layout's epoch, 0 for none."""
    layouts = manager.layout().layouts
    return layouts[0].epoch if layouts else 0


def wait_healed(manager: StateManager, processes: Processes, *, lost_at_s: float, epoch_before: int) -> Healed:
    """Wait until a cluster that just lost a node (at `time.monotonic()` `lost_at_s`) is whole again.

    Raises:
        RuntimeError: it takes too long.
    """
    cpu_before_s, bytes_before = _cpu_s(processes), _repaired_bytes(manager)
    wait(lambda: epoch(manager) > epoch_before, "a layout without the node")
    changed_at_s = time.monotonic()
    wait(lambda: whole(manager, epoch_min=epoch_before + 1), "full replication", within_s=HEALED_S)
    now_s = time.monotonic()
    return Healed(
        lost_s=now_s - lost_at_s,
        changed_s=now_s - changed_at_s,
        cpu_s=_cpu_s(processes) - cpu_before_s,
        repaired_bytes=_repaired_bytes(manager) - bytes_before,
    )


def _cpu_s(processes: Processes) -> float:
    return sum(processes.cpu_s(name) for name in processes.running)


def _repaired_bytes(manager: StateManager) -> int:
    return sum(node.healing.repaired_bytes for node in manager.cluster_status().nodes if node.up)
