"""Whether blocks are durable, by what each owner answers: judged in groups as it would be one by one."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.layout import Layout
from holdfast_core.model.layout.table import LayoutNode
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.blocks.presence import Durability, check_durable
from holdfast_proto.v1.blocks_pb2 import VERDICT_MISSING, VERDICT_OK

NODES = tuple(LayoutNode(f"node-{number}", "zone", 1) for number in range(5))
IDS = tuple(blake3(bytes([number])).digest() for number in range(40))
PARTITIONS = 4


class AnsweringPool(NodePool):
    """Answers for the nodes: what each holds, and which are silent."""

    def __init__(self, held: dict[str, set[bytes]], silent: set[str]) -> None:
        super().__init__()
        self._held = held
        self._silent = silent

    async def has_blocks(self, node_id: str, block_ids: bytes, capability: str, **_: Any) -> bytes:
        """Answer as the node would."""
        if node_id in self._silent:
            raise HoldfastError(ErrorCode.UNREACHABLE, f"{node_id} is silent")
        ids = [block_ids[at : at + 32] for at in range(0, len(block_ids), 32)]
        mine = self._held.get(node_id, set())
        return bytes([VERDICT_OK if block_id in mine else VERDICT_MISSING for block_id in ids])


@st.composite
def layouts(draw: st.DrawFn) -> list[Layout]:
    """One to three living layouts, newest first."""
    made = []
    for epoch in range(draw(st.integers(1, 3)), 0, -1):
        owners = [draw(st.permutations(range(len(NODES))))[:3] for _ in range(PARTITIONS)]
        packed = b"".join(struct.pack("<3H", *of_one) for of_one in owners)
        made.append(Layout(epoch=epoch, seed=epoch, partitions=PARTITIONS, replicas=3, nodes=NODES, owners=packed))
    return made


def one_by_one(living: list[Layout], held: dict[str, set[bytes]], silent: set[str]) -> Durability | str:
    """The rule of DESIGN section 6, an id at a time; "open" where silence could decide."""
    missing: list[bytes] = []
    thin: list[bytes] = []
    undecided: list[bytes] = []
    for block_id in IDS:
        counts = []
        for layout in living:
            owners = layout.owners_of_block(block_id)
            present = sum(node not in silent and block_id in held.get(node, ()) for node in owners)
            counts.append((present, present + sum(node in silent for node in owners)))
        if not any(present >= 2 for present, _ in counts):
            (undecided if any(most >= 2 for _, most in counts) else missing).append(block_id)
        elif not any(present == 3 for present, _ in counts):
            thin.append(block_id)
    if undecided and not missing:
        return "open"
    return Durability(missing=(*missing, *undecided), under_replicated=tuple(thin))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(living=layouts(), data=st.data())
def test_groups_are_judged_as_ids_are(living: list[Layout], data: st.DataObject) -> None:
    held = {node.node_id: set(IDS) for node in NODES}
    for node_id, block_id in data.draw(st.lists(st.tuples(st.sampled_from(sorted(held)), st.sampled_from(IDS)))):
        held[node_id].discard(block_id)
    silent = data.draw(st.sets(st.sampled_from(sorted(held)), max_size=3))

    async def check() -> Durability:
        async with AnsweringPool(held, silent) as pool:
            return await check_durable(pool, living, lambda: "", IDS)

    expected = one_by_one(living, held, silent)
    if expected == "open":
        with pytest.raises(HoldfastError) as caught:
            asyncio.run(check())
        assert caught.value.code is ErrorCode.UNREACHABLE
    else:
        assert asyncio.run(check()) == expected


def test_no_ids_and_no_layouts() -> None:
    async def check(living: list[Layout], ids: tuple[bytes, ...]) -> Durability:
        async with AnsweringPool({}, set()) as pool:
            return await check_durable(pool, living, lambda: "", ids)

    assert asyncio.run(check([], IDS)) == Durability(missing=IDS, under_replicated=())
    assert asyncio.run(check([], ())) == Durability(missing=(), under_replicated=())
