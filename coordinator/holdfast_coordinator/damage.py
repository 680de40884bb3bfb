"""Damage: blocks that were durable once and that no owner can give any more. DESIGN section 10.

A record is made only after every owner in every living epoch has answered and none had good bytes; it is removed only
after enough of them have. While it stands, no commit may name the block, and whoever builds on it sends it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from holdfast_coordinator import keyspace
from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.barrier import Walk
from holdfast_coordinator.damage_scope import DamageScope
from holdfast_coordinator.keyspace import TenantKeyspace
from holdfast_coordinator.records import each, still
from holdfast_coordinator.transactions import Outcome, attempt, contention
from holdfast_coordinator.view import ClusterView, LayoutSet
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.layout import Layout
from holdfast_core.model.limits import BLOCK_ID_BYTES, IDS_PER_REQUEST_MAX
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.metadata.store import (
    Condition,
    Delete,
    KeyValue,
    MetadataStore,
    ModRevisionIs,
    Operation,
    Put,
)
from holdfast_proto.v1.blocks_pb2 import VERDICT_OK

# A transaction of the ledger takes 100 operations of its callers; one of them marks the change.
_IDS_PER_TXN: Final = 64
_VERIFY_TIMEOUT_S: Final = 120.0


class Damage:
    """Damage records of one tenant."""

    def __init__(
        self,
        store: MetadataStore,
        space: TenantKeyspace,
        ledger: Ledger,
        view: ClusterView,
        pool: NodePool,
        capability: Callable[[], str],
        scope: DamageScope,
    ) -> None:
        """Bind to the store and the nodes; `capability` allows asking for presence, `scope` looks ids up in trees."""
        self._store = store
        self._space = space
        self._ledger = ledger
        self._view = view
        self._pool = pool
        self._capability = capability
        self._scope = scope

    async def mark(self) -> Condition:
        """Return the condition that no damage record was made or removed since now."""
        return still(self._space.damage_head, await self._store.get(self._space.damage_head))

    async def ids(self) -> frozenset[bytes]:
        """Return all ids that are recorded."""
        return frozenset([self._id_of(item) async for item in each(self._store, self._space.damage_ids_prefix)])

    async def report(self, block_ids: Sequence[bytes], resource_id: str, walks: Iterable[Walk], entry: Entry) -> int:
        """Record those ids that every owner confirms as lost, and return how many they are.

        Ids that the resource's trees do not name are left out; `walks` are through all of them.

        The audit log has the call with the first of them; what a crash leaves out the next reader reports again.

        Raises:
            HoldfastError: LIMIT_EXCEEDED for more ids than a request may name; INVALID_ARGUMENT for a wrong length;
                CONFLICT if the layouts changed while the owners were asked.
        """
        if len(block_ids) > IDS_PER_REQUEST_MAX:
            raise HoldfastError(
                ErrorCode.LIMIT_EXCEEDED, f"{len(block_ids)} ids were reported; {IDS_PER_REQUEST_MAX} at most"
            )
        layout_set = await self._view.current_layouts()
        lost = await self._lost(block_ids, layout_set.layouts)
        if lost:
            named = await self._scope.named(lost, walks, layout_set.layouts)
            lost = [block_id for block_id in lost if block_id in named]
        return await self._record(lost, layout_set, resource_id, entry)

    async def confirm(self, block_ids: Sequence[bytes], entry: Entry) -> int:
        """Record those ids that every owner confirms as lost, as `report` does, for who has met them in trees.

        They are recorded with the action of `entry` in place of a point or object: a collection knows of none.

        Raises:
            HoldfastError: CONFLICT as `report`.
        """
        layout_set = await self._view.current_layouts()
        lost = await self._lost(block_ids, layout_set.layouts)
        return await self._record(lost, layout_set, entry.action, entry)

    async def _lost(self, block_ids: Sequence[bytes], layouts: Sequence[Layout]) -> list[bytes]:
        """Return the ids of which every owner has said that it has no good bytes."""
        good, silent = await self._ask(block_ids, layouts)
        return [
            block_id
            for block_id in dict.fromkeys(block_ids)
            if not good[block_id] and silent.isdisjoint(_owners(block_id, layouts))
        ]

    async def _record(self, lost: Sequence[bytes], layout_set: LayoutSet, resource_id: str, entry: Entry) -> int:
        # Owners let go of what a newer layout has elsewhere: what they said counts while the layouts are the same.
        asked_under: list[Condition] = [ModRevisionIs(keyspace.LAYOUT_HEAD, layout_set.revision)]
        marks = [Put(self._space.damaged_block(block_id), resource_id.encode()) for block_id in lost]
        entry.details["blocks"] = str(len(marks))
        if marks:
            first = [*marks[:_IDS_PER_TXN], Put(self._space.damage_head, b"")]
            if await self._ledger.apply(entry, asked_under, first) is not Outcome.APPLIED:
                raise contention("the record of damaged blocks")
        await self._write(marks[_IDS_PER_TXN:], asked_under)
        return len(lost)

    async def heal(self, block_ids: Iterable[bytes], layouts: Sequence[Layout]) -> Sequence[bytes]:
        """Remove the records of ids that a write quorum of one epoch verifiably holds; return those that stay."""
        wanted = sorted(set(block_ids))
        if not wanted:
            return ()
        good, _ = await self._ask(wanted, layouts)
        whole = [
            block_id
            for block_id in wanted
            if any(
                len(good[block_id].intersection(layout.owners_of_block(block_id))) >= layout.write_quorum
                for layout in layouts
            )
        ]
        await self._write([Delete(self._space.damaged_block(block_id)) for block_id in whole])
        return sorted(set(wanted).difference(whole))

    async def _write(self, operations: Sequence[Operation], conditions: Sequence[Condition] = ()) -> None:
        """Apply in portions; each is harmless to apply twice, so an unknown outcome is simply tried again."""
        for at in range(0, len(operations), _IDS_PER_TXN):
            portion = [*operations[at : at + _IDS_PER_TXN], Put(self._space.damage_head, b"")]
            for _ in range(2):
                if await attempt(self._store, conditions, portion) is Outcome.APPLIED:
                    break
            else:
                raise contention("the record of damaged blocks")

    async def _ask(
        self, block_ids: Sequence[bytes], layouts: Sequence[Layout]
    ) -> tuple[dict[bytes, set[str]], set[str]]:
        """Let every owner read and hash the blocks. Returns who has each whole, and who did not answer."""
        good: dict[bytes, set[str]] = {block_id: set() for block_id in block_ids}
        silent: set[str] = set()
        questions: dict[str, list[bytes]] = {}
        for block_id in good:
            if len(block_id) != BLOCK_ID_BYTES:
                raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"a block id has {BLOCK_ID_BYTES} bytes")
            for node_id in _owners(block_id, layouts):
                questions.setdefault(node_id, []).append(block_id)
        self._pool.update(self._view.state.nodes)
        async with plain_task_group() as group:
            for node_id, asked in questions.items():
                group.create_task(self._ask_node(node_id, asked, good, silent))
        return good, silent

    async def _ask_node(
        self, node_id: str, asked: Sequence[bytes], good: dict[bytes, set[str]], silent: set[str]
    ) -> None:
        try:
            verdicts = await self._pool.has_blocks(
                node_id, b"".join(asked), self._capability(), verify=True, timeout_s=_VERIFY_TIMEOUT_S
            )
        except HoldfastError as error:
            if error.code is not ErrorCode.UNREACHABLE:
                raise
            silent.add(node_id)
            return
        for block_id, verdict in zip(asked, verdicts, strict=True):
            if verdict == VERDICT_OK:
                good[block_id].add(node_id)

    def _id_of(self, item: KeyValue) -> bytes:
        return bytes.fromhex(item.key.removeprefix(self._space.damage_ids_prefix))


def _owners(block_id: bytes, layouts: Sequence[Layout]) -> set[str]:
    return {node_id for layout in layouts for node_id in layout.owners_of_block(block_id)}
