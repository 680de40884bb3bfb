"""A storage node inside another program: for tests, and for embedders who want a cluster in memory."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from holdfast_core.runtime.clock import Clock, SystemClock
from holdfast_core.runtime.credentials import find_credential
from holdfast_storagenode.core import NodeCore
from holdfast_storagenode.healing.workers import HEALING_DEFAULT, HealingOptions
from holdfast_storagenode.home import MemoryHome, NodeHome, open_directory
from holdfast_storagenode.node import DEFAULT_ZONE, NodeSettings, StorageNode
from holdfast_storagenode.segments.engine import EngineOptions

# A local stop has nobody to wait for but the caller's own calls.
_GRACE_S: Final = 1.0


class EmbeddedStorageNode:
    """The real node on a loopback port, with blocks in `data_dir` or in memory. Can be started again after a stop.

    In memory, blocks and identity outlive a stop, as those in a directory do.
    """

    def __init__(
        self,
        node_id: str,
        coordinator_addresses: Sequence[str],
        *,
        zone: str = DEFAULT_ZONE,
        token: str | None = None,
        data_dir: Path | None = None,
        heartbeat_s: float | None = None,
        options: EngineOptions | None = None,
        clock: Clock | None = None,
        healing: HealingOptions = HEALING_DEFAULT,
    ) -> None:
        """Prepare a node; `token` is what it joins with, `options` are the engine's, for a node with a directory."""
        self._node_id = node_id
        self._data_dir = data_dir
        self._options = options if options is not None else EngineOptions()
        self._settings = NodeSettings(
            coordinators=tuple(coordinator_addresses),
            credential=find_credential(coordinator_addresses, token=token),
            zone=zone,
            heartbeat_s=heartbeat_s,
            healing=healing,
        )
        self._clock: Clock = clock if clock is not None else SystemClock()
        self._memory = MemoryHome(node_id, random_bytes=secrets.token_bytes) if data_dir is None else None
        self._home: NodeHome | None = None
        self._node: StorageNode | None = None

    @property
    def node_id(self) -> str:
        """The node's name."""
        return self._node_id

    @property
    def core(self) -> NodeCore:
        """The running node without its network, e.g. to reach its store."""
        if self._node is None:
            raise RuntimeError("the node is not running")
        return self._node.core

    async def start(self) -> str:
        """Serve; return the address. After a stop, the same node on another port.

        Raises:
            HoldfastError: as `StorageNode.start` and `open_directory`.
        """
        if self._node is not None:
            raise RuntimeError("the node is running")
        home = self._open_home()
        node = StorageNode(home, self._settings, clock=self._clock)
        address = await node.start()
        self._home, self._node = home, node
        return address

    async def stop(self, grace_s: float = _GRACE_S) -> None:
        """Stop serving; nothing happens if it is not running. The blocks stay."""
        node, self._node = self._node, None
        home, self._home = self._home, None
        if node is not None and home is not None:
            await node.stop(grace_s)
            home.close()

    def _open_home(self) -> NodeHome:
        if self._memory is not None:
            return self._memory
        if self._data_dir is None:
            raise RuntimeError("a node lives in memory or in a directory")
        return open_directory(
            self._data_dir, node_id=self._node_id, options=self._options, random_bytes=secrets.token_bytes
        )
