"""What a session or a reader holds of the cluster: layouts, capability, keys; and how it is renewed.

One `Access` serves one operation. It is the only place that calls RefreshGrant, so that a layout change that hits many
batches at once costs one call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Final

from holdfast_core.model.errors import HoldfastError
from holdfast_core.model.key_file import DataKey
from holdfast_core.model.keys import KeyRing, TenantSecrets
from holdfast_core.model.layout import Layout
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.blocks.reader import BlockReader
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.endpoints import Endpoints
from holdfast_proto.v1.common_pb2 import Grant
from holdfast_proto.v1.state_pb2 import RefreshGrantRequest
from holdfast_proto.v1.state_pb2_grpc import StateServiceStub

_RENEW_MIN_MS: Final = 1000
_RENEW_AGAIN_MS: Final = 30_000
_RENEW_WAIT_S: Final = 3.0


class Access:
    """Layouts, capability and keys of one operation.

    Attributes:
        ring: the tenant's keys.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        pool: NodePool,
        grant: Grant,
        *,
        clock: Clock,
        session_id: str = "",
        resource_id: str = "",
        data_key: DataKey | None = None,
    ) -> None:
        """Take a grant for a session, or for the point or object that is read; one of the two is named.

        `data_key` is the tenant's, where it keeps it itself.

        Raises:
            HoldfastError: KEY_MISMATCH if a data key is given and the tenant's is kept by the cluster; CORRUPT.
        """
        self._endpoints = endpoints
        self._pool = pool
        self._clock = clock
        self._session_id = session_id
        self._resource_id = resource_id
        self._refreshing = asyncio.Lock()
        granted = grant.keys
        self.ring = KeyRing(TenantSecrets.from_message(granted) if data_key is None else data_key.merged(granted))
        self._take(grant)

    def _take(self, grant: Grant) -> None:
        self._layouts = tuple(Layout.from_message(layout) for layout in grant.layouts)
        self._capability = grant.capability
        self._may_read_data = grant.may_read_data
        self._renew_at(grant.capability_expires_unix_ms)
        self._addresses = {node.node_id: node.address for node in grant.nodes}
        self._pool.update(grant.nodes)

    def layouts(self) -> Sequence[Layout]:
        """Return the living layouts, newest first."""
        return self._layouts

    def newest(self) -> Layout:
        """Return the layout that writes go by."""
        return self._layouts[0]

    def capability(self) -> str:
        """Return the token to show to nodes."""
        return self._capability

    @property
    def may_read_data(self) -> bool:
        """Whether nodes show this operation data, and not the index alone."""
        return self._may_read_data

    def sealing_epoch(self, session_epoch: int) -> int:
        """Return the data epoch that a session seals with; 0 from the coordinator leaves it to the tenant's own key.

        Raises:
            HoldfastError: KEY_MISMATCH if the tenant keeps its data key itself and it was not given.
        """
        return session_epoch or self.ring.data_epoch_newest

    def renewed(self, capability: str, expires_unix_ms: int) -> None:
        """Take a fresh token that came with a keep-alive."""
        self._capability = capability
        self._renew_at(expires_unix_ms)

    def _renew_at(self, expires_unix_ms: int) -> None:
        now_unix_ms = self._clock.now_unix_ms()
        self._expires_unix_ms = expires_unix_ms
        self._renew_unix_ms = now_unix_ms + max(_RENEW_MIN_MS, (expires_unix_ms - now_unix_ms) // 2)

    async def refresh(self, *, seen_epoch: int) -> None:
        """Get a fresh grant, unless someone already did since the caller saw `seen_epoch`.

        Raises:
            HoldfastError: SESSION_LAPSED, NOT_FOUND or UNREACHABLE, as the coordinator says.
        """
        async with self._refreshing:
            if self.newest().epoch != seen_epoch:
                return
            await self._refresh()

    async def _refresh(self) -> None:
        answer = await self._endpoints.call(
            lambda channel: StateServiceStub(channel).RefreshGrant,
            RefreshGrantRequest(session_id=self._session_id, resource_id=self._resource_id),
        )
        self._take(answer.grant)

    def reader(self, executor: Executor) -> BlockReader:
        """Return a reader of blocks under this access; it verifies or consumes them in `executor`."""
        return BlockReader(self._pool, self.layouts, self.capability, executor=executor, refresh=self.changed_since)

    async def changed_since(self, layouts: Sequence[Layout]) -> bool:
        """Get a fresh grant unless there has been one with other layouts since `layouts` was handed out.

        Returns whether there are other layouts by now, or nodes at other addresses.

        Raises:
            HoldfastError: as `refresh`.
        """
        epochs = _epochs(layouts)
        async with self._refreshing:
            if _epochs(self._layouts) != epochs:
                return True
            addresses = self._addresses
            await self._refresh()
            return _epochs(self._layouts) != epochs or self._addresses != addresses

    async def freshen(self) -> None:
        """Renew the grant if half of the capability's life is over. Readers call it before each window.

        While no coordinator answers, readers go on with the capability that they have until shortly before its end.

        Raises:
            HoldfastError: if the renewal fails.
        """
        if self._clock.now_unix_ms() < self._renew_unix_ms:
            return
        async with self._refreshing:
            now_unix_ms = self._clock.now_unix_ms()
            if now_unix_ms < self._renew_unix_ms:
                return
            spare = now_unix_ms < self._expires_unix_ms - _RENEW_AGAIN_MS
            try:
                async with asyncio.timeout(_RENEW_WAIT_S if spare else None):
                    await self._refresh()
            except TimeoutError:
                self._renew_unix_ms = self._clock.now_unix_ms() + _RENEW_AGAIN_MS
            except HoldfastError as error:
                if not spare or not error.retryable:
                    raise
                self._renew_unix_ms = self._clock.now_unix_ms() + _RENEW_AGAIN_MS


def _epochs(layouts: Sequence[Layout]) -> tuple[int, ...]:
    return tuple(layout.epoch for layout in layouts)
