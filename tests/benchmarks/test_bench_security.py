"""What security costs: the arithmetic on made-up turns, and that the open coordinator of the benchmark is open."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from benchmarks.contenders.secured import SETTINGS
from benchmarks.open_coordinator import OpenGuard, PlainLedger
from benchmarks.report import security_table
from benchmarks.results import FIRST, INCREMENTAL, StepFigures, median_of
from benchmarks.security import SecurityTurn, costs, median_setting
from holdfast_coordinator import keyspace
from holdfast_coordinator.audit.metrics import AuditMetrics
from holdfast_coordinator.transactions import Outcome
from holdfast_core.model.errors import HoldfastError
from holdfast_core.runtime.clock import ManualClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import Absent, Put
from tests.coordinator.ledgers import SIGNER, make_entry


def figures(done_s: float, cpu_s: float) -> StepFigures:
    """A step of so many seconds, a third of its CPU in the services."""
    return StepFigures(
        done_s=done_s,
        replicated_s=done_s,
        client_cpu_s=cpu_s * 2 / 3,
        server_cpu_s=cpu_s / 3,
        peak_rss_bytes=1,
        stored_bytes=1,
    )


def turn(setting: str, done_s: float, cpu_s: float = 3.0) -> SecurityTurn:
    """A turn whose incremental takes half of its first snapshot."""
    return SecurityTurn(setting, {FIRST: figures(done_s, cpu_s), INCREMENTAL: figures(done_s / 2, cpu_s)})


TURNS = [
    *(turn("off", seconds) for seconds in (9.0, 10.0, 30.0)),
    *(turn("on", seconds) for seconds in (10.5, 10.4, 40.0)),
    *(turn("tls", seconds, 3.6) for seconds in (9.0, 12.5, 13.0)),
]


def test_costs_are_ratios_of_medians_and_ten_percent_is_too_much() -> None:
    assert median_setting(TURNS, "off", FIRST).done_s == 10.0
    found = {(cost.step, cost.setting): cost for cost in costs(TURNS)}
    assert set(found) == {(step, setting) for step in (FIRST, INCREMENTAL) for setting in SETTINGS[1:]}
    assert found[FIRST, "on"].throughput == pytest.approx(10.0 / 10.5)
    assert found[FIRST, "on"].met
    assert found[FIRST, "tls"].throughput == pytest.approx(0.8)
    assert found[FIRST, "tls"].cpu == pytest.approx(1.2)
    assert not found[FIRST, "tls"].met
    assert not costs([turn("off", 9.0), turn("on", 10.0), turn("tls", 1.0)])[0].met


def test_the_table_has_a_verdict_for_each_cost() -> None:
    rows = [row for row in security_table(TURNS, costs(TURNS)).splitlines() if row.startswith("| first")]
    assert ["met: 4.8% lost" in row for row in rows] == [False, True, False]
    assert ["SHORT: 20.0% lost" in row for row in rows] == [False, False, True]
    assert ["9.00 to 30.00" in row for row in rows] == [True, False, False]
    faster = [turn("off", 10.0), turn("on", 9.0), turn("tls", 10.0)]
    assert security_table(faster, costs(faster)).count("met: nothing lost") == 4


def test_there_is_no_median_of_nothing() -> None:
    with pytest.raises(ValueError, match="median of nothing"):
        median_of([])


async def test_the_plain_ledger_applies_and_records_nothing() -> None:
    store = await SqliteStore.open(":memory:", ManualClock())
    ledger = PlainLedger(
        store,
        signer=lambda: SIGNER,
        clock=ManualClock(),
        random_bytes=bytes,
        metrics=AuditMetrics(CollectorRegistry()),
    )
    change = ([Absent("x/1")], [Put("x/1", b"one")])
    assert await ledger.apply(make_entry("one"), *change) is Outcome.APPLIED
    assert await ledger.apply(make_entry("one"), *change) is Outcome.REFUSED
    await ledger.record(make_entry("two"))
    kept = await store.get("x/1")
    assert kept is not None
    assert kept.value == b"one"
    assert await store.get(keyspace.AUDIT_HEAD) is None
    await store.close()


async def test_the_open_guard_knows_the_rules_all_the_same() -> None:
    async def tenant(name: str) -> None:
        raise AssertionError(name)

    guard = OpenGuard(tenant)  # type: ignore[arg-type]  # never asked for one
    with pytest.raises(HoldfastError, match="has no rule"):
        async with guard.enter("/holdfast.v1.StateService/Nothing", None):  # type: ignore[arg-type]  # nor looked at
            pass
