"""Retention: each point that stays has its reason, as a naive reading of the rules finds it."""

from __future__ import annotations

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast_core.model.dates import day_of, hour_of, month_of, second_of, week_of, year_of
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import RETENTION_COUNT_MAX
from holdfast_core.model.retention import NEWEST, check_rules, plan_retention, told_rules
from holdfast_proto.v1.records_pb2 import PointRecord, RetentionRules

NOW_MS = 1_790_000_000_000
FORMATS = {
    "keep_hourly": "%Y-%m-%d %H",
    "keep_daily": "%Y-%m-%d",
    "keep_weekly": "%G-%V",
    "keep_monthly": "%Y-%m",
    "keep_yearly": "%Y",
}
NAMES = ("keep_last", *FORMATS)


def moment(unix_ms: int) -> datetime.datetime:
    """A time as the standard library reads it."""
    return datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(milliseconds=unix_ms)


def at(text: str) -> int:
    """A time in UTC, in Unix milliseconds."""
    return round(datetime.datetime.fromisoformat(f"{text}+00:00").timestamp() * 1000)


def points_at(*times_unix_ms: int) -> list[PointRecord]:
    """Points made at these times, numbered in their order."""
    return [
        PointRecord(point_id=f"p{number}", number=number, created_unix_ms=time)
        for number, time in enumerate(times_unix_ms, start=1)
    ]


@st.composite
def histories(draw: st.DrawFn) -> list[PointRecord]:
    """Points minutes, days or months apart, some forgotten, made by a clock that also went back."""
    steps = st.one_of(st.integers(-7_200, 7_200), st.integers(0, 200_000), st.integers(0, 9_000_000))
    time_s = draw(st.integers(1_500_000_000, 1_790_000_000))
    points = []
    for number in range(1, draw(st.integers(0, 40)) + 1):
        time_s += draw(steps)
        points.append(
            PointRecord(
                point_id=f"p{number}",
                number=number,
                created_unix_ms=time_s * 1000 + draw(st.integers(0, 999)),
                forgotten=draw(st.integers(0, 5)) == 0,
            )
        )
    return points


rules_of_any_kind = st.builds(
    RetentionRules, **{name: st.one_of(st.just(0), st.integers(0, 12)) for name in NAMES}
).filter(lambda rules: any(getattr(rules, name) for name in NAMES))


def oracle(points: list[PointRecord], rules: RetentionRules) -> set[str]:
    """Ids that the rules keep, by looking at every pair."""
    living = [point for point in points if not point.forgotten]
    kept = set()
    for point in living:
        newer = [other for other in living if other.number > point.number]
        if len(newer) < rules.keep_last or not newer:
            kept.add(point.point_id)
        for name, form in FORMATS.items():

            def period(of: PointRecord, form: str = form) -> str:
                return moment(of.created_unix_ms).strftime(form)

            mine = period(point)
            later_periods = {period(other) for other in living if period(other) > mine}
            same = [other for other in living if period(other) == mine]
            newest = max(same, key=lambda other: (other.created_unix_ms, other.number))
            if newest is point and len(later_periods) < getattr(rules, name):
                kept.add(point.point_id)
    return kept


@pytest.mark.slow
@given(histories(), rules_of_any_kind)
def test_what_stays_is_what_each_rule_keeps(points: list[PointRecord], rules: RetentionRules) -> None:
    plan = plan_retention(points, rules, {}, {}, NOW_MS)
    living = {point.point_id for point in points if not point.forgotten}
    assert set(plan.kept) == oracle(points, rules)
    assert set(plan.kept) | set(plan.going) == living
    assert not set(plan.kept) & set(plan.going)


@given(histories(), rules_of_any_kind, st.sets(st.integers(1, 40)), st.sets(st.integers(1, 40)))
def test_what_is_locked_or_pinned_stays_and_applying_again_lets_nothing_more_go(
    points: list[PointRecord], rules: RetentionRules, locked: set[int], pinned: set[int]
) -> None:
    locks = {f"p{number}": NOW_MS + (1 if number % 2 else 0) for number in locked}
    pins = {f"p{number}": ["template of vm-2"] for number in pinned}
    plan = plan_retention(points, rules, locks, pins, NOW_MS)
    going = set(plan.going)
    assert not going & {point_id for point_id, until in locks.items() if until > NOW_MS}
    assert not going & pins.keys()
    left = [point for point in points if point.point_id not in going]
    again = plan_retention(left, rules, locks, pins, NOW_MS)
    assert again.going == ()
    assert again.points == tuple(point for point in plan.points if point.reasons)


@given(histories(), rules_of_any_kind, st.data())
def test_smaller_counts_keep_no_more(points: list[PointRecord], rules: RetentionRules, data: st.DataObject) -> None:
    fewer = RetentionRules(**{name: data.draw(st.integers(0, getattr(rules, name))) for name in NAMES})
    less = plan_retention(points, fewer, {}, {}, NOW_MS)
    assert set(less.kept) <= set(plan_retention(points, rules, {}, {}, NOW_MS).kept)
    if points and not all(point.forgotten for point in points):
        assert NEWEST in less.points[0].reasons


@given(histories())
def test_no_rules_keep_everything(points: list[PointRecord]) -> None:
    assert plan_retention(points, None, {}, {}, NOW_MS).going == ()


def test_each_point_that_stays_says_why() -> None:
    points = points_at(
        *(at(text) for text in ("2025-12-31 23:59:59", "2026-11-27 10:00", "2026-11-28 09:00")),
        *(at(text) for text in ("2026-11-28 22:30", "2026-11-29 08:00", "2026-11-29 18:23:35")),
    )
    rules = RetentionRules(keep_last=2, keep_hourly=1, keep_daily=2, keep_weekly=1, keep_monthly=1, keep_yearly=2)
    plan = plan_retention(points, rules, {"p3": at("2027-01-01")}, {"p2": ["template of web-2"]}, NOW_MS)
    assert [(point.point_id, point.reasons) for point in plan.points] == [
        (
            "p6",
            (
                *("last 1", "hourly 2026-11-29 18:00", "daily 2026-11-29", "weekly 2026-W48", "monthly 2026-11"),
                *("yearly 2026", NEWEST),
            ),
        ),
        ("p5", ("last 2",)),
        ("p4", ("daily 2026-11-28",)),
        ("p3", ("locked until 2027-01-01 00:00:00Z",)),
        ("p2", ("template of web-2",)),
        ("p1", ("yearly 2025",)),
    ]
    assert plan_retention(points, rules, {"p3": NOW_MS}, {}, NOW_MS).going == ("p2", "p3")


def test_rules_that_keep_nothing_or_too_much_are_refused() -> None:
    for rules, code in (
        (RetentionRules(), ErrorCode.INVALID_ARGUMENT),
        (RetentionRules(keep_daily=RETENTION_COUNT_MAX + 1), ErrorCode.LIMIT_EXCEEDED),
    ):
        with pytest.raises(HoldfastError) as caught:
            check_rules(rules)
        assert caught.value.code is code
    check_rules(RetentionRules(keep_yearly=1))
    assert told_rules(RetentionRules(keep_last=3, keep_weekly=4)) == "keep-last 3 keep-weekly 4"
    assert told_rules(None) == "keeps everything"


@given(st.integers(-62_135_596_800_000 + 86_400_000 * 400, 253_402_300_799_999))
def test_dates_are_those_of_the_standard_library(unix_ms: int) -> None:
    time = moment(unix_ms)
    iso = time.isocalendar()
    assert hour_of(unix_ms) == f"{time.date().isoformat()} {time.hour:02d}:00"
    assert day_of(unix_ms) == time.date().isoformat()
    assert week_of(unix_ms) == f"{iso.year:04d}-W{iso.week:02d}"
    assert month_of(unix_ms) == time.date().isoformat()[:7]
    assert year_of(unix_ms) == f"{time.year:04d}"
    assert second_of(unix_ms) == f"{time.date().isoformat()} {time:%H:%M:%S}Z"
