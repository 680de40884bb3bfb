"""Storage nodes' calls to one another over the simulated network: `Peers` on one end, `PeerSide` on the other."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any, Final

from holdfast_storagenode.batch import Batch
from holdfast_storagenode.healing.peers import Comparison, Fetched
from holdfast_storagenode.healing.serving import PeerSide
from holdfast_storagenode.store import BlockEntry, Found, Verdict
from tests.sim.network import Network
from tests.sim.world import Process

_TIMEOUT_S: Final = 6.0


class SimPeers:
    """The other nodes, as one process calls them."""

    def __init__(self, process: Process, network: Network) -> None:
        """Belong to one node's process."""
        self._process = process
        self._network = network

    async def compare(self, node_id: str, partitions: Sequence[int], *, layout_epoch: int) -> Comparison:
        """See `Peers.compare`."""
        answer: Comparison = await self._call(node_id, "compare", (tuple(partitions), layout_epoch))
        return answer

    async def listing(
        self, node_id: str, *, partitions: Sequence[int], tenant: int
    ) -> AsyncGenerator[list[BlockEntry], None]:
        """See `Peers.listing`."""
        left: Sequence[int] = tuple(partitions)
        after = b""
        while left:
            page: list[BlockEntry]
            page, left = await self._call(node_id, "page", (left, tenant, after))
            if page:
                after = page[-1].block_id
                yield page

    async def fetch(self, node_id: str, *, tenant: int, ids: Sequence[bytes], bytes_max: int) -> list[Fetched]:
        """See `Peers.fetch`."""
        items: list[Fetched] = []
        while len(items) < len(ids):
            items += await self._call(node_id, "fetch", (tenant, tuple(ids[len(items) :])))
        return items

    async def confirm(
        self, node_id: str, *, tenant: int, ids: Sequence[bytes], layout_epoch: int, collection_epoch: int
    ) -> list[Verdict]:
        """See `Peers.confirm`."""
        request = (tenant, tuple(ids), layout_epoch, collection_epoch)
        verdicts: list[Verdict] = await self._call(node_id, "confirm", request, repeatable=True)
        return verdicts

    async def hand(self, node_id: str, *, tenant: int, batch: Batch, collection_epoch: int) -> list[Verdict]:
        """See `Peers.hand`."""
        request = (tenant, batch, collection_epoch)
        verdicts: list[Verdict] = await self._call(node_id, "hand", request, repeatable=True)
        return verdicts

    async def _call(self, node_id: str, method: str, request: Any, *, repeatable: bool = False) -> Any:
        return await self._network.call(
            self._process, node_id, method, request, timeout_s=_TIMEOUT_S, repeatable=repeatable
        )


def serve_peers(process: Process, side: PeerSide) -> None:
    """Let a process answer what `SimPeers` asks; who calls is who sent the message, as a capability would say."""

    async def compare(request: Any, source: str) -> Comparison:
        partitions, layout_epoch = request
        return await side.compare(source, partitions, layout_epoch=layout_epoch)

    async def page(request: Any, source: str) -> tuple[list[BlockEntry], Sequence[int]]:
        partitions, tenant, after = request
        return await side.page(source, partitions=partitions, tenant=tenant, after=after)

    async def fetch(request: Any, source: str) -> list[Fetched]:
        tenant, ids = request
        _, items = await side.fetch(source, tenant=tenant, ids=ids, shape=_bytes_of)
        return items

    async def confirm(request: Any, source: str) -> list[Verdict]:
        tenant, ids, layout_epoch, collection_epoch = request
        return await side.confirm(tenant=tenant, ids=ids, layout_epoch=layout_epoch, collection_epoch=collection_epoch)

    async def hand(request: Any, source: str) -> list[Verdict]:
        tenant, batch, collection_epoch = request
        return await side.hand(tenant=tenant, batch=batch, collection_epoch=collection_epoch)

    process.handlers.update(compare=compare, page=page, fetch=fetch, confirm=confirm, hand=hand)


def _bytes_of(found: list[Found]) -> list[Fetched]:
    return [item if isinstance(item, Verdict) else bytes(item.data) for item in found]
