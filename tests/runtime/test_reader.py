"""What no owner gives is concluded only under layouts that still hold once the last owner has answered."""

from __future__ import annotations

import struct
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from blake3 import blake3

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.layout import Layout
from holdfast_core.model.layout.table import LayoutNode
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.blocks.reader import REFRESHES_MAX, BlockReader, Unreadable
from holdfast_core.runtime.blocks.wire import GetAnswer
from holdfast_proto.v1.blocks_pb2 import VERDICT_MISSING, VERDICT_OK

NODES = tuple(LayoutNode(f"node-{number}", "zone", 1) for number in range(3))
BODIES = {blake3(body).digest(): body for body in (bytes([number]) * 9 for number in range(8))}


def layout(epoch: int, owner: int) -> Layout:
    """A layout in which one node owns everything."""
    return Layout(epoch=epoch, seed=1, partitions=1, replicas=1, nodes=NODES, owners=struct.pack("<H", owner))


class ServingPool(NodePool):
    """Answers for the nodes from sets of ids; `asked` are the nodes in order."""

    def __init__(self, held: dict[str, set[bytes]]) -> None:
        super().__init__()
        self.held = held
        self.asked: list[str] = []

    async def get_blocks(
        self, node_id: str, block_ids: Sequence[bytes], capability: str, **_: Any
    ) -> AsyncGenerator[GetAnswer, None]:
        """Answer as the node would."""
        self.asked.append(node_id)
        if node_id not in self.held:
            raise HoldfastError(ErrorCode.UNREACHABLE, f"{node_id} is silent")
        has = [block_id in self.held[node_id] for block_id in block_ids]
        bodies = [BODIES[block_id] if there else b"" for block_id, there in zip(block_ids, has, strict=True)]
        verdicts = bytes([VERDICT_OK if there else VERDICT_MISSING for there in has])
        yield GetAnswer(0, verdicts, [len(body) for body in bodies], memoryview(b"".join(bodies)))


class Cluster:
    """Layouts that change at every look, as scripted."""

    def __init__(self, *script: Layout | HoldfastError) -> None:
        self._script = list(script[1:])
        self.layouts: Sequence[Layout] = [script[0]]  # type: ignore[list-item]
        self.refreshes = 0

    async def changed_since(self, layouts: Sequence[Layout]) -> bool:
        """Go on with the script; at its end nothing changes any more."""
        self.refreshes += 1
        if not self._script:
            return False
        following = self._script.pop(0)
        if isinstance(following, HoldfastError):
            raise following
        self.layouts = [following]
        return True


async def read(pool: ServingPool, cluster: Cluster) -> tuple[dict[bytes, bytes], Unreadable]:
    """Read all bodies; return what came, and what did not."""
    reader = BlockReader(pool, lambda: cluster.layouts, lambda: "", refresh=cluster.changed_since)
    got: dict[bytes, bytes] = {}

    def keep(ids: Sequence[bytes], bodies: Sequence[memoryview]) -> Sequence[bytes]:
        for block_id, body in zip(ids, bodies, strict=True):
            assert block_id not in got, "consumed twice"
            got[block_id] = bytes(body)
        return []

    return got, await reader.fetch_into(BODIES, keep)


async def test_the_new_owner_is_asked_for_what_the_old_one_let_go_of() -> None:
    ids = list(BODIES)
    pool = ServingPool({"node-0": set(ids[:3]), "node-1": set(ids)})
    got, unreadable = await read(pool, Cluster(layout(1, 0), layout(2, 1)))
    assert got == BODIES
    assert not unreadable
    assert pool.asked == ["node-0", "node-1"]


async def test_a_node_that_lacked_a_block_is_asked_again_under_another_layout() -> None:
    pool = ServingPool({"node-0": set()})
    cluster = Cluster(layout(1, 0), layout(2, 0))
    changed_since = cluster.changed_since

    async def arrives(layouts: Sequence[Layout]) -> bool:
        pool.held["node-0"] = set(BODIES)
        return await changed_since(layouts)

    cluster.changed_since = arrives  # type: ignore[method-assign]
    got, unreadable = await read(pool, cluster)
    assert (got, bool(unreadable)) == (BODIES, False)


async def test_with_the_same_layouts_it_is_lost_and_nobody_is_asked_twice() -> None:
    pool = ServingPool({"node-0": set()})
    cluster = Cluster(layout(1, 0))
    got, unreadable = await read(pool, cluster)
    assert (got, set(unreadable.missing)) == ({}, set(BODIES))
    assert (pool.asked, cluster.refreshes) == (["node-0"], 1)


async def test_nothing_is_lost_while_the_layouts_go_on_changing() -> None:
    pool = ServingPool({node.node_id: set() for node in NODES})
    cluster = Cluster(*(layout(epoch, epoch % 3) for epoch in range(1, 20)))
    _, unreadable = await read(pool, cluster)
    assert set(unreadable.unreachable) == set(BODIES)
    assert not unreadable.damaged
    assert cluster.refreshes == REFRESHES_MAX


async def test_nothing_is_lost_while_nobody_can_say_who_the_owners_are() -> None:
    away = HoldfastError(ErrorCode.UNREACHABLE, "no coordinator answers")
    _, unreadable = await read(ServingPool({"node-0": set()}), Cluster(layout(1, 0), away))
    assert set(unreadable.unreachable) == set(BODIES)
    assert unreadable.error("it").code is ErrorCode.UNREACHABLE
    assert "no coordinator answers" in unreadable.error("it").message


async def test_what_all_give_asks_nobody_for_layouts() -> None:
    cluster = Cluster(layout(1, 0))
    got, unreadable = await read(ServingPool({"node-0": set(BODIES)}), cluster)
    assert (got, bool(unreadable), cluster.refreshes) == (BODIES, False, 0)
