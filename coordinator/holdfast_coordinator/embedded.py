"""A coordinator inside another program: for tests, and for embedders who want a cluster in memory."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Final

from holdfast_coordinator.access.identity import admin_token as static_admin_token
from holdfast_coordinator.bootstrap import ClusterOptions
from holdfast_coordinator.coordinator import Coordinator, CoordinatorSettings
from holdfast_coordinator.keys.master import FileMasterKey, MasterKeys
from holdfast_coordinator.master_key import MASTER_KEY_BYTES
from holdfast_core.runtime.clock import Clock, SystemClock
from holdfast_core.runtime.credentials import Credential
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import MetadataStore

# A local stop has nobody to wait for but the caller's own calls.
_GRACE_S: Final = 1.0


class EmbeddedCoordinator:
    """The real coordinator on a loopback port. Belongs to one event loop; can be started again after a stop.

    Without a `store` it keeps its metadata in memory, over stops and starts, until `close`. A store that is passed in
    stays its owner's to close.
    """

    def __init__(
        self,
        *,
        nodes_expected: int,
        replicas: int,
        store: MetadataStore | None = None,
        master_key: bytes | None = None,
        partitions: int | None = None,
        admin_token: str | None = None,
        settings: CoordinatorSettings | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Take the cluster's options; a master key is drawn where none is given (then the store must be new).

        `admin_token` is the token of the principal `admin`, who may do everything.
        """
        options = ClusterOptions(nodes_expected=nodes_expected, replicas=replicas, partitions=partitions)
        self._settings = replace(settings or CoordinatorSettings(), options=options)
        if admin_token is not None:
            tokens = (*self._settings.static_tokens, static_admin_token(Credential(token=admin_token)))
            self._settings = replace(self._settings, static_tokens=tokens)
        self._master_key = master_key or secrets.token_bytes(MASTER_KEY_BYTES)
        self._clock: Clock = clock or SystemClock()
        self._store = store
        self._owned: SqliteStore | None = None
        self._coordinator: Coordinator | None = None

    async def start(self) -> str:
        """Serve; return the address. After a stop, the same cluster on another port.

        Raises:
            HoldfastError: as `Coordinator.start`.
        """
        if self._coordinator is not None:
            raise RuntimeError("the coordinator is running")
        if self._store is None:
            self._store = self._owned = await SqliteStore.open(":memory:", self._clock)
        coordinator = Coordinator(
            self._store,
            master=MasterKeys(FileMasterKey(self._master_key, secrets.token_bytes)),
            settings=self._settings,
            random_bytes=secrets.token_bytes,
            clock=self._clock,
        )
        address = await coordinator.start()
        self._coordinator = coordinator
        return address

    async def stop(self, grace_s: float = _GRACE_S) -> None:
        """Stop serving; nothing happens if it is not running. The metadata stays."""
        coordinator, self._coordinator = self._coordinator, None
        if coordinator is not None:
            await coordinator.stop(grace_s)

    async def close(self) -> None:
        """Stop, and give up metadata that is in memory."""
        await self.stop()
        owned, self._owned = self._owned, None
        if owned is not None:
            self._store = None
            await owned.close()
