"""The event loop of the simulation: virtual time, one order for one seed, and no way to wait for ever unseen."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import Future

import pytest

from tests.sim.loop import Stuck, new_loop


def test_time_passes_only_where_somebody_waits_for_it() -> None:
    loop = new_loop()
    seen: list[tuple[str, float]] = []

    async def sleeper(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        seen.append((name, loop.time()))

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(sleeper("long", 86_400.0))
            group.create_task(sleeper("short", 0.5))
            group.create_task(sleeper("none", 0.0))

    loop.run_until_complete(main())
    assert seen == [("none", 0.0), ("short", 0.5), ("long", 86_400.0)]


def test_a_timeout_is_of_virtual_time() -> None:
    loop = new_loop()

    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30.0):
                await asyncio.sleep(31.0)
        return loop.time()

    assert loop.run_until_complete(main()) == 30.0


def test_threads_and_their_futures_are_at_once() -> None:
    loop = new_loop()

    async def main() -> list[object]:
        later: Future[int] = Future()
        loop.call_later(3.0, later.set_result, 7)
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 // 0)
        settled = await asyncio.wrap_future(later)
        return [await asyncio.to_thread(sum, [1, 2]), settled, loop.time()]

    assert loop.run_until_complete(main()) == [3, 7, 3.0]


def test_a_group_that_fails_cancels_in_the_order_of_births() -> None:
    loop = new_loop()
    ended: list[int] = []

    async def waiter(number: int) -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            ended.append(number)

    async def group_that_fails() -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(50):
                group.create_task(waiter(number))
            await asyncio.sleep(1)
            raise ValueError

    async def main() -> None:
        with pytest.raises(ExceptionGroup):
            await group_that_fails()

    loop.run_until_complete(main())
    assert ended == list(range(50))


def test_a_seed_decides_the_order_of_what_is_ready_at_once() -> None:
    def order(seed: int) -> list[int]:
        loop = new_loop(shuffled=random.Random(seed))
        ran: list[int] = []

        async def step(number: int) -> None:
            ran.append(number)

        async def main() -> None:
            async with asyncio.TaskGroup() as group:
                for number in range(20):
                    group.create_task(step(number))

        loop.run_until_complete(main())
        return ran

    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == list(range(20))


@pytest.mark.slow
def test_a_world_in_which_nothing_can_happen_any_more_is_told() -> None:
    loop = new_loop()

    async def main() -> None:
        await loop.create_future()

    with pytest.raises(Stuck):
        loop.run_until_complete(main())
