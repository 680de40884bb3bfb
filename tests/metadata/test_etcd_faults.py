"""The etcd engine when members die, connections break, history goes and quorum is lost."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import pytest
from google.protobuf.message import Message

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.metadata.etcd import EtcdStore
from holdfast_core.runtime.metadata.etcd_client import EtcdClient, Method
from holdfast_core.runtime.metadata.store import (
    OUTCOME_FACT,
    OUTCOME_UNAPPLIED,
    OUTCOME_UNKNOWN,
    Absent,
    ModRevisionIs,
    Put,
    WatchBatch,
)
from holdfast_proto.v1 import etcd_pb2 as pb
from tests.support.etcd import EtcdCluster, free_ports, opened_etcd
from tests.support.proxy import TcpProxy
from tests.support.watches import next_batch

_SOON_S = 30.0

_RequestT = TypeVar("_RequestT", bound=Message)
_ResponseT = TypeVar("_ResponseT", bound=Message)


async def _eventually(condition: Callable[[], Awaitable[bool]], *, what: str) -> None:
    """Poll until the condition holds: what it asks about happens in other processes."""
    deadline_s = time.monotonic() + _SOON_S
    while not await condition():
        assert time.monotonic() < deadline_s, f"no {what} within {_SOON_S} s"
        await asyncio.to_thread(time.sleep, 0.02)


@contextlib.asynccontextmanager
async def _proxy_and_spare(cluster: EtcdCluster) -> AsyncIterator[tuple[TcpProxy, TcpProxy]]:
    """Two ways to the same member; the second is cut at first, so that a client settles on the first."""
    async with TcpProxy(cluster.endpoints[0]) as proxy, TcpProxy(cluster.endpoints[0]) as spare:
        spare.cut()
        yield proxy, spare


class _Writer:
    """Counts up a counter by compare-and-swap; each step also leaves a key of its own, in the same transaction.

    A step whose outcome is unknown is repeated under the same conditions, or found to be done: never blindly.
    """

    def __init__(self, store: EtcdStore, prefix: str, name: str) -> None:
        self._store = store
        self._prefix = prefix
        self._name = name
        self.acknowledged: list[str] = []
        self.unknown = 0

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            await self._step(f"{self._prefix}log/{self._name}-{len(self.acknowledged):04}")

    async def _step(self, log_key: str) -> None:
        counter_key = f"{self._prefix}counter"
        while True:
            try:
                counter, done = await self._store.get(counter_key), await self._store.get(log_key)
                if done is not None:
                    break
                assert counter is not None
                result = await self._store.txn(
                    [ModRevisionIs(counter_key, counter.mod_revision), Absent(log_key)],
                    [Put(counter_key, str(int(counter.value) + 1).encode()), Put(log_key, b"")],
                )
                if result.succeeded:
                    break
            except HoldfastError as error:
                if error.code is not ErrorCode.UNREACHABLE:
                    raise
                self.unknown += error.facts[OUTCOME_FACT] == OUTCOME_UNKNOWN
        self.acknowledged.append(log_key)


@pytest.mark.slow
async def test_a_rolling_kill_of_all_members_loses_and_doubles_nothing(three_etcds: EtcdCluster, prefix: str) -> None:
    stop, batches = asyncio.Event(), list[WatchBatch]()
    async with opened_etcd(three_etcds.endpoints) as store:
        await store.txn([], [Put(prefix + "counter", b"0")])
        writers = [_Writer(store, prefix, name) for name in "ab"]

        async def progress() -> None:
            marks = [len(writer.acknowledged) + 10 for writer in writers]

            async def passed() -> bool:
                return all(len(writer.acknowledged) >= mark for writer, mark in zip(writers, marks, strict=True))

            await _eventually(passed, what="progress of the writers")

        async with asyncio.TaskGroup() as group:

            async def watch() -> None:
                async for batch in store.watch(prefix):
                    batches.append(batch)

            watching = group.create_task(watch())
            tasks = [group.create_task(writer.run(stop)) for writer in writers]
            for position in range(3):
                await progress()
                three_etcds.kill(position)
                await progress()
                three_etcds.restart(position)
                await asyncio.to_thread(three_etcds.wait_healthy)
            await progress()
            stop.set()
            await asyncio.wait(tasks)
            final = await store.snapshot([prefix])

            async def caught_up() -> bool:
                return batches[-1].revision >= final.revision

            await _eventually(caught_up, what="catching up of the watch")
            watching.cancel()

    acknowledged = sorted(key for writer in writers for key in writer.acknowledged)
    logged = [item.key for item in final.items if item.key.startswith(prefix + "log/")]
    (counter,) = [item for item in final.items if item.key == prefix + "counter"]
    assert logged == acknowledged
    assert int(counter.value) == len(acknowledged)
    assert [batch.relisted for batch in batches] == [True] + [False] * (len(batches) - 1)
    revisions = [batch.revision for batch in batches]
    assert revisions == sorted(set(revisions))
    seen = [item.key for batch in batches for item in batch.puts if item.key.startswith(prefix + "log/")]
    assert sorted(seen) == acknowledged


async def test_a_lost_watch_goes_on_from_its_revision(one_etcd: EtcdCluster, prefix: str) -> None:
    async with (
        TcpProxy(one_etcd.endpoints[0]) as proxy,
        opened_etcd([proxy.address]) as watcher,
        opened_etcd(one_etcd.endpoints) as writer,
        contextlib.aclosing(watcher.watch(prefix)) as batches,
    ):
        assert (await next_batch(batches)).relisted
        revisions = [(await writer.txn([], [Put(prefix + "k", b"0")])).revision]
        assert (await next_batch(batches)).revision == revisions[0]
        for _ in range(3):
            proxy.cut()
            missed = [(await writer.txn([], [Put(prefix + "k", b"1")])).revision for _ in range(3)]
            proxy.mend()
            got = [await next_batch(batches) for _ in missed]
            assert [(batch.revision, batch.relisted) for batch in got] == [(revision, False) for revision in missed]


async def test_a_compacted_watch_lists_again_and_goes_on_behind_the_listing(one_etcd: EtcdCluster, prefix: str) -> None:
    async with (
        TcpProxy(one_etcd.endpoints[0]) as proxy,
        opened_etcd([proxy.address]) as watcher,
        opened_etcd(one_etcd.endpoints) as writer,
        contextlib.aclosing(watcher.watch(prefix)) as batches,
    ):
        await next_batch(batches)
        await writer.txn([], [Put(prefix + "gone", b""), Put(prefix + "kept", b"1")])
        await next_batch(batches)
        proxy.cut()
        newest = 0
        for value in (b"2", b"3"):
            newest = (await writer.txn([], [Put(prefix + "kept", value)])).revision
        await asyncio.to_thread(one_etcd.ctl, "del", prefix + "gone")
        await asyncio.to_thread(one_etcd.ctl, "compaction", "--physical", str(newest + 1))
        proxy.mend()
        listing = await next_batch(batches)
        assert listing.relisted
        assert listing.revision >= newest + 1
        assert [(item.key, item.value) for item in listing.puts] == [(prefix + "kept", b"3")]
        later = [(await writer.txn([], [Put(prefix + "kept", b"4")])).revision for _ in range(3)]
        got = [await next_batch(batches) for _ in later]
        assert [(batch.revision, batch.relisted) for batch in got] == [(revision, False) for revision in later]


async def test_more_missed_bytes_than_one_message_holds(one_etcd: EtcdCluster, prefix: str) -> None:
    """A watch that was away catches up on 20 MiB, which etcd has to cut into fragments."""
    value = b"x" * (1 << 20)
    async with (
        TcpProxy(one_etcd.endpoints[0]) as proxy,
        opened_etcd([proxy.address]) as watcher,
        opened_etcd(one_etcd.endpoints) as writer,
        contextlib.aclosing(watcher.watch(prefix)) as batches,
    ):
        await next_batch(batches)
        proxy.cut()
        missed = [
            (await writer.txn([], [Put(prefix + "k", value), Put(prefix + "l", b"")])).revision for _ in range(20)
        ]
        proxy.mend()
        got = [await next_batch(batches) for _ in missed]
    assert [(batch.revision, len(batch.puts)) for batch in got] == [(revision, 2) for revision in missed]


class _CompactingClient(EtcdClient):
    """Compacts the cluster behind the first page that it reads."""

    compact: Callable[[], Awaitable[None]] | None = None

    async def call(self, method: Method[_RequestT, _ResponseT], request: _RequestT) -> _ResponseT:
        response = await super().call(method, request)
        if isinstance(request, pb.RangeRequest) and self.compact is not None:
            compact, self.compact = self.compact, None
            await compact()
        return response


async def test_a_listing_that_is_compacted_on_the_way_begins_again(one_etcd: EtcdCluster, prefix: str) -> None:
    client = _CompactingClient(one_etcd.endpoints)
    store = EtcdStore(client)
    try:
        for number in range(0, 1100, 100):
            await store.txn([], [Put(f"{prefix}{at:04}", b"") for at in range(number, number + 100)])

        async def compact() -> None:
            newest = (await store.txn([], [Put(prefix + "0000", b"new")])).revision
            await asyncio.to_thread(one_etcd.ctl, "compaction", "--physical", str(newest))

        client.compact = compact
        listing = await store.snapshot([prefix])
        assert (len(listing.items), listing.items[0].value) == (1100, b"new")
    finally:
        await store.close()


async def test_a_transaction_whose_answer_is_lost_is_never_sent_again(one_etcd: EtcdCluster, prefix: str) -> None:
    """A second endpoint stands ready; a blind retry there would find the condition broken and answer "no"."""
    async with (
        _proxy_and_spare(one_etcd) as (proxy, spare),
        opened_etcd(one_etcd.endpoints) as direct,
        opened_etcd([proxy.address, spare.address]) as store,
    ):
        spare.mend()
        proxy.swallow_answers = True

        async def applied() -> bool:
            return await direct.get(prefix + "k") is not None

        sending = asyncio.create_task(store.txn([Absent(prefix + "k")], [Put(prefix + "k", b"once")]))
        await _eventually(applied, what="application of the transaction")
        proxy.cut()
        with pytest.raises(HoldfastError) as caught:
            await sending
        assert caught.value.code is ErrorCode.UNREACHABLE
        assert caught.value.facts[OUTCOME_FACT] == OUTCOME_UNKNOWN
        found = await store.get(prefix + "k")
        assert found is not None
        assert (found.value, found.create_revision) == (b"once", found.mod_revision)


async def test_a_read_goes_to_the_next_endpoint(one_etcd: EtcdCluster, prefix: str) -> None:
    async with (
        _proxy_and_spare(one_etcd) as (proxy, spare),
        opened_etcd([proxy.address, spare.address], attempt_timeout_s=0.5) as store,
    ):
        await store.txn([], [Put(prefix + "k", b"")])
        spare.mend()
        proxy.swallow_answers = True
        assert await store.get(prefix + "k") is not None
        lease_id = await store.grant_lease(30)
        assert await store.keep_lease(lease_id) == 30
        await store.revoke_lease(lease_id)


async def test_nobody_there(prefix: str) -> None:
    (port,) = free_ports(1)
    began_s = time.monotonic()
    with pytest.raises(HoldfastError) as caught:
        await EtcdStore.open([f"127.0.0.1:{port}"], call_timeout_s=1.0)
    assert caught.value.code is ErrorCode.UNREACHABLE
    assert caught.value.facts[OUTCOME_FACT] == OUTCOME_UNAPPLIED
    assert f"127.0.0.1:{port}" in caught.value.message
    assert time.monotonic() - began_s < 5


@pytest.mark.slow
async def test_without_quorum_calls_fail_in_time_and_then_recover(three_etcds: EtcdCluster, prefix: str) -> None:
    timeout_s = 3.0
    async with (
        opened_etcd(three_etcds.endpoints, call_timeout_s=timeout_s, attempt_timeout_s=1.0) as store,
        contextlib.aclosing(store.watch(prefix)) as batches,
    ):
        await store.txn([], [Put(prefix + "k", b"1")])
        await next_batch(batches)
        for position in (0, 1):
            three_etcds.kill(position)
        began_s = time.monotonic()
        results = await asyncio.gather(
            store.get(prefix + "k"),
            store.snapshot([prefix]),
            store.grant_lease(30),
            store.txn([], [Put(prefix + "k", b"2")]),
            return_exceptions=True,
        )
        assert time.monotonic() - began_s < 2 * timeout_s
        assert [result.code for result in results if isinstance(result, HoldfastError)] == [ErrorCode.UNREACHABLE] * 4
        for position in (0, 1):
            three_etcds.restart(position)
        await asyncio.to_thread(three_etcds.wait_healthy)
        newest = (await store.txn([], [Put(prefix + "k", b"3")])).revision
        while (batch := await next_batch(batches)).revision < newest:
            assert [item.key for item in batch.puts] == [prefix + "k"]
        assert [item.value for item in batch.puts] == [b"3"]


@pytest.mark.slow
async def test_a_member_that_hangs_is_left(three_etcds: EtcdCluster, prefix: str) -> None:
    """Its connections stay open, so only time tells."""
    async with opened_etcd(three_etcds.endpoints, attempt_timeout_s=1.0) as store:
        await store.txn([], [Put(prefix + "k", b"")])
        three_etcds.pause(0)
        try:
            began_s = time.monotonic()
            assert await store.get(prefix + "k") is not None
            assert time.monotonic() - began_s < 8
        finally:
            three_etcds.resume(0)
            await asyncio.to_thread(three_etcds.wait_healthy)


async def test_a_scan_whose_revision_is_compacted_says_so(one_etcd: EtcdCluster, prefix: str) -> None:
    async with opened_etcd(one_etcd.endpoints) as store:
        for number in range(4):
            await store.txn([], [Put(f"{prefix}{number}", b"v")])
        async with contextlib.aclosing(store.scan([prefix], page_items=2)) as scan:
            first = await anext(scan)
            newest = (await store.txn([], [Put(prefix + "0", b"w")])).revision
            await asyncio.to_thread(one_etcd.ctl, "compaction", "--physical", str(newest))
            with pytest.raises(HoldfastError) as caught:
                await anext(scan)
        assert caught.value.code is ErrorCode.CONFLICT
        assert str(first.revision) in caught.value.message
        assert len([item async for page in store.scan([prefix], page_items=2) for item in page.items]) == 4
