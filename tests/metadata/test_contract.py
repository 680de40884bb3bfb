"""What every metadata store promises, tried on each engine: the contract that coordinators rely on."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

import pytest

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import (
    METADATA_KEY_BYTES_MAX,
    METADATA_LEASE_TTL_S_MAX,
    METADATA_PAGE_ITEMS_MAX,
    METADATA_PREFIXES_MAX,
    METADATA_TXN_BYTES_MAX,
    METADATA_TXN_OPERATIONS_MAX,
    METADATA_VALUE_BYTES_MAX,
)
from holdfast_core.runtime.metadata.store import (
    OUTCOME_FACT,
    OUTCOME_UNAPPLIED,
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
    WatchBatch,
)
from tests.support.watches import next_batch


async def _put(store: MetadataStore, key: str, value: bytes = b"value") -> int:
    result = await store.txn([], [Put(key, value)])
    assert result.succeeded
    return result.revision


async def _delete(store: MetadataStore, key: str) -> int:
    return (await store.txn([], [Delete(key)])).revision


@contextlib.asynccontextmanager
async def _raises(code: ErrorCode) -> AsyncIterator[None]:
    with pytest.raises(HoldfastError) as caught:
        yield
    assert caught.value.code is code


class TestKeys:
    async def test_an_unknown_key_is_none(self, store: MetadataStore, prefix: str) -> None:
        assert await store.get(prefix + "nothing") is None

    async def test_revisions_tell_the_life_of_a_key(self, store: MetadataStore, prefix: str) -> None:
        key = prefix + "k"
        made = await _put(store, key, b"1")
        assert await store.get(key) == KeyValue(key, b"1", made, made)
        written = await _put(store, key, b"2")
        assert written > made
        assert await store.get(key) == KeyValue(key, b"2", made, written)
        await _delete(store, key)
        assert await store.get(key) is None
        made_again = await _put(store, key, b"3")
        assert await store.get(key) == KeyValue(key, b"3", made_again, made_again)

    @pytest.mark.parametrize("value", [b"", bytes(range(256)), b"x" * METADATA_VALUE_BYTES_MAX])
    async def test_values_are_any_bytes_up_to_the_limit(self, store: MetadataStore, prefix: str, value: bytes) -> None:
        await _put(store, prefix + "k", value)
        found = await store.get(prefix + "k")
        assert found is not None
        assert found.value == value

    async def test_a_key_may_have_any_text(self, store: MetadataStore, prefix: str) -> None:
        longest = prefix + "é" * ((METADATA_KEY_BYTES_MAX - len(prefix)) // 2)
        for key in (prefix + "a\x00b", prefix + "snow ☃ 😀", longest):
            await _put(store, key, key.encode())
            found = await store.get(key)
            assert found is not None
            assert (found.key, found.value) == (key, key.encode())


class TestTransactions:
    @pytest.mark.parametrize("exists", [True, False])
    async def test_conditions(self, store: MetadataStore, prefix: str, exists: bool) -> None:
        key = prefix + "k"
        made = await _put(store, key)
        written = await _put(store, key)
        if not exists:
            await _delete(store, key)
        expected: list[tuple[Condition, bool]] = [
            (Absent(key), not exists),
            (Exists(key), exists),
            (CreateRevisionIs(key, made), exists),
            (CreateRevisionIs(key, written), False),
            (CreateRevisionIs(key, 0), not exists),
            (ModRevisionIs(key, written), exists),
            (ModRevisionIs(key, made), False),
            (ModRevisionIs(key, 0), not exists),
        ]
        for condition, holds in expected:
            assert (await store.txn([condition], [])).succeeded is holds, condition

    async def test_all_conditions_must_hold(self, store: MetadataStore, prefix: str) -> None:
        before = await _put(store, prefix + "here")
        result = await store.txn(
            [Exists(prefix + "here"), Exists(prefix + "not here")], [Put(prefix + "new", b""), Delete(prefix + "here")]
        )
        assert (result.succeeded, result.revision) == (False, before)
        assert [item.key for item in (await store.snapshot([prefix])).items] == [prefix + "here"]

    async def test_operations_share_one_revision(self, store: MetadataStore, prefix: str) -> None:
        before = await _put(store, prefix + "old")
        result = await store.txn([], [Put(prefix + "a", b"1"), Put(prefix + "b", b"2"), Delete(prefix + "old")])
        assert (result.succeeded, result.revision) == (True, before + 1)
        listing = await store.snapshot([prefix])
        assert listing.revision == result.revision
        assert [(item.key, item.mod_revision) for item in listing.items] == [
            (prefix + "a", result.revision),
            (prefix + "b", result.revision),
        ]

    async def test_what_changes_nothing_makes_no_revision(self, store: MetadataStore, prefix: str) -> None:
        before = await _put(store, prefix + "k")
        for operations in ([], [Delete(prefix + "nothing")]):
            result = await store.txn([Exists(prefix + "k")], operations)
            assert (result.succeeded, result.revision) == (True, before)

    async def test_writing_the_same_value_is_a_change(self, store: MetadataStore, prefix: str) -> None:
        assert await _put(store, prefix + "k") < await _put(store, prefix + "k")

    async def test_a_compare_and_swap_has_one_winner(self, store: MetadataStore, prefix: str) -> None:
        key, tasks, rounds = prefix + "counter", 8, 5
        await _put(store, key, b"0")

        async def count() -> None:
            for _ in range(rounds):
                swapped = False
                while not swapped:
                    found = await store.get(key)
                    assert found is not None
                    value = str(int(found.value) + 1).encode()
                    swapped = (await store.txn([ModRevisionIs(key, found.mod_revision)], [Put(key, value)])).succeeded

        async with asyncio.TaskGroup() as group:
            for _ in range(tasks):
                group.create_task(count())
        found = await store.get(key)
        assert found is not None
        assert int(found.value) == tasks * rounds

    async def test_as_large_as_the_limits_allow(self, store: MetadataStore, prefix: str) -> None:
        keys = [f"{prefix}{number:03}".ljust(METADATA_KEY_BYTES_MAX, "k") for number in range(128)]
        assert len(keys) == METADATA_TXN_OPERATIONS_MAX
        left = METADATA_TXN_BYTES_MAX - 2 * len(keys) * METADATA_KEY_BYTES_MAX
        values = [b"x" * (left // len(keys))] * len(keys)
        result = await store.txn([Absent(key) for key in keys], [Put(*pair) for pair in zip(keys, values, strict=True)])
        assert result.succeeded
        assert len((await store.snapshot([prefix])).items) == METADATA_TXN_OPERATIONS_MAX

    async def test_a_cancelled_one_leaves_the_store_usable(self, store: MetadataStore, prefix: str) -> None:
        task = asyncio.create_task(store.txn([], [Put(prefix + "k", b"1")]))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await _put(store, prefix + "k", b"2")
        found = await store.get(prefix + "k")
        assert found is not None
        assert found.value == b"2"


class TestListings:
    async def test_prefixes_at_one_revision(self, store: MetadataStore, prefix: str) -> None:
        """A token that moves between two prefixes by transactions is in every listing of both exactly once."""
        here, there = prefix + "here/token", prefix + "there/token"
        await _put(store, here)
        done = asyncio.Event()

        async def move() -> None:
            source, target = here, there
            for _ in range(60):
                assert (await store.txn([Exists(source)], [Delete(source), Put(target, b"")])).succeeded
                source, target = target, source
            done.set()

        async with asyncio.TaskGroup() as group:
            group.create_task(move())
            while not done.is_set():
                listing = await store.snapshot([prefix + "here/", prefix + "there/"])
                assert len(listing.items) == 1
                assert listing.items[0].mod_revision <= listing.revision

    async def test_each_key_once_in_order_of_its_bytes(self, store: MetadataStore, prefix: str) -> None:
        names = ["", "/", "0", "a", "aa", "a\x00", "z", "é", "\uffff", "\U00010000"]
        for name in names:
            await _put(store, prefix + "n" + name)
        listing = await store.snapshot([prefix + "na", prefix, prefix + "n", prefix])
        assert [item.key.encode() for item in listing.items] == sorted((prefix + "n" + name).encode() for name in names)

    async def test_a_prefix_ends_where_it_ends(self, store: MetadataStore, prefix: str) -> None:
        for name in ("a", "a/1", "a/2", "a0", "b"):
            await _put(store, prefix + name)
        assert [item.key for item in (await store.snapshot([prefix + "a/"])).items] == [prefix + "a/1", prefix + "a/2"]

    async def test_the_empty_prefix_is_everything(self, store: MetadataStore, prefix: str) -> None:
        await _put(store, prefix + "k")
        assert prefix + "k" in {item.key for item in (await store.snapshot([""])).items}
        assert (await store.page("", after="", limit=1)).items

    async def test_pages(self, store: MetadataStore, prefix: str) -> None:
        keys = [f"{prefix}{number:02}" for number in range(10)]
        await store.txn([], [Put(key, b"") for key in keys])
        await _put(store, prefix.rstrip("/") + "0 sorts behind the prefix")
        seen: list[str] = []
        more = True
        while more:
            page = await store.page(prefix, after=seen[-1] if seen else "", limit=4)
            assert len(page.items) <= 4
            seen += [item.key for item in page.items]
            more = page.more
            assert more is (len(seen) < len(keys))
        assert seen == keys

    async def test_page_edges(self, store: MetadataStore, prefix: str) -> None:
        await store.txn([], [Put(prefix + "a", b""), Put(prefix + "b", b"")])
        exact = await store.page(prefix, after="", limit=2)
        assert ([item.key for item in exact.items], exact.more) == ([prefix + "a", prefix + "b"], False)
        for after, expected in (
            (prefix + "aa", [prefix + "b"]),
            (prefix + "b", []),
            (prefix + "zzz", []),
            (prefix + "\U0010ffff", []),
            ("~ behind the prefix", []),
            ("! before the prefix", [prefix + "a", prefix + "b"]),
        ):
            page = await store.page(prefix, after=after, limit=5)
            assert ([item.key for item in page.items], page.more) == (expected, False), after

    @pytest.mark.slow
    async def test_more_bytes_than_one_message_holds(self, store: MetadataStore, prefix: str) -> None:
        """20 MiB in one listing and one page, where a channel takes 16 MiB a message."""
        value = random.Random(1).randbytes(METADATA_VALUE_BYTES_MAX)
        for number in range(20):
            await _put(store, f"{prefix}{number:02}", value)
        listing = await store.snapshot([prefix])
        page = await store.page(prefix, after="", limit=19)
        assert [item.value for item in listing.items] == [value] * 20
        assert ([item.key for item in page.items], page.more) == ([item.key for item in listing.items[:19]], True)
        await store.txn([], [Delete(item.key) for item in listing.items])


class TestRefusals:
    """Both engines refuse the same things, before anything is done."""

    @pytest.mark.parametrize(
        ("operations", "code"),
        [
            ([Put("", b"")], ErrorCode.INVALID_ARGUMENT),
            ([Put("\ud800", b"")], ErrorCode.INVALID_ARGUMENT),
            ([Put("k" * (METADATA_KEY_BYTES_MAX + 1), b"")], ErrorCode.LIMIT_EXCEEDED),
            ([Put("k", b"x" * (METADATA_VALUE_BYTES_MAX + 1))], ErrorCode.LIMIT_EXCEEDED),
            ([Put("k", b"", -1)], ErrorCode.INVALID_ARGUMENT),
            ([Put("k", b""), Delete("k")], ErrorCode.INVALID_ARGUMENT),
            ([Delete("k"), Delete("k")], ErrorCode.INVALID_ARGUMENT),
            ([Delete(f"k{n}") for n in range(METADATA_TXN_OPERATIONS_MAX + 1)], ErrorCode.LIMIT_EXCEEDED),
            ([Put(f"k{n}", b"x" * (METADATA_TXN_BYTES_MAX // 2)) for n in range(2)], ErrorCode.LIMIT_EXCEEDED),
        ],
        ids=["no-key", "no-text", "long-key", "long-value", "lease", "twice", "deleted-twice", "many", "bytes"],
    )
    async def test_transactions(self, store: MetadataStore, operations: list[Operation], code: ErrorCode) -> None:
        async with _raises(code):
            await store.txn([], operations)

    async def test_too_many_conditions(self, store: MetadataStore) -> None:
        async with _raises(ErrorCode.LIMIT_EXCEEDED):
            await store.txn([Absent(f"k{n}") for n in range(METADATA_TXN_OPERATIONS_MAX + 1)], [])

    async def test_reads(self, store: MetadataStore) -> None:
        async with _raises(ErrorCode.INVALID_ARGUMENT):
            await store.get("")
        async with _raises(ErrorCode.INVALID_ARGUMENT):
            await store.snapshot([])
        async with _raises(ErrorCode.LIMIT_EXCEEDED):
            await store.snapshot(["p"] * (METADATA_PREFIXES_MAX + 1))
        async with _raises(ErrorCode.INVALID_ARGUMENT):
            await store.page("p", after="", limit=0)
        async with _raises(ErrorCode.LIMIT_EXCEEDED):
            await store.page("p", after="", limit=METADATA_PAGE_ITEMS_MAX + 1)
        async with _raises(ErrorCode.LIMIT_EXCEEDED):
            await anext(store.watch("p" * (METADATA_KEY_BYTES_MAX + 1)))

    async def test_lease_terms(self, store: MetadataStore) -> None:
        for ttl_s in (0.0, -1.0, float("nan")):
            async with _raises(ErrorCode.INVALID_ARGUMENT):
                await store.grant_lease(ttl_s)
        async with _raises(ErrorCode.LIMIT_EXCEEDED):
            await store.grant_lease(METADATA_LEASE_TTL_S_MAX + 1)

    async def test_a_closed_store(self, store: MetadataStore, prefix: str) -> None:
        await store.close()
        await store.close()
        with pytest.raises(HoldfastError) as caught:
            await store.txn([], [Put(prefix + "k", b"")])
        assert caught.value.code is ErrorCode.UNREACHABLE
        assert caught.value.facts[OUTCOME_FACT] == OUTCOME_UNAPPLIED
        async with _raises(ErrorCode.UNREACHABLE):
            await store.get(prefix + "k")


class TestWatches:
    async def test_a_listing_and_then_each_transaction_as_one_batch(self, store: MetadataStore, prefix: str) -> None:
        made = await _put(store, prefix + "a", b"1")
        async with contextlib.aclosing(store.watch(prefix)) as batches:
            listing = await next_batch(batches)
            assert listing == WatchBatch(made, (KeyValue(prefix + "a", b"1", made, made),), (), relisted=True)
            await _put(store, prefix.rstrip("/") + "0 elsewhere")
            first = await store.txn([], [Put(prefix + "a", b"2"), Put(prefix + "b", b"3")])
            second = await store.txn([], [Delete(prefix + "a"), Put(prefix.rstrip("/") + "0 elsewhere", b"")])
            third = await _put(store, prefix + "a", b"4")
            assert await next_batch(batches) == WatchBatch(
                first.revision,
                (
                    KeyValue(prefix + "a", b"2", made, first.revision),
                    KeyValue(prefix + "b", b"3", first.revision, first.revision),
                ),
                (),
            )
            assert await next_batch(batches) == WatchBatch(second.revision, (), (prefix + "a",))
            assert await next_batch(batches) == WatchBatch(third, (KeyValue(prefix + "a", b"4", third, third),), ())

    async def test_an_empty_prefix_watches_everything(self, store: MetadataStore, prefix: str) -> None:
        async with contextlib.aclosing(store.watch("")) as batches:
            assert (await next_batch(batches)).relisted
            revision = await _put(store, prefix + "k")
            batch = await next_batch(batches)
            assert (batch.revision, [item.key for item in batch.puts]) == (revision, [prefix + "k"])

    async def test_several_watchers_see_the_same(self, store: MetadataStore, prefix: str) -> None:
        async with contextlib.aclosing(store.watch(prefix)) as one, contextlib.aclosing(store.watch(prefix)) as other:
            assert await next_batch(one) == await next_batch(other)
            revisions = [await _put(store, f"{prefix}{number}") for number in range(50)]
            for batches in (one, other):
                assert [(await next_batch(batches)).revision for _ in revisions] == revisions

    async def test_nothing_falls_between_listing_and_changes(self, store: MetadataStore, prefix: str) -> None:
        """Watches that begin while others write see every key once, in the listing or in a change."""
        total = 40

        async def write() -> None:
            for number in range(total):
                await _put(store, f"{prefix}{number:02}")

        async def watch() -> list[str]:
            seen: list[str] = []
            async with contextlib.aclosing(store.watch(prefix)) as batches:
                while len(seen) < total:
                    seen += [item.key for item in (await next_batch(batches)).puts]
            return seen

        async with asyncio.TaskGroup() as group:
            group.create_task(write())
            watches = [group.create_task(watch()) for _ in range(5)]
        assert [task.result() for task in watches] == [[f"{prefix}{number:02}" for number in range(total)]] * 5

    @pytest.mark.parametrize("established", [True, False])
    async def test_closing_the_store_ends_it(self, store: MetadataStore, prefix: str, established: bool) -> None:
        batches = store.watch(prefix)
        assert (await next_batch(batches)).relisted
        if established:
            await _put(store, prefix + "k")
            await next_batch(batches)
        waiting = asyncio.create_task(next_batch(batches))
        await asyncio.sleep(0)
        await store.close()
        with pytest.raises(StopAsyncIteration):
            await waiting

    async def test_cancelling_the_watcher(self, store: MetadataStore, prefix: str) -> None:
        async with contextlib.aclosing(store.watch(prefix)) as batches:
            assert (await next_batch(batches)).relisted
            waiting = asyncio.create_task(next_batch(batches))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting


class TestLeases:
    async def test_a_key_ends_with_its_lease(self, store: MetadataStore, prefix: str) -> None:
        lease_id = await store.grant_lease(30)
        assert lease_id > 0
        await store.txn([], [Put(prefix + "a", b"", lease_id), Put(prefix + "b", b"", lease_id)])
        await store.txn([], [Put(prefix + "free", b"", lease_id)])
        await store.txn([], [Put(prefix + "free", b"")])
        found = await store.get(prefix + "a")
        assert found is not None
        assert found.lease_id == lease_id
        async with contextlib.aclosing(store.watch(prefix)) as batches:
            listing = await next_batch(batches)
            await store.revoke_lease(lease_id)
            batch = await next_batch(batches)
        assert (sorted(batch.deletes), batch.puts) == ([prefix + "a", prefix + "b"], ())
        assert batch.revision > listing.revision
        remaining = await store.snapshot([prefix])
        assert [(item.key, item.lease_id) for item in remaining.items] == [(prefix + "free", 0)]

    @pytest.mark.slow
    async def test_it_lapses_unless_it_is_kept(self, store: MetadataStore, prefix: str) -> None:
        """On real time: etcd's shortest term is 2 s."""
        kept, left = await store.grant_lease(2), await store.grant_lease(2)
        await store.txn([], [Put(prefix + "kept", b"", kept), Put(prefix + "left", b"", left)])
        gone = asyncio.Event()

        async def keep() -> None:
            while not gone.is_set():
                assert await store.keep_lease(kept) == 2
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(gone.wait(), 0.5)

        async with asyncio.TaskGroup() as group:
            group.create_task(keep())
            async with contextlib.aclosing(store.watch(prefix)) as batches:
                assert len((await next_batch(batches)).puts) == 2
                assert (await next_batch(batches)).deletes == (prefix + "left",)
            gone.set()
        assert [item.key for item in (await store.snapshot([prefix])).items] == [prefix + "kept"]
        async with _raises(ErrorCode.NOT_FOUND):
            await store.keep_lease(left)
        await store.revoke_lease(kept)

    async def test_how_long_it_lasts(self, store: MetadataStore) -> None:
        lease_id = await store.grant_lease(30)
        assert 27 <= await store.lease_left(lease_id) <= 30
        assert await store.keep_lease(lease_id) == 30
        await store.revoke_lease(lease_id)

    async def test_one_that_has_ended(self, store: MetadataStore, prefix: str) -> None:
        lease_id = await store.grant_lease(30)
        await store.revoke_lease(lease_id)
        await store.revoke_lease(lease_id)
        async with _raises(ErrorCode.NOT_FOUND):
            await store.keep_lease(lease_id)
        async with _raises(ErrorCode.NOT_FOUND):
            await store.lease_left(lease_id)
        failed = await store.txn([Exists(prefix + "nothing")], [Put(prefix + "k", b"", lease_id)])
        assert not failed.succeeded
        with pytest.raises(HoldfastError) as caught:
            await store.txn([], [Put(prefix + "other", b""), Put(prefix + "k", b"", lease_id)])
        assert (caught.value.code, caught.value.facts[OUTCOME_FACT]) == (ErrorCode.NOT_FOUND, OUTCOME_UNAPPLIED)
        assert (await store.snapshot([prefix])).items == ()

    async def test_a_new_life_of_a_key_is_not_bound_to_the_old_lease(self, store: MetadataStore, prefix: str) -> None:
        lease_id = await store.grant_lease(30)
        await store.txn([], [Put(prefix + "k", b"old", lease_id)])
        await _delete(store, prefix + "k")
        await _put(store, prefix + "k", b"new")
        await store.revoke_lease(lease_id)
        found = await store.get(prefix + "k")
        assert found is not None
        assert found.value == b"new"
