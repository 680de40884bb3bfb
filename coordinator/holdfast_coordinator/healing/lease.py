"""The lease that makes one coordinator the steward.

Whoever writes the key `steward` under a lease of its own is it, until the lease ends. Two coordinators may believe it
of themselves for a moment; so whatever a steward writes is on the condition that the key is still its own.
"""

from __future__ import annotations

from collections.abc import Mapping

from holdfast_coordinator import keyspace
from holdfast_coordinator.transactions import attempt
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import STEWARD_TTL_S
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.logs import get_log
from holdfast_core.runtime.metadata.store import Absent, Condition, CreateRevisionIs, MetadataStore, Put


class StewardLease:
    """Gets the lease and keeps it: a worker. `term` tells one stewardship from the next."""

    def __init__(self, store: MetadataStore, clock: Clock, *, coordinator: str, ttl_s: float = STEWARD_TTL_S) -> None:
        """Try for it under the name `coordinator`, which no other coordinator has."""
        self.name = "steward lease"
        self._store = store
        self._clock = clock
        self._coordinator = coordinator
        self._ttl_s = ttl_s
        self._lease_id = 0
        self._term = 0
        self._until_s = 0.0

    @property
    def term(self) -> int:
        """Number of the stewardship, the key's creation revision; 0 while somebody else is steward, or may be."""
        return self._term if self._clock.monotonic_s() < self._until_s else 0

    def still(self) -> Condition:
        """Return the condition that this stewardship goes on."""
        return CreateRevisionIs(keyspace.STEWARD, self._term)

    async def step(self) -> float:
        """Keep the lease, or try to get it. Raises UNREACHABLE as the store."""
        began_s = self._clock.monotonic_s()
        if self._term and await self._kept():
            self._until_s = began_s + self._ttl_s
        elif await self._got():
            self._until_s = began_s + self._ttl_s
            get_log("steward").info("steward", term=self._term)
        return self._ttl_s / 3

    def status(self) -> Mapping[str, int]:
        """Return whether this is the steward."""
        return {"steward": int(self.term > 0)}

    async def close(self) -> None:
        """Let go of the lease, so that another coordinator need not wait for its end."""
        lease_id, self._lease_id, self._term, self._until_s = self._lease_id, 0, 0, 0.0
        if not lease_id:
            return
        try:
            await self._store.revoke_lease(lease_id)
        except HoldfastError as error:
            if error.code is not ErrorCode.UNREACHABLE:
                raise
            get_log("steward").info("the steward's lease ends by itself", why=error.message)

    async def _kept(self) -> bool:
        try:
            await self._store.keep_lease(self._lease_id)
            item = await self._store.get(keyspace.STEWARD)
        except HoldfastError as error:
            if error.code is not ErrorCode.NOT_FOUND:
                raise
            item = None
        if item is not None and item.create_revision == self._term:
            return True
        get_log("steward").info("no longer steward", term=self._term)
        self._lease_id, self._term = 0, 0
        return False

    async def _got(self) -> bool:
        """Try to become steward; what is in the store afterwards tells whether it worked, whatever was answered."""
        if await self._store.get(keyspace.STEWARD) is None:
            if not self._lease_id:
                self._lease_id = await self._store.grant_lease(self._ttl_s)
            put = Put(keyspace.STEWARD, self._coordinator.encode(), self._lease_id)
            await attempt(self._store, [Absent(keyspace.STEWARD)], [put])
        item = await self._store.get(keyspace.STEWARD)
        if item is None or item.lease_id != self._lease_id or not self._lease_id:
            # A lease that was granted for a try that failed ends by itself; the next try gets a new one.
            self._lease_id = 0
            return False
        self._term = item.create_revision
        return True
