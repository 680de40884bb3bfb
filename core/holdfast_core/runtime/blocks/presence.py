"""Asking the owners whether blocks are durable.

An id counts as durable when a write quorum of the owners of any one living epoch holds it (DESIGN section 6). Owners
that do not answer count neither way: if they could decide it, the question stays open and the call fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.layout import Layout
from holdfast_core.model.limits import ERROR_BLOCK_IDS_MAX
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_proto.v1.blocks_pb2 import VERDICT_OK

IDS_PER_QUESTION = 16_384
PATIENCE_S: Final = 2.0
SUSPECT_PATIENCE_S: Final = 0.25

Owners: TypeAlias = tuple[tuple[str, ...], ...]
"""Owners of a block in each living layout, newest first."""

_NONE: Final[frozenset[bytes]] = frozenset()


@dataclass(frozen=True, slots=True)
class Durability:
    """What the owners said. Ids in neither list are held by all owners of one living epoch.

    Attributes:
        missing: ids that no living epoch's write quorum holds.
        under_replicated: ids that are durable, but not held by every owner of any one epoch, or not known to be.
    """

    missing: tuple[bytes, ...]
    under_replicated: tuple[bytes, ...]


async def check_durable(
    pool: NodePool, layouts: Sequence[Layout], capability: Callable[[], str], block_ids: Iterable[bytes]
) -> Durability:
    """Ask all owners in all living epochs about the ids; presence is by lookup, which also stamps what is found.

    Args:
        pool: connections to the nodes.
        layouts: living layouts, newest first.
        capability: returns a token with the verb `has`.
        block_ids: any number; the caller bounds memory (about 150 bytes an id are in use).

    Raises:
        HoldfastError: UNREACHABLE with the undecided ids if too few owners answered to tell; WRONG_EPOCH if a node
            knows a newer layout; DENIED if the capability does not allow asking: if too few answered because all that
            did not refused.
    """
    ids = tuple(dict.fromkeys(block_ids))
    if not ids or not layouts:
        return Durability(missing=ids, under_replicated=())
    by_owners = _by_owners(ids, layouts)
    questions: dict[str, list[bytes]] = {}
    for owners, group in by_owners.items():
        for node_id in dict.fromkeys(node for nodes in owners for node in nodes):
            questions.setdefault(node_id, []).extend(group)
    held: dict[str, set[bytes]] = {}
    silent: dict[str, HoldfastError] = {}
    epoch = layouts[0].epoch
    async with plain_task_group() as running:
        tasks = {
            node_id: running.create_task(_ask(pool, node_id, asked, capability, epoch, held, silent))
            for node_id, asked in questions.items()
        }
        suspect = any(pool.rank(node_id)[0] for node_id in tasks)
        _, pending = await asyncio.wait(tasks.values(), timeout=SUSPECT_PATIENCE_S if suspect else PATIENCE_S)
        while pending and not _decided(ids, layouts, held):
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        # A node whose disk hangs does not hold up what the others have decided.
        for node_id, task in tasks.items():
            if task in pending:
                task.cancel()
                pool.failed(node_id)
                silent[node_id] = HoldfastError(ErrorCode.UNREACHABLE, f"storage node {node_id} is slow")
    # Nearly always every owner holds everything; ids are then looked at by the thousand and not one by one.
    doubtful: set[bytes] = set()
    for owners, group in by_owners.items():
        if not any(all(held.get(node_id, _NONE).issuperset(group) for node_id in nodes) for nodes in owners):
            doubtful.update(group)
    return _judge([block_id for block_id in ids if block_id in doubtful] if doubtful else (), layouts, held, silent)


def _decided(ids: Sequence[bytes], layouts: Sequence[Layout], held: Mapping[str, set[bytes]]) -> bool:
    """Return whether every id is known to be durable, whatever those say that have not answered."""
    return all(
        any(
            sum(block_id in held.get(node_id, _NONE) for node_id in layout.owners_of_block(block_id))
            >= layout.write_quorum
            for layout in layouts
        )
        for block_id in ids
    )


def _by_owners(ids: Iterable[bytes], layouts: Sequence[Layout]) -> dict[Owners, list[bytes]]:
    """Group ids by their owners in each layout."""
    newest, *others = layouts
    by_newest: dict[tuple[str, ...], list[bytes]] = {}
    for block_id in ids:
        by_newest.setdefault(newest.owners_of_block(block_id), []).append(block_id)
    if not others:
        return {(owners,): group for owners, group in by_newest.items()}
    groups: dict[Owners, list[bytes]] = {}
    for owners, group in by_newest.items():
        for block_id in group:
            everywhere = (owners, *[layout.owners_of_block(block_id) for layout in others])
            groups.setdefault(everywhere, []).append(block_id)
    return groups


async def _ask(
    pool: NodePool,
    node_id: str,
    ids: Sequence[bytes],
    capability: Callable[[], str],
    epoch: int,
    held: dict[str, set[bytes]],
    silent: dict[str, HoldfastError],
) -> None:
    """Fill in `held[node_id]`, or `silent[node_id]` if the node does not answer all of it."""
    present: set[bytes] = set()
    for at in range(0, len(ids), IDS_PER_QUESTION):
        part = ids[at : at + IDS_PER_QUESTION]
        try:
            verdicts = await pool.has_blocks(node_id, b"".join(part), capability(), layout_epoch=epoch)
        except HoldfastError as error:
            if error.code is ErrorCode.WRONG_EPOCH:
                raise
            silent[node_id] = error
            return
        if verdicts.count(VERDICT_OK) == len(part):
            present.update(part)
        else:
            present.update(block_id for block_id, verdict in zip(part, verdicts, strict=True) if verdict == VERDICT_OK)
    held[node_id] = present


def _judge(
    ids: Sequence[bytes],
    layouts: Sequence[Layout],
    held: dict[str, set[bytes]],
    silent: dict[str, HoldfastError],
) -> Durability:
    missing: list[bytes] = []
    thin: list[bytes] = []
    open_ids: list[bytes] = []
    for block_id in ids:
        durable = complete = open_question = False
        for layout in layouts:
            owners = layout.owners_of_block(block_id)
            count = sum(1 for node_id in owners if node_id in held and block_id in held[node_id])
            durable = durable or count >= layout.write_quorum
            complete = complete or count == len(owners)
            unknown = sum(1 for node_id in owners if node_id in silent)
            open_question = open_question or count + unknown >= layout.write_quorum
        if not durable:
            (open_ids if open_question else missing).append(block_id)
        elif not complete:
            thin.append(block_id)
    if open_ids and not missing:
        reason = next(iter(silent.values()))
        refused = all(error.code is ErrorCode.DENIED for error in silent.values())
        raise HoldfastError(
            ErrorCode.DENIED if refused else ErrorCode.UNREACHABLE,
            f"too few owners answered to tell whether {len(open_ids)} blocks are durable: {reason.message}",
            facts={"silent": ",".join(sorted(silent))},
            block_ids=open_ids[:ERROR_BLOCK_IDS_MAX],
        )
    return Durability(missing=tuple(missing + open_ids if missing else missing), under_replicated=tuple(thin))
