"""Single blocks: rot and what a read missed is fetched at once, and rot is looked for."""

from __future__ import annotations

from holdfast_core.runtime.background import Worker
from holdfast_storagenode.healing.repair import QUEUE_MAX, RECHECK_S
from holdfast_storagenode.healing.scrub import step_s
from holdfast_storagenode.healing.workers import Healing, HealingOptions
from holdfast_storagenode.store import Found, Verdict
from tests.storagenode.blocks import make_block, make_blocks
from tests.storagenode.fleet import Fleet, capability, everywhere, table

BLOCKS = make_blocks(20)
IDS = [block.id for block in BLOCKS]


def verdicts(found: list[Found]) -> list[Verdict]:
    return [item if isinstance(item, Verdict) else Verdict.OK for item in found]


async def fleet_of_three(options: HealingOptions | None = None) -> Fleet:
    fleet = Fleet("a", "b", "c", options=options)
    fleet.tell(everywhere(1, ["a", "b", "c"]))
    await fleet.beat()
    return fleet


async def work(fleet: Fleet, worker: Worker, steps: int = 5) -> None:
    for _ in range(steps):
        await fleet.step(worker)


async def test_rot_that_a_read_finds_is_healed_from_a_peer() -> None:
    fleet = await fleet_of_three()
    await fleet.put("abc", BLOCKS)
    fleet["a"].store.overwrite(1, IDS[0], BLOCKS[0].data[:-1] + b"?")
    _, told = await fleet["a"].core.get(capability(), IDS[:1], verdicts)
    assert told == [Verdict.CORRUPT]
    await work(fleet, fleet["a"].repair)
    _, told = await fleet["a"].core.get(capability(), IDS[:1], verdicts)
    assert told == [Verdict.OK]
    healing = fleet["a"].core.healing
    assert (healing.repaired_blocks, fleet["a"].store.status().quarantined_count) == (1, 0)


async def test_rot_that_was_there_at_the_start_is_healed() -> None:
    fleet = await fleet_of_three()
    await fleet.put("abc", BLOCKS)
    fleet["a"].store.overwrite(1, IDS[0], b"rot")
    fleet["a"].store.has(1, IDS, verify=True)
    await work(fleet, fleet["a"].repair)
    assert fleet["a"].store.status().quarantined_count == 0


async def test_a_read_that_misses_a_block_brings_it() -> None:
    fleet = await fleet_of_three()
    await fleet.put("ab", BLOCKS)
    _, told = await fleet["c"].core.get(capability(), IDS[:2], verdicts)
    assert told == [Verdict.MISSING] * 2
    await work(fleet, fleet["c"].repair)
    assert fleet["c"].ids() == set(IDS[:2])


async def test_a_block_of_others_is_not_fetched() -> None:
    fleet = Fleet("a", "b", "c")
    fleet.tell(table(1, [("a", "b")] * 8, nodes=["a", "b", "c"]))
    await fleet.beat()
    await fleet.put("ab", BLOCKS)
    await fleet["c"].core.get(capability(), IDS, verdicts)
    await work(fleet, fleet["c"].repair)
    assert fleet.calls == []


async def test_what_nobody_has_is_asked_for_once_and_counted_where_it_was_here() -> None:
    fleet = await fleet_of_three()
    await fleet.put("a", BLOCKS[:1])
    fleet["a"].store.overwrite(1, IDS[0], b"rot")
    await fleet["a"].core.get(capability(), IDS[:2], verdicts)
    await work(fleet, fleet["a"].repair)
    assert set(fleet["a"].core.healing.unrepaired_since()) == {(1, IDS[0])}, "the other one may never have been"
    asked = len(fleet.calls)
    assert asked
    for _ in range(50):
        await fleet["a"].core.get(capability(), IDS[:2], verdicts)
        await work(fleet, fleet["a"].repair, 1)
    assert len(fleet.calls) == asked
    await fleet.put("a", BLOCKS[:1])
    fleet.clock.advance(RECHECK_S)
    await work(fleet, fleet["a"].repair)
    assert fleet["a"].core.healing.unrepaired_count == 0


async def test_wrong_bytes_are_asked_for_elsewhere() -> None:
    fleet = await fleet_of_three()
    await fleet.put("abc", BLOCKS[:1])
    fleet["a"].store.overwrite(1, IDS[0], b"rot")
    fleet.meddle = lambda node, _, item: b"\x00" * 200 if node == "b" else item
    await fleet["a"].core.get(capability(), IDS[:1], verdicts)
    await work(fleet, fleet["a"].repair)
    assert fleet["a"].ids() == {IDS[0]}
    assert fleet["a"].core.healing.wrong_blocks == 1


async def test_a_read_of_what_a_collection_removed_brings_nothing_back() -> None:
    fleet = await fleet_of_three()
    fleet.epoch = 2
    await fleet.beat()
    await fleet.put("abc", BLOCKS[:1], stamp=1)
    await fleet["a"].core.delete(capability(), IDS[:1], cutoff=3)
    await fleet["a"].core.get(capability(), IDS[:1], verdicts)
    await work(fleet, fleet["a"].repair)
    assert fleet["a"].ids() == set()


async def test_a_corrupt_copy_that_a_collection_removed_is_missed_no_more() -> None:
    fleet = await fleet_of_three()
    fleet.epoch = 2
    await fleet.beat()
    await fleet.put("a", BLOCKS[:2], stamp=1)
    for block in BLOCKS[:2]:
        fleet["a"].store.overwrite(1, block.id, b"rot")
    await fleet["a"].core.get(capability(), IDS[:2], verdicts)
    await work(fleet, fleet["a"].repair)
    assert fleet["a"].core.healing.unrepaired_count == 2
    assert await fleet["a"].core.delete(capability(), IDS[:1], cutoff=3) == [Verdict.OK]
    assert set(fleet["a"].core.healing.unrepaired_since()) == {(1, IDS[1])}
    fleet.clock.advance(RECHECK_S)
    await work(fleet, fleet["a"].repair)
    assert set(fleet["a"].core.healing.unrepaired_since()) == {(1, IDS[1])}


async def test_the_queue_is_bounded() -> None:
    fleet = await fleet_of_three()
    fleet["a"].healing.repair.add(1, [number.to_bytes(32, "big") for number in range(2 * QUEUE_MAX)])
    assert fleet["a"].healing.repair.status() == {"queued": QUEUE_MAX}


async def test_a_scrub_finds_rot_and_the_repair_heals_it() -> None:
    fleet = await fleet_of_three(HealingOptions(gentleness=0.0, scrub_period_s=1000))
    await fleet.put("abc", BLOCKS)
    await fleet.put("abc", make_blocks(100, first=500))
    fleet["a"].store.overwrite(1, IDS[5], BLOCKS[5].data[:-1] + b"?")
    healing = fleet["a"].core.healing
    pauses = [await fleet["a"].scrub.step()]
    assert 0 < healing.scrub_permille < 1000
    while healing.scrubbed_unix_ms == 0:
        fleet.clock.advance(pauses[-1])
        pauses.append(await fleet["a"].scrub.step())
    assert healing.scrubbed_unix_ms == fleet.clock.now_unix_ms()
    await work(fleet, fleet["a"].repair)
    assert fleet["a"].store.has(1, IDS, verify=True) == [Verdict.OK] * 20
    assert fleet["a"].store.status().quarantined_count == 0


async def test_a_scrub_takes_its_period_and_the_next_waits_for_its_time() -> None:
    period_s = 1000.0
    fleet = await fleet_of_three(HealingOptions(gentleness=0.0, scrub_period_s=period_s))
    await fleet.put("a", make_blocks(2000, size=10))
    began_s, rounds = fleet.clock.monotonic_s(), 0
    ends_s: list[float] = []
    while fleet.clock.monotonic_s() < began_s + 2.5 * period_s:
        before = fleet["a"].core.healing.scrubbed_unix_ms
        fleet.clock.advance(max(0.01, await fleet["a"].scrub.step()))
        if fleet["a"].core.healing.scrubbed_unix_ms != before:
            rounds += 1
            ends_s.append(fleet.clock.monotonic_s() - began_s)
    assert rounds == 2
    assert 0.8 * period_s < ends_s[0] <= period_s
    assert 1.8 * period_s < ends_s[1] <= 2 * period_s


async def test_a_scrub_goes_on_where_it_was_after_a_restart() -> None:
    fleet = await fleet_of_three(HealingOptions(gentleness=0.0, scrub_period_s=100_000))
    await fleet.put("a", make_blocks(300, size=10))
    node = fleet["a"]
    for _ in range(3):
        fleet.clock.advance(max(61.0, await node.scrub.step()))
    read = node.home.load_scrub().read_blocks
    assert 0 < read < 300
    seen: list[bytes] = []
    real = node.store.has

    def has(tenant: int, ids: list[bytes], *, verify: bool = False, stamp: int = 0) -> list[Verdict]:
        seen.extend(ids if verify else [])
        return real(tenant, ids, verify=verify, stamp=stamp)

    node.store.has = has  # type: ignore[method-assign, assignment]
    again = Healing(
        node.core,
        node.home,
        fleet.peers_of("a"),
        fresh_epoch=fleet.fresh_epoch_of("a"),
        clock=fleet.clock,
        log=fleet.log,
        options=HealingOptions(scrub_period_s=100_000),
    ).workers[2]
    while node.core.healing.scrubbed_unix_ms == 0:
        fleet.clock.advance(await again.step())
    assert len(seen) == 300 - read
    assert node.home.load_scrub().last_began_unix_ms > 0


def test_a_step_takes_its_share_of_the_period() -> None:
    assert step_s(period_s=1000, blocks=10, all_blocks=100) == 90
    assert step_s(period_s=1000, blocks=10, all_blocks=0) == 900


async def test_a_scrub_of_nothing_waits() -> None:
    fleet = await fleet_of_three(HealingOptions(gentleness=0.0, scrub_period_s=1000))
    await fleet["a"].scrub.step()
    assert await fleet["a"].scrub.step() >= 60.0
    assert make_block(1).id not in fleet["a"].ids()
