"""Stored objects that are visible: finding, listing and forgetting them. `commit` makes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.keyspace import TenantKeyspace, object_place
from holdfast_coordinator.records import ANSWER_BYTES_MAX, Stored, check_fits_answer, load, parse
from holdfast_coordinator.transactions import Outcome
from holdfast_coordinator.usage import UsageChange
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import LIST_ITEMS_MAX
from holdfast_core.model.names import check_id, check_name
from holdfast_core.runtime.metadata.store import Delete, MetadataStore
from holdfast_proto.v1.records_pb2 import ObjectRecord
from holdfast_proto.v1.tenants_pb2 import Quota

_REST_OF_TOKEN = re.compile(r"[0-9]{15}\.[a-z0-9-]{1,64}", re.ASCII)


class Objects:
    """Objects of one tenant. They outlive every VM; nothing but `forget` removes them."""

    def __init__(self, store: MetadataStore, space: TenantKeyspace, ledger: Ledger, *, quota: Quota) -> None:
        """Bind to the store; `quota` is what the tenant may have."""
        self._store = store
        self._space = space
        self._ledger = ledger
        self._quota = quota

    async def find(self, storage_id: str) -> Stored[ObjectRecord] | None:
        """Return an object's record, None if there is no such id.

        Raises:
            HoldfastError: INVALID_ARGUMENT for a malformed id.
        """
        check_id(storage_id, "storage id")
        place = await self._store.get(self._space.object_id(storage_id))
        if place is None:
            return None
        # Forgetting removes both keys at once, so that either read may find nothing.
        return await load(self._store, self._space.object(place.value.decode()), ObjectRecord)

    async def get(self, storage_id: str) -> Stored[ObjectRecord]:
        """Return an object's record.

        Raises:
            HoldfastError: NOT_FOUND; INVALID_ARGUMENT for a malformed id.
        """
        found = await self.find(storage_id)
        if found is None:
            raise HoldfastError(ErrorCode.NOT_FOUND, f"there is no stored object {storage_id}")
        return found

    async def of_task(self, task_id: str) -> Sequence[ObjectRecord]:
        """Return a task's objects, oldest first; nothing for an unknown task.

        Raises:
            HoldfastError: INVALID_ARGUMENT for a malformed name; LIMIT_EXCEEDED for more than one answer holds.
        """
        check_name(task_id, "task name")
        snapshot = await self._store.snapshot([self._space.objects_of(task_id)])
        return [parse(item, ObjectRecord).message for item in check_fits_answer(snapshot.items, f"the task {task_id}")]

    async def page(self, token: str, *, allowed: Callable[[str], bool]) -> tuple[Sequence[ObjectRecord], str]:
        """Return some objects of all tasks, and the token of the next page, "" on the last one.

        Objects of tasks of which `allowed` says no are left out. It reads on until there is one to return or no more to
        read, so that a token names nothing but what was told.

        Raises:
            HoldfastError: INVALID_ARGUMENT for a token that is none.
        """
        place = self._space.object(_checked_token(token)) if token else ""
        while True:
            page = await self._store.page(self._space.objects_prefix, after=place, limit=LIST_ITEMS_MAX)
            told: list[ObjectRecord] = []
            size_bytes = 0
            for item in page.items:
                stored = parse(item, ObjectRecord).message
                if not allowed(stored.task_id):
                    continue
                size_bytes += len(item.value)
                if told and size_bytes > ANSWER_BYTES_MAX:
                    return told, _place_of(told[-1])
                told.append(stored)
            if told or not page.more:
                return told, _place_of(told[-1]) if page.more else ""
            place = page.items[-1].key

    async def forget(self, storage_id: str, entry: Entry) -> None:
        """Remove an object's record; its blocks fall to collection.

        Raises:
            HoldfastError: NOT_FOUND; INVALID_ARGUMENT for a malformed id.
        """
        found = await self.get(storage_id)
        usage = UsageChange(
            tenant=self._space.tenant, quota=self._quota, objects=-1, bytes=-int(found.message.size_bytes)
        )
        operations = [Delete(self._space.object_id(storage_id)), Delete(found.key)]
        if await self._ledger.apply(entry, [found.unchanged], operations, usage) is not Outcome.APPLIED:
            # Nobody writes an object's record twice, so it is gone: somebody else removed it and gave its bytes back.
            entry.repeated()


def _place_of(stored: ObjectRecord) -> str:
    return object_place(stored.task_id, stored.created_unix_ms, stored.storage_id)


def _checked_token(token: str) -> str:
    """Return a token that may have come with a page. Raises INVALID_ARGUMENT for others."""
    task_id, _, rest = token.partition("/")
    check_name(task_id, "task of a page token")
    if not _REST_OF_TOKEN.fullmatch(rest):
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "this page token came with no page")
    return token
