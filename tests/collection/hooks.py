"""Something else that happens at one moment of a collection: before it lists, or before it deletes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

import pytest

from holdfast_coordinator.collection.planning import ListedPage
from holdfast_coordinator.collection.scanner import GrpcScanner

Act = Callable[[], Awaitable[object]]


def before_first_listing(monkeypatch: pytest.MonkeyPatch, act: Act) -> None:
    """Let `act` run once, after a collection has read and marked, before any node is listed."""
    listed = GrpcScanner.listed
    once = _Once(act)

    async def hooked(
        self: GrpcScanner, node_id: str, tenant: int, *, first: int, end: int, after: bytes
    ) -> AsyncGenerator[ListedPage, None]:
        if tenant:  # the cluster's own comes first
            await once.run()
        async for page in listed(self, node_id, tenant, first=first, end=end, after=after):
            yield page

    monkeypatch.setattr(GrpcScanner, "listed", hooked)


def before_first_delete(monkeypatch: pytest.MonkeyPatch, act: Act) -> None:
    """Let `act` run once, after garbage was found, before any of it is deleted."""
    delete = GrpcScanner.delete
    once = _Once(act)

    async def hooked(self: GrpcScanner, node_id: str, tenant: int, block_ids: Sequence[bytes], *, cutoff: int) -> bytes:
        await once.run()
        return await delete(self, node_id, tenant, block_ids, cutoff=cutoff)

    monkeypatch.setattr(GrpcScanner, "delete", hooked)


class _Once:
    """Nodes are swept side by side: whoever comes second waits for the first to have acted."""

    def __init__(self, act: Act) -> None:
        self._act: Act | None = act
        self._acting: asyncio.Future[object] | None = None

    async def run(self) -> None:
        if self._act is not None:
            act, self._act = self._act, None
            self._acting = asyncio.ensure_future(act())
        if self._acting is not None:
            await asyncio.shield(self._acting)
