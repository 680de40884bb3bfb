"""Each engine against the plainest model of a metadata store, over random transactions."""

from __future__ import annotations

import contextlib
import random

import pytest

from holdfast_core.runtime.metadata.store import (
    Absent,
    Condition,
    CreateRevisionIs,
    Delete,
    Exists,
    KeyValue,
    MetadataStore,
    ModRevisionIs,
    Operation,
    Put,
)
from tests.support.watches import next_batch


class _Model:
    """What a store should hold, worked out in the plainest way."""

    def __init__(self) -> None:
        self.items: dict[str, KeyValue] = {}

    def holds(self, condition: Condition) -> bool:
        found = self.items.get(condition.key)
        match condition:
            case Absent():
                return found is None
            case Exists():
                return found is not None
            case CreateRevisionIs():
                return (found.create_revision if found else 0) == condition.revision
            case ModRevisionIs():
                return (found.mod_revision if found else 0) == condition.revision

    def apply(self, operations: list[Operation], revision: int) -> None:
        for operation in operations:
            found = self.items.pop(operation.key, None)
            if isinstance(operation, Put):
                created = found.create_revision if found else revision
                self.items[operation.key] = KeyValue(operation.key, operation.value, created, revision)


def _random_txn(dice: random.Random, model: _Model, prefix: str) -> tuple[list[Condition], list[Operation]]:
    keys = [f"{prefix}{number}" for number in range(6)]
    conditions: list[Condition] = []
    for key in dice.sample(keys, dice.choice([0, 0, 1, 1, 2])):
        found = model.items.get(key)
        revision = dice.choice([0, 1, found.mod_revision if found else 0, found.create_revision if found else 0])
        choices: list[Condition] = [
            Absent(key),
            Exists(key),
            ModRevisionIs(key, revision),
            CreateRevisionIs(key, revision),
        ]
        conditions.append(dice.choice(choices))
    operations: list[Operation] = [
        Delete(key) if dice.random() < 0.3 else Put(key, dice.randbytes(8))
        for key in dice.sample(keys, dice.randrange(4))
    ]
    return conditions, operations


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_random_life_matches_the_model_and_the_watch(store: MetadataStore, prefix: str, seed: int) -> None:
    """After each of 150 random transactions the answer is the model's; the watch replays to the same items."""
    dice, model = random.Random(seed), _Model()
    async with contextlib.aclosing(store.watch(prefix)) as batches:
        revision = (await next_batch(batches)).revision
        watched: dict[str, KeyValue] = {}
        for _ in range(150):
            conditions, operations = _random_txn(dice, model, prefix)
            before = dict(model.items)
            result = await store.txn(conditions, operations)
            assert result.succeeded is all(map(model.holds, conditions)), (conditions, operations)
            if result.succeeded:
                model.apply(operations, revision + 1)
            changed = model.items != before
            revision += changed
            assert result.revision == revision
            if changed:
                batch = await next_batch(batches)
                assert batch.revision == revision
                watched = {key: item for key, item in watched.items() if key not in batch.deletes}
                watched |= {item.key: item for item in batch.puts}
                assert watched == model.items
    assert {item.key: item for item in (await store.snapshot([prefix])).items} == model.items
