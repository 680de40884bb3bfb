"""The part of the contract that reads many keys at one revision, page by page, on each engine."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import METADATA_PAGE_ITEMS_MAX
from holdfast_core.runtime.metadata.store import Delete, MetadataStore, Put


async def _put(store: MetadataStore, key: str, value: bytes = b"value") -> int:
    return (await store.txn([], [Put(key, value)])).revision


@contextlib.asynccontextmanager
async def _raises(code: ErrorCode) -> AsyncIterator[None]:
    with pytest.raises(HoldfastError) as caught:
        yield
    assert caught.value.code is code


async def test_all_pages_are_of_one_revision_whatever_is_written_meanwhile(store: MetadataStore, prefix: str) -> None:
    for number in range(7):
        await _put(store, f"{prefix}a/{number}", b"before")
    await _put(store, prefix + "b/0", b"before")
    last = await _put(store, prefix + "c/0", b"before")
    pages = []
    async with contextlib.aclosing(store.scan([prefix + "b/", prefix + "a/"], page_items=3)) as scan:
        async for page in scan:
            pages.append(page)
            if len(pages) == 1:
                await _put(store, prefix + "a/6", b"after")
                await store.txn([], [Delete(prefix + "a/5")])
                await _put(store, prefix + "a/7", b"after")
                await _put(store, prefix + "b/1", b"after")
    assert {page.revision for page in pages} == {last}
    items = [item for page in pages for item in page.items]
    assert [item.key.removeprefix(prefix) for item in items] == [*(f"a/{number}" for number in range(7)), "b/0"]
    assert {item.value for item in items} == {b"before"}
    assert all(len(page.items) <= 3 for page in pages)
    assert [page.more for page in pages] == [True] * (len(pages) - 1) + [False]


async def test_an_item_is_what_a_get_returns(store: MetadataStore, prefix: str) -> None:
    lease = await store.grant_lease(60)
    await store.txn([], [Put(prefix + "k", b"v", lease)])
    pages = [page async for page in store.scan([prefix], page_items=10)]
    assert [page.items for page in pages] == [(await store.get(prefix + "k"),)]


async def test_nothing_is_one_empty_page(store: MetadataStore, prefix: str) -> None:
    here = await _put(store, prefix + "elsewhere")
    pages = [page async for page in store.scan([prefix + "x/", prefix + "y/"], page_items=10)]
    assert [page.items for page in pages] == [()] * len(pages)
    assert len({page.revision for page in pages}) == 1
    assert pages[0].revision >= here
    assert not pages[-1].more


async def test_two_at_once_and_one_that_is_left_early(store: MetadataStore, prefix: str) -> None:
    for number in range(4):
        await _put(store, f"{prefix}{number}")
    async with contextlib.aclosing(store.scan([prefix], page_items=1)) as first:
        assert len((await anext(first)).items) == 1
        second = [item async for page in store.scan([prefix], page_items=2) for item in page.items]
        assert len(second) == 4
        assert (await anext(first)).items[0].key == prefix + "1"


async def test_pages_have_a_size(store: MetadataStore, prefix: str) -> None:
    async with _raises(ErrorCode.INVALID_ARGUMENT):
        await anext(store.scan([prefix], page_items=0))
    async with _raises(ErrorCode.LIMIT_EXCEEDED):
        await anext(store.scan([prefix], page_items=METADATA_PAGE_ITEMS_MAX + 1))
