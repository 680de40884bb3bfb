"""The ledger over a store that loses answers: whatever is lost, what was done and what the log says are the same."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

import pytest

from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.transactions import Outcome
from holdfast_coordinator.usage import UsageChange
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.clock import SystemClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import (
    OUTCOME_FACT,
    OUTCOME_UNAPPLIED,
    OUTCOME_UNKNOWN,
    Absent,
    Condition,
    Delete,
    Exists,
    KeyValue,
    Operation,
    Put,
    Snapshot,
    TxnResult,
    WatchBatch,
)
from holdfast_proto.v1.tenants_pb2 import Quota, Usage
from tests.coordinator.faults import Crash, Fault, FaultyStore
from tests.coordinator.ledgers import make_entry, make_ledger, read_log

NAMES = [f"vm-{number}" for number in range(4)]
# More store calls than one transaction takes; each test ends when the fault no longer strikes.
CALLS_MAX = 20
_MAY_PASS = (ErrorCode.UNREACHABLE, ErrorCode.CONFLICT)


async def _make(ledger: Ledger, store: SqliteStore, entry: Entry) -> str:
    """Make what the entry is about as a handler does: look, decide, write; return the entry's outcome."""
    while True:
        if await store.get(entry.resource) is not None:
            entry.repeated()
            await ledger.record(entry)
            return entry.outcome
        operations = [Put(entry.resource, entry.entry_id.encode())]
        charge = UsageChange(tenant=1, quota=Quota(), vms=1)
        if await ledger.apply(entry, [Absent(entry.resource)], operations, charge) is Outcome.APPLIED:
            return entry.outcome


async def _forget(ledger: Ledger, store: SqliteStore, entry: Entry) -> str:
    """Remove it, as a handler does."""
    entry.action = "vm.forget"
    while True:
        if await store.get(entry.resource) is None:
            entry.outcome = ErrorCode.NOT_FOUND.name
            await ledger.record(entry)
            return entry.outcome
        charge = UsageChange(tenant=1, quota=Quota(), vms=-1)
        if await ledger.apply(entry, [Exists(entry.resource)], [Delete(entry.resource)], charge) is Outcome.APPLIED:
            return entry.outcome


@pytest.mark.parametrize("fault", list(Fault))
async def test_a_fault_at_any_call_leaves_one_record_for_each_thing_made(store: SqliteStore, fault: Fault) -> None:
    """Three calls share a transaction of a ledger that fails; each is then asked of another ledger."""
    healthy = make_ledger(store, seed=2)
    for at in range(CALLS_MAX):
        faulty = FaultyStore(store)
        failing = make_ledger(faulty)
        names = [f"{at}.{number}" for number in range(3)]
        faulty.arm(fault, at=at)
        entries = [make_entry(name) for name in names]
        answers = await asyncio.gather(*(_make(failing, store, entry) for entry in entries), return_exceptions=True)
        struck = faulty.struck
        faulty.arm(None)
        for name, entry, answer in zip(names, entries, answers, strict=True):
            if isinstance(answer, BaseException):
                assert isinstance(answer, (Crash, HoldfastError))
                again = make_entry(name)
                again.entry_id = "f" + again.entry_id[1:]
                assert await _make(healthy, store, again) in ("OK", "REPEATED")
            else:
                assert (answer, entry.written) == ("OK", True)
        log = await read_log(store)
        assert [log.made(name) for name in names] == [1, 1, 1]
        if not struck:
            break
    assert 1 < at < CALLS_MAX - 1
    assert await healthy.usage(1) == Usage(vms=3 * (at + 1))


@dataclass
class Weather:
    """What is wrong with the stores of one test, from one seed; `calm` ends it."""

    source: random.Random
    late: list[tuple[Sequence[Condition], Sequence[Operation]]] = field(default_factory=list)
    away: int = 0
    calm: bool = False

    def strikes(self, chance: float) -> bool:
        """Whether something happens now."""
        return not self.calm and self.source.random() < chance


class StormyStore:
    """A store that loses transactions before and after they are applied, applies them late, and is away for a while."""

    def __init__(self, store: SqliteStore, weather: Weather) -> None:
        self._store = store
        self._weather = weather

    async def _meet(self, unapplied: dict[str, str]) -> None:
        weather = self._weather
        await asyncio.sleep(0)
        if weather.late and (weather.calm or weather.source.random() < 0.5):
            # The network delivers at last what was given up long ago.
            await self._store.txn(*weather.late.pop(0))
        if weather.away:
            weather.away -= 1
        elif weather.strikes(0.05):
            weather.away = weather.source.randrange(1, 6)
        else:
            return
        raise HoldfastError(ErrorCode.UNREACHABLE, "the store is away", facts=unapplied)

    async def txn(self, conditions: Sequence[Condition], operations: Sequence[Operation]) -> TxnResult:
        await self._meet({OUTCOME_FACT: OUTCOME_UNAPPLIED})
        weather = self._weather
        lost = HoldfastError(ErrorCode.UNREACHABLE, "lost", facts={OUTCOME_FACT: OUTCOME_UNKNOWN})
        if weather.strikes(0.1):
            raise lost
        if weather.strikes(0.2):
            weather.late.append((conditions, operations))
            raise lost
        result = await self._store.txn(conditions, operations)
        if weather.strikes(0.15):
            raise lost
        return result

    async def get(self, key: str) -> KeyValue | None:
        await self._meet({})
        return await self._store.get(key)

    async def snapshot(self, prefixes: Sequence[str]) -> Snapshot:
        await self._meet({})
        return await self._store.snapshot(prefixes)

    async def page(self, prefix: str, *, after: str, limit: int) -> Snapshot:
        await self._meet({})
        return await self._store.page(prefix, after=after, limit=limit)

    def scan(self, prefixes: Sequence[str], *, page_items: int) -> AsyncGenerator[Snapshot, None]:
        return self._store.scan(prefixes, page_items=page_items)

    def watch(self, prefix: str) -> AsyncGenerator[WatchBatch, None]:
        return self._store.watch(prefix)

    async def grant_lease(self, ttl_s: float) -> int:
        return await self._store.grant_lease(ttl_s)

    async def keep_lease(self, lease_id: int) -> float:
        return await self._store.keep_lease(lease_id)

    async def lease_left(self, lease_id: int) -> float:
        return await self._store.lease_left(lease_id)

    async def revoke_lease(self, lease_id: int) -> None:
        await self._store.revoke_lease(lease_id)

    async def close(self) -> None:
        await self._store.close()


@dataclass
class Told:
    """What one call was told: its entry's outcome, or why it failed."""

    entry: Entry
    outcome: str


async def _call(ledger: Ledger, store: SqliteStore, source: random.Random) -> Told:
    """Serve one call as the guard does: a failure is recorded too, where that can be."""
    entry = make_entry(source.choice(NAMES))
    entry.entry_id = source.randbytes(8).hex()
    work = _make if source.random() < 0.6 else _forget
    try:
        return Told(entry, await work(ledger, store, entry))
    except HoldfastError as error:
        if error.code not in _MAY_PASS:
            raise
        if not entry.written:
            entry.outcome = error.code.name
        try:
            await ledger.record(entry)
        except HoldfastError as second:
            if second.code not in _MAY_PASS:
                raise
        return Told(entry, error.code.name)


async def _clients(ledgers: list[Ledger], store: SqliteStore, seed: int) -> list[Told]:
    async def client(number: int) -> list[Told]:
        source = random.Random(f"{seed}.{number}")
        told = []
        for _ in range(12):
            await asyncio.sleep(source.random() * 0.001)
            told.append(await _call(ledgers[number % 2], store, source))
        return told

    return [each for told in await asyncio.gather(*map(client, range(8))) for each in told]


@pytest.mark.parametrize("seed", range(12))
async def test_the_log_tells_the_whole_story_whatever_is_lost(store: SqliteStore, seed: int) -> None:
    weather = Weather(random.Random(seed))
    stormy = [StormyStore(store, weather) for _ in range(2)]
    ledgers = [make_ledger(each, clock=SystemClock(), seed=number) for number, each in enumerate(stormy)]
    told = await _clients(ledgers, store, seed)
    weather.calm, weather.away = True, 0
    while weather.late:
        await stormy[0].get("anything")
    log = await read_log(store)

    # Told in the log's order, every record that something was done finds what it needs, and the end is what there is.
    present: dict[str, str] = {}
    for record in log.records:
        if record.outcome != "OK":
            continue
        if record.action == "vm.register":
            assert record.resource not in present, record
            present[record.resource] = record.entry_id
        else:
            assert record.resource in present, record
            del present[record.resource]
    stored = {item.key: item.value.decode() for item in (await store.snapshot(["vm/"])).items}
    assert stored == present
    assert await make_ledger(store).usage(1) == Usage(vms=len(present))

    # Nobody was told of success without its record, and no call has two.
    for each in told:
        records = log.of(each.entry)
        assert len(records) <= 1
        if each.outcome in [code.name for code in _MAY_PASS]:
            # The caller does not know whether it was done; the log does.
            assert [record.outcome for record in records] in ([], ["OK"], [each.outcome], ["REPEATED"], ["NOT_FOUND"])
        else:
            assert [record.outcome for record in records] == [each.outcome]


async def test_while_the_store_is_away_nothing_is_done_and_no_record_is_claimed(store: SqliteStore) -> None:
    weather = Weather(random.Random(1), away=1_000)
    ledger = make_ledger(StormyStore(store, weather))
    entries = [make_entry(name) for name in NAMES]
    done = await asyncio.gather(
        *(ledger.apply(entry, [], [Put(entry.resource, b"")]) for entry in entries[:2]),
        *(ledger.record(entry) for entry in entries[2:]),
        return_exceptions=True,
    )
    assert [each.code for each in done if isinstance(each, HoldfastError)] == [ErrorCode.UNREACHABLE] * 4
    assert not any(entry.written for entry in entries)
    assert (await store.snapshot([""])).items == ()
    weather.away, weather.calm = 0, True
    await asyncio.gather(*map(ledger.record, entries))
    assert len((await read_log(store)).records) == 4


async def test_a_call_that_was_refused_after_a_lost_try_is_never_done_later(store: SqliteStore) -> None:
    """The first try is still under way when the second is refused; then what refused it goes away."""
    weather = Weather(random.Random(1), calm=True)
    await make_ledger(store).record(make_entry("first"))
    entry = make_entry("late")

    tried: list[tuple[Sequence[Condition], Sequence[Operation]]] = []

    class LosesOne(StormyStore):
        async def txn(self, conditions: Sequence[Condition], operations: Sequence[Operation]) -> TxnResult:
            if not tried:
                tried.append((conditions, operations))
                await store.txn([], [Put("in-the-way", b"")])
                raise HoldfastError(ErrorCode.UNREACHABLE, "lost", facts={OUTCOME_FACT: OUTCOME_UNKNOWN})
            return await super().txn(conditions, operations)

    outcome = await make_ledger(LosesOne(store, weather)).apply(entry, [Absent("in-the-way")], [Put("late", b"")])
    assert outcome is Outcome.REFUSED
    await store.txn([], [Delete("in-the-way")])
    assert not (await store.txn(*tried[0])).succeeded
    assert await store.get("late") is None
    assert (await read_log(store)).of(entry) == []


async def test_a_lost_append_that_was_done_is_known_before_the_call_is_recorded_again(store: SqliteStore) -> None:
    """The answer of the append is lost and the store is away when the ledger looks; then it comes back."""

    class LosesTheAnswer(StormyStore):
        lost = False

        async def txn(self, conditions: Sequence[Condition], operations: Sequence[Operation]) -> TxnResult:
            result = await super().txn(conditions, operations)
            if not self.lost:
                self.lost, weather.away = True, 1
                raise HoldfastError(ErrorCode.UNREACHABLE, "lost", facts={OUTCOME_FACT: OUTCOME_UNKNOWN})
            return result

    weather = Weather(random.Random(1), calm=True)
    ledger = make_ledger(LosesTheAnswer(store, weather))
    entry = make_entry("vm-1")
    with pytest.raises(HoldfastError) as caught:
        await ledger.apply(entry, [Absent("vm-1")], [Put("vm-1", b"")])
    assert caught.value.code is ErrorCode.UNREACHABLE
    entry.outcome = ErrorCode.UNREACHABLE.name
    await ledger.record(entry)
    log = await read_log(store)
    assert [record.outcome for record in log.of(entry)] == ["OK"]
    assert entry.written
