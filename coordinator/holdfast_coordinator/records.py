"""Reading records from the metadata store: the message together with the revisions that a transaction compares."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from google.protobuf.message import DecodeError, Message

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import MESSAGE_BYTES_MAX, MIB
from holdfast_core.runtime.metadata.store import Condition, CreateRevisionIs, KeyValue, MetadataStore, ModRevisionIs

M = TypeVar("M", bound=Message)

_PAGE_ITEMS: Final = 1000
# The rest of a message is for the framing of its records.
ANSWER_BYTES_MAX: Final = MESSAGE_BYTES_MAX - 1 * MIB


@dataclass(frozen=True, slots=True)
class Stored(Generic[M]):
    """A record as it was read."""

    key: str
    message: M
    create_revision: int
    mod_revision: int
    lease_id: int

    @property
    def unchanged(self) -> Condition:
        """Holds while nobody wrote the record since it was read."""
        return ModRevisionIs(self.key, self.mod_revision)

    @property
    def the_same(self) -> Condition:
        """Holds while the key is the very one that was read, even if its value was written since."""
        return CreateRevisionIs(self.key, self.create_revision)


def parse(item: KeyValue, message_type: type[M]) -> Stored[M]:
    """Parse one key's value.

    Raises:
        HoldfastError: INTERNAL if it is not such a message: somebody else wrote into our keys.
    """
    message = message_type()
    try:
        message.ParseFromString(item.value)
    except DecodeError as error:
        raise HoldfastError(
            ErrorCode.INTERNAL,
            f"the metadata key {item.key} holds no {message_type.__name__}; something else wrote there",
        ) from error
    return Stored(item.key, message, item.create_revision, item.mod_revision, item.lease_id)


def parse_number(item: KeyValue | None) -> int:
    """Parse a decimal number, 0 for an absent key.

    Raises:
        HoldfastError: INTERNAL if it is not a decimal number.
    """
    if item is None:
        return 0
    if not item.value.isdigit():
        raise HoldfastError(
            ErrorCode.INTERNAL, f"the metadata key {item.key} holds no number; something else wrote there"
        )
    return int(item.value)


def still(key: str, item: KeyValue | None) -> Condition:
    """Return the condition that `key` is as it was read, absence included."""
    return ModRevisionIs(key, 0 if item is None else item.mod_revision)


def check_fits_answer(items: Sequence[KeyValue], what: str) -> Sequence[KeyValue]:
    """Return the items if one answer holds them all; `what` says whose list it is.

    Raises:
        HoldfastError: LIMIT_EXCEEDED if not: plainly, rather than as a transport's error.
    """
    total = sum(len(item.value) for item in items)
    if total > ANSWER_BYTES_MAX:
        raise HoldfastError(
            ErrorCode.LIMIT_EXCEEDED,
            f"{what} has {len(items)} records of {total} bytes; one answer holds {ANSWER_BYTES_MAX}",
        )
    return items


async def load(store: MetadataStore, key: str, message_type: type[M]) -> Stored[M] | None:
    """Read one record, None if the key does not exist. Raises as `parse` and the store's `get`."""
    item = await store.get(key)
    return None if item is None else parse(item, message_type)


async def each(store: MetadataStore, prefix: str) -> AsyncIterator[KeyValue]:
    """Yield all keys below `prefix` page by page: flat in memory, and not all of one revision."""
    after = ""
    while True:
        page = await store.page(prefix, after=after, limit=_PAGE_ITEMS)
        for item in page.items:
            yield item
        if not page.more:
            return
        after = page.items[-1].key


async def count(store: MetadataStore, prefix: str) -> int:
    """Count the keys below `prefix`."""
    return sum([1 async for _ in each(store, prefix)])
