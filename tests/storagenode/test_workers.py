"""The crossing into threads: what a function returns, raises or still has to find out arrives, whoever still waits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_storagenode.workers import Workers


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers()
    yield made
    made.close()


async def test_a_result_that_comes_later_is_waited_for(workers: Workers) -> None:
    later: Future[str] = Future()
    begun = threading.Event()

    def begin(name: str) -> Future[str]:
        assert name == "batch"
        begun.set()
        return later

    waiting = asyncio.ensure_future(workers.run_and_settle(begin, "batch"))
    await workers.run(begun.wait)
    assert not waiting.done()
    later.set_result("durable")
    assert await waiting == "durable"


async def test_a_result_that_is_there_already_arrives(workers: Workers) -> None:
    done: Future[int] = Future()
    done.set_result(7)
    assert await workers.run_and_settle(lambda: done) == 7


async def test_an_error_arrives_from_before_the_future_and_from_in_it(workers: Workers) -> None:
    def refuse() -> Future[None]:
        raise HoldfastError(ErrorCode.CORRUPT, "before")

    failed: Future[None] = Future()
    failed.set_exception(HoldfastError(ErrorCode.DISK_FULL, "in it"))
    with pytest.raises(HoldfastError, match="before"):
        await workers.run_and_settle(refuse)
    with pytest.raises(HoldfastError, match="in it"):
        await workers.run_and_settle(lambda: failed)


async def test_what_was_begun_ends_though_nobody_waits_any_more(
    workers: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    later: Future[str] = Future()
    begun = threading.Event()

    def begin() -> Future[str]:
        begun.set()
        return later

    waiting = asyncio.ensure_future(workers.run_and_settle(begin))
    await workers.run(begun.wait)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    later.set_result("durable")
    assert await workers.run(later.result) == "durable"
    assert not caplog.records, "nothing was at a loss where to put the result"
