"""A whole cluster in this process, for tests of programs that use Holdfast.

The services are the real ones, on loopback, found through the entry points that the server extra brings; by default
they keep blocks and metadata in memory. What passes here passes against a deployed cluster, power cuts aside.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Coroutine
from importlib.metadata import entry_points
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol

from holdfast.background import LoopThread
from holdfast.manager import StateManager
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.clock import SystemClock
from holdfast_core.runtime.credentials import new_token

_GROUP: Final = "holdfast.embedded"
_READY_WAIT_S: Final = 30.0
_POLL_S: Final = 0.02
_HEARTBEAT_S: Final = 0.2


class EmbeddedService(Protocol):
    """What the entry points of the group holdfast.embedded make."""

    async def start(self) -> str:
        """Serve; returns HOST:PORT."""
        ...

    async def stop(self) -> None:
        """Stop serving."""
        ...


class EmbeddedCoordinator(EmbeddedService, Protocol):
    """The coordinator's, which also lets go of its metadata."""

    async def close(self) -> None:
        """Stop, and forget everything."""
        ...


class MemoryCluster:
    """A coordinator and storage nodes; a context manager. Ready to use once constructed.

    Attributes:
        coordinator_address: HOST:PORT.
        token: what everybody who calls its coordinator shows; `state_manager` does so. It stands for an administrator.
    """

    def __init__(
        self, nodes: int = 3, replicas: int = 3, *, data_dir: Path | None = None, heartbeat_s: float = _HEARTBEAT_S
    ) -> None:
        """Start the cluster and wait until it takes writes.

        Args:
            nodes: number of storage nodes, each in a zone of its own.
            replicas: copies of each block.
            data_dir: keep the nodes' blocks in segment files below this directory instead of in memory.
            heartbeat_s: how often nodes report.

        Raises:
            HoldfastError: NOT_READY if the server extra is not installed, or the cluster does not come up.
        """
        self.token = new_token(os.urandom)
        self._loop = LoopThread()
        self._managers: list[StateManager] = []
        self._running: set[int] = set()
        self._nodes: list[EmbeddedService] = []
        self._coordinator: EmbeddedCoordinator | None = None
        try:
            self._start(nodes, replicas, data_dir, heartbeat_s)
        except BaseException:
            self.close()
            raise

    def _start(self, nodes: int, replicas: int, data_dir: Path | None, heartbeat_s: float) -> None:
        coordinator = _load("coordinator")(
            nodes_expected=nodes, replicas=replicas, store=None, master_key=os.urandom(32), admin_token=self.token
        )
        self.coordinator_address = self._loop.run(coordinator.start())
        self._coordinator = coordinator
        make_node = _load("storagenode")
        for number in range(nodes):
            node = make_node(
                f"node-{number + 1}",
                (self.coordinator_address,),
                zone=f"zone-{number + 1}",
                token=self.token,
                data_dir=data_dir / f"node-{number + 1}" if data_dir is not None else None,
                heartbeat_s=heartbeat_s,
            )
            self._nodes.append(node)
            self.start_node(number, wait=False)
        self._await_up(nodes)

    def __enter__(self) -> MemoryCluster:
        """Return the cluster."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the cluster."""
        self.close()

    def state_manager(self, **options: Any) -> StateManager:
        """Return a manager for this cluster, closed with it; `options` are those of `StateManager`."""
        manager = StateManager(self.coordinator_address, **{"token": self.token, **options})
        self._managers.append(manager)
        return manager

    def node(self, number: int) -> EmbeddedService:
        """Return a node's service, counted from 0, e.g. to reach its store."""
        return self._nodes[number]

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine in the cluster's event loop, e.g. a call on a node's service."""
        return self._loop.run(work)

    def stop_node(self, number: int) -> None:
        """Stop a node, counted from 0; what it holds stays."""
        self._running.discard(number)
        self._loop.run(self._nodes[number].stop())

    def start_node(self, number: int, *, wait: bool = True) -> None:
        """Start a node that was stopped; by default returns when the coordinator counts it as up."""
        self._loop.run(self._nodes[number].start())
        self._running.add(number)
        if wait:
            self._await_up(len(self._running))

    def _await_up(self, nodes: int) -> None:
        """Wait until so many nodes are up and know the layout, and the cluster takes writes."""
        clock = SystemClock()
        deadline_s = clock.monotonic_s() + _READY_WAIT_S
        with StateManager(self.coordinator_address, token=self.token) as manager:
            while True:
                status = manager.cluster_status()
                ready = [node for node in status.nodes if node.up and node.layout_epoch >= status.layout_epoch]
                if status.writable and len(ready) >= nodes:
                    return
                if clock.monotonic_s() > deadline_s:
                    raise HoldfastError(ErrorCode.NOT_READY, f"the cluster did not come up: {status.state}")
                self._loop.run(clock.sleep(_POLL_S))

    def close(self) -> None:
        """Close the managers and stop every service. Further calls do nothing."""
        for manager in self._managers:
            manager.close()
        self._loop.close(self._stop())

    async def _stop(self) -> None:
        for number in sorted(self._running):
            await self._nodes[number].stop()
        self._running.clear()
        if self._coordinator is not None:
            await self._coordinator.close()


@functools.cache  # whoever looks for one reads what every installed distribution says of itself
def _load(name: str) -> Any:
    for entry in entry_points(group=_GROUP, name=name):
        return entry.load()
    raise HoldfastError(
        ErrorCode.NOT_READY, "the services are not installed; install the server extra: pip install 'holdfast[server]'"
    )
