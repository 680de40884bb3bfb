"""The ledger: calls that wait share a transaction, effect and record are never apart, and the log has one order."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator, Sequence

import pytest
from prometheus_client import CollectorRegistry

from holdfast_coordinator import keyspace
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.transactions import Outcome
from holdfast_coordinator.usage import UsageChange
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import AUDIT_BATCH_RECORDS_MAX, AUDIT_SEGMENT_RECORDS, METADATA_TXN_OPERATIONS_MAX
from holdfast_core.runtime.clock import ManualClock, SystemClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import (
    Absent,
    Condition,
    Delete,
    Exists,
    MetadataStore,
    Operation,
    Put,
    TxnResult,
)
from holdfast_proto.v1.tenants_pb2 import Quota, Usage
from tests.coordinator.faults import FaultyStore
from tests.coordinator.ledgers import Log, make_entry, make_ledger, read_log
from tests.coordinator.rig import refused
from tests.support.etcd import EtcdCluster, opened_etcd


@pytest.fixture
def counting(store: SqliteStore) -> FaultyStore:
    """The store, counting the calls that come to it."""
    return FaultyStore(store)


@pytest.fixture
async def ledger(counting: FaultyStore, clock: ManualClock) -> AsyncIterator[Ledger]:
    opened = make_ledger(counting, clock=clock)
    yield opened
    await opened.close()


async def _make(ledger: Ledger, name: str, *, key: str = "") -> Outcome:
    """Make the key `name`, which must not exist, and record it."""
    key = key or name
    return await ledger.apply(make_entry(name), [Absent(key)], [Put(key, name.encode())])


async def test_many_that_wait_share_few_transactions(ledger: Ledger, counting: FaultyStore) -> None:
    async def client(number: int) -> None:
        for turn in range(3):
            assert await _make(ledger, f"{number}.{turn}") is Outcome.APPLIED

    await asyncio.gather(*(client(number) for number in range(200)))
    log = await read_log(counting)
    assert len(log.records) == 600
    assert {record.resource for record in log.records} == {f"vm/{n}.{t}" for n in range(200) for t in range(3)}
    # 100 operations fit a transaction, so 600 calls take at least 6; each of them could have taken one.
    assert len(log.batches) <= 12
    assert counting.calls < 40


async def test_records_alone_share_transactions_of_256(ledger: Ledger, counting: FaultyStore) -> None:
    entries = [make_entry(str(number), action="point.list") for number in range(300)]
    await asyncio.gather(*map(ledger.record, entries))
    log = await read_log(counting)
    assert [len(batch.lines) for batch in log.batches] == [AUDIT_BATCH_RECORDS_MAX, 300 - AUDIT_BATCH_RECORDS_MAX]
    assert all(entry.written for entry in entries)
    for entry in entries:
        await ledger.record(entry)
    assert len((await read_log(counting)).records) == 300


async def test_one_whose_condition_fails_takes_no_other_down(ledger: Ledger, store: SqliteStore) -> None:
    await store.txn([], [Put("taken-1", b""), Put("taken-2", b"")])
    names = [f"vm-{number}" for number in range(20)]
    names[7], names[13] = "taken-1", "taken-2"
    outcomes = await asyncio.gather(*(_make(ledger, name) for name in names))
    assert [name for name, outcome in zip(names, outcomes, strict=True) if outcome is Outcome.REFUSED] == [
        "taken-1",
        "taken-2",
    ]
    log = await read_log(store)
    assert [record.resource for record in log.records] == [f"vm/{name}" for name in names if "taken" not in name]


async def test_one_whose_operations_are_malformed_takes_no_other_down(ledger: Ledger, store: SqliteStore) -> None:
    good = [asyncio.create_task(_make(ledger, f"vm-{number}")) for number in range(3)]
    twice = asyncio.create_task(ledger.apply(make_entry("twice"), [], [Put("k", b""), Delete("k")]))
    many = [Put(f"many-{number}", b"") for number in range(METADATA_TXN_OPERATIONS_MAX + 1)]
    large = asyncio.create_task(ledger.apply(make_entry("large"), [], many))
    good.append(asyncio.create_task(_make(ledger, "vm-3")))
    assert await asyncio.gather(*good) == [Outcome.APPLIED] * 4
    await refused(ErrorCode.INVALID_ARGUMENT, twice)
    await refused(ErrorCode.LIMIT_EXCEEDED, large)
    assert [record.resource for record in (await read_log(store)).records] == [f"vm/vm-{number}" for number in range(4)]


async def test_a_lease_that_is_gone_refuses_its_own_call_alone(ledger: Ledger, store: SqliteStore) -> None:
    lease_id = await store.grant_lease(30)
    await store.revoke_lease(lease_id)
    leased = ledger.apply(make_entry("leased"), [], [Put("leased", b"", lease_id)])
    before, outcome, behind = await asyncio.gather(_make(ledger, "a"), leased, _make(ledger, "b"))
    assert (before, outcome, behind) == (Outcome.APPLIED, Outcome.REFUSED, Outcome.APPLIED)
    assert len((await read_log(store)).records) == 2


async def test_calls_about_one_key_are_as_if_one_came_after_the_other(ledger: Ledger, store: SqliteStore) -> None:
    first, second, third = await asyncio.gather(
        _make(ledger, "first", key="k"),
        _make(ledger, "second", key="k"),
        ledger.apply(make_entry("third"), [Exists("k")], [Put("k", b"third")]),
    )
    assert (first, second, third) == (Outcome.APPLIED, Outcome.REFUSED, Outcome.APPLIED)
    found = await store.get("k")
    assert found is not None
    assert found.value == b"third"
    # Each looks at what the other writes: in one transaction both would see the state before.
    here, there = await asyncio.gather(
        ledger.apply(make_entry("here"), [Absent("there")], [Put("here", b"")]),
        ledger.apply(make_entry("there"), [Absent("here")], [Put("there", b"")]),
    )
    assert (here, there) == (Outcome.APPLIED, Outcome.REFUSED)
    assert await store.get("there") is None


async def test_no_batch_crosses_the_bound_of_a_segment(ledger: Ledger, store: SqliteStore) -> None:
    before = AUDIT_SEGMENT_RECORDS - 5
    await asyncio.gather(*(ledger.record(make_entry(str(number))) for number in range(before)))
    outcomes = await asyncio.gather(*(_make(ledger, f"k{number}") for number in range(12)))
    assert outcomes == [Outcome.APPLIED] * 12
    log = await read_log(store)
    assert len(log.records) == before + 12
    assert [(batch.first, len(batch.lines)) for batch in log.batches[-2:]] == [(before, 5), (AUDIT_SEGMENT_RECORDS, 7)]


async def test_a_member_that_goes_away_takes_nobodys_record_with_it(ledger: Ledger, store: SqliteStore) -> None:
    entries = [make_entry(name) for name in ("stays", "goes")]
    tasks = [asyncio.create_task(ledger.apply(entry, [], [Put(entry.resource, b"")])) for entry in entries]
    await asyncio.sleep(0)
    tasks[1].cancel()
    assert await tasks[0] is Outcome.APPLIED
    with pytest.raises(asyncio.CancelledError):
        await tasks[1]
    await ledger.close()
    assert all(entry.written for entry in entries)
    log = await read_log(store)
    assert [record.resource for record in log.records] == ["vm/stays", "vm/goes"]
    assert await store.get("vm/goes") is not None


async def test_closing_waits_for_what_is_being_written(ledger: Ledger, store: SqliteStore) -> None:
    task = asyncio.create_task(_make(ledger, "late"))
    await asyncio.sleep(0)
    await ledger.close()
    assert len((await read_log(store)).records) == 1
    assert await task is Outcome.APPLIED


async def test_a_later_ledger_goes_on_where_the_log_ended_and_time_never_runs_back(store: SqliteStore) -> None:
    for number, unix_ms in enumerate((1_000_000, 5_000_000, 3_000_000)):
        ledger = make_ledger(store, clock=ManualClock(unix_ms=unix_ms))
        assert await _make(ledger, f"vm-{number}") is Outcome.APPLIED
        assert await _make(ledger, f"vm-{number}") is Outcome.REFUSED
    log = await read_log(store)
    assert [record.time_unix_ms for record in log.records] == [1_000_000, 5_000_000, 5_000_000]


async def test_what_is_in_a_head_that_somebody_else_wrote_is_not_gone_on_from(store: SqliteStore) -> None:
    await _make(make_ledger(store), "vm-1")
    found = await store.get(keyspace.AUDIT_HEAD)
    assert found is not None
    altered = bytearray(found.value)
    altered[-1] ^= 1
    await store.txn([], [Put(keyspace.AUDIT_HEAD, bytes(altered))])
    await refused(ErrorCode.CORRUPT, _make(make_ledger(store), "vm-2"))
    assert await store.get("vm-2") is None


def _charge(tenant: int, bound: int, **changes: int) -> UsageChange:
    return UsageChange(tenant=tenant, quota=Quota(objects=bound), **changes)


async def test_a_quota_is_never_passed_and_what_one_gives_back_another_may_take(store: SqliteStore) -> None:
    ledgers = [make_ledger(store, seed=seed) for seed in range(2)]

    async def put(number: int) -> bool:
        entry = make_entry(f"object-{number}")
        try:
            charge = _charge(1, 10, objects=1, bytes=5)
            outcome = await ledgers[number % 2].apply(entry, [], [Put(entry.resource, b"")], charge)
        except HoldfastError as error:
            if error.code is not ErrorCode.QUOTA_EXCEEDED:
                raise
            return False
        assert outcome is Outcome.APPLIED
        return True

    assert sum(await asyncio.gather(*map(put, range(30)))) == 10
    assert len((await read_log(store)).records) == 10
    for ledger in ledgers:
        assert await ledger.usage(1) == Usage(bytes=50, objects=10)
        assert await ledger.usage(2) == Usage()
    assert not await put(98)
    back = _charge(1, 10, objects=-1, bytes=-50)
    assert await ledgers[1].apply(make_entry("forget"), [], [Delete("vm/object-0")], back) is Outcome.APPLIED
    # The first ledger's copy still says that there is no room.
    assert await put(100)
    assert await ledgers[0].usage(1) == Usage(bytes=5, objects=10)


async def test_usage_that_was_never_written_is_added_up_once(store: SqliteStore) -> None:
    ledger = make_ledger(store)
    counted: list[int] = []

    async def count(tenant: int) -> Usage:
        counted.append(tenant)
        return Usage(objects=tenant * 10)

    ledger._count_usage = count
    for number in range(3):
        await ledger.apply(make_entry(f"o{number}"), [], [Put(f"o{number}", b"")], _charge(2, 0, objects=1))
    assert await make_ledger(store).usage(2) == Usage(objects=23)
    assert counted == [2]


async def test_a_refused_call_charges_nothing(ledger: Ledger, store: SqliteStore) -> None:
    await store.txn([], [Put("taken", b"")])
    outcomes = await asyncio.gather(
        *(
            ledger.apply(make_entry(name), [Absent(name)], [Put(name, b"")], _charge(tenant, 0, vms=1))
            for name, tenant in (("a", 1), ("taken", 1), ("b", 1), ("c", 7))
        )
    )
    assert outcomes.count(Outcome.REFUSED) == 1
    assert [await ledger.usage(tenant) for tenant in (1, 7)] == [Usage(vms=2), Usage(vms=1)]


async def test_appends_are_counted(store: SqliteStore) -> None:
    registry = CollectorRegistry()
    ledger = make_ledger(store, registry=registry)
    denied = make_entry("denied")
    denied.outcome = ErrorCode.DENIED.name
    await asyncio.gather(_make(ledger, "a"), _make(ledger, "b"), ledger.record(denied))
    assert registry.get_sample_value("holdfast_audit_records_total", {"outcome": "OK"}) == 2
    assert registry.get_sample_value("holdfast_audit_records_total", {"outcome": "DENIED"}) == 1
    assert registry.get_sample_value("holdfast_audit_batch_records_count") == 1
    assert registry.get_sample_value("holdfast_audit_append_seconds_count") == 1


async def _compete(ledgers: list[Ledger], each: int) -> None:
    """Let every ledger append `each` times, with calls that come at their own pace and race for the same names."""

    async def client(ledger: Ledger, number: int) -> int:
        source = random.Random(number)
        won = 0
        for turn in range(5):
            await asyncio.sleep(source.random() * 0.005)
            name = f"{number % (each // 5)}.{turn}"
            entry = make_entry(name, by=str(number))
            entry.entry_id = source.randbytes(8).hex()
            outcome = await ledger.apply(entry, [Absent(f"made/{name}")], [Put(f"made/{name}", str(number).encode())])
            won += outcome is Outcome.APPLIED
            if outcome is Outcome.REFUSED:
                entry.repeated()
                await ledger.record(entry)
        return won

    clients = [(ledger, number) for number, ledger in enumerate(ledgers * (each // 5))]
    assert sum(await asyncio.gather(*(client(*one) for one in clients))) == each


async def _check_competition(log: Log, store: MetadataStore, each: int) -> None:
    """Check that every name was made by the one whose record says so, and that the others found it made."""
    assert len(log.records) == 2 * each
    assert len({record.entry_id for record in log.records}) == 2 * each
    made = {record.resource: record.details["by"] for record in log.records if record.outcome == "OK"}
    assert len(made) == sum(record.outcome == "OK" for record in log.records) == each
    for resource, by in made.items():
        found = await store.get("made/" + resource.removeprefix("vm/"))
        assert found is not None
        assert found.value.decode() == by


async def test_two_ledgers_over_one_store_keep_one_order(store: SqliteStore) -> None:
    ledgers = [make_ledger(store, clock=SystemClock(), seed=seed) for seed in range(2)]
    await _compete(ledgers, 200)
    await _check_competition(await read_log(store), store, 200)


class FarStore(FaultyStore):
    """A store far away: whatever is decided from what it says comes late."""

    async def txn(self, conditions: Sequence[Condition], operations: Sequence[Operation]) -> TxnResult:
        await asyncio.sleep(0.02)
        return await super().txn(conditions, operations)


async def test_a_ledger_far_from_the_store_gets_its_turn_beside_one_that_never_pauses(store: SqliteStore) -> None:
    near = make_ledger(store, clock=SystemClock(), seed=1)
    far = make_ledger(FarStore(store), clock=SystemClock(), seed=2)
    done = asyncio.Event()

    async def hog(number: int) -> int:
        turn = 0
        while not done.is_set():
            assert await _make(near, f"near-{number}.{turn}") is Outcome.APPLIED
            turn += 1
        return turn

    hogs = [asyncio.create_task(hog(number)) for number in range(3)]
    for number in range(5):
        assert await _make(far, f"far-{number}") is Outcome.APPLIED
    done.set()
    turns = await asyncio.gather(*hogs)
    assert min(turns) > 5
    assert len((await read_log(store)).records) == 5 + sum(turns)
    assert await store.get(keyspace.AUDIT_TURN) is None


@pytest.mark.slow
async def test_the_turn_of_a_ledger_that_died_is_taken_over(store: SqliteStore) -> None:
    await store.txn([], [Put(keyspace.AUDIT_TURN, b"the dead")])
    ledgers = [make_ledger(store, clock=SystemClock(), seed=seed) for seed in range(2)]
    outcomes = await asyncio.gather(*(_make(ledger, f"vm-{at}") for at, ledger in enumerate(ledgers)))
    assert list(outcomes) == [Outcome.APPLIED] * 2
    assert len((await read_log(store)).records) == 2
    assert await store.get(keyspace.AUDIT_TURN) is None


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with EtcdCluster(1, tmp_path_factory.mktemp("etcd")) as cluster:
        yield cluster


@pytest.mark.slow
async def test_two_ledgers_over_etcd_keep_one_order(etcd: EtcdCluster) -> None:
    async with opened_etcd(etcd.endpoints) as one, opened_etcd(etcd.endpoints) as other:
        counting = [FaultyStore(one), FaultyStore(other)]
        ledgers = [make_ledger(each, clock=SystemClock(), seed=seed) for seed, each in enumerate(counting)]
        await _compete(ledgers, 200)
        log = await read_log(one)
        await _check_competition(log, one, 200)
        assert len(log.batches) < 200
