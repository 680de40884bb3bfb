"""The checkpointed index: LMDB from tenant, partition and id to where the record is.

It is written by whole checkpoints only, each one synced transaction that also says up to which place in the log it is
true. Nothing depends on it that the segments could not tell again, so a damaged one is thrown away. LMDB has no
checksums and trusts its file: the structure is checked before it is opened, and every entry carries a checksum of its
own.

An index of another version than this program's is thrown away like a damaged one.
"""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias, cast

import lmdb
import lmdb.verify

from holdfast_core.model.limits import GIB, MIB
from holdfast_storagenode.store import PartitionOf

# Above this size the structure is not walked at start: the walk is slow, and entries are checked one by one anyway.
VERIFIED_BYTES_MAX: Final = 64 * MIB

KEY_BYTES: Final = 38
# 2: entries with stamps, the list of quarantined copies, counts by tenant.
INDEX_VERSION: Final = 2
_KEY: Final = struct.Struct(">IH32s")
_ENTRY: Final = struct.Struct("<IIIIBB")
_CRC: Final = struct.Struct("<I")
_CHECKPOINT_KEY: Final = b"checkpoint"


_TENANT: Final = struct.Struct(">I")
_PLACE: Final = struct.Struct(">IH")
# Above every key that begins with the same bytes: longer than what can follow, and all ones.
_ABOVE: Final = b"\xff" * (KEY_BYTES + 1)


# What a cursor yields where transactions were not told to lend buffers.
_Items: TypeAlias = Iterator[tuple[bytes, bytes]]


class IndexDamagedError(Exception):
    """The index cannot be trusted; it must be rebuilt from the segments."""


class Entry(NamedTuple):
    """Where a block's record begins, its sealed length, its kind, whether it is known to be corrupt, its stamp."""

    segment: int
    offset: int
    length: int
    kind: int
    quarantined: bool = False
    stamp: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What the index is true of: every record before (`segment`, `offset`), and the sums that it makes.

    Attributes:
        segment: segment of the log's end.
        offset: its place in the segment.
        block_count: blocks held, those that are set aside among them.
        quarantined_count: blocks that are set aside.
        live_bytes: living bytes by segment.
        tenants: blocks held by tenant.
    """

    segment: int
    offset: int
    block_count: int
    quarantined_count: int
    live_bytes: Mapping[int, int]
    tenants: Mapping[int, int]


def make_key(tenant: int, partition: int, block_id: bytes) -> bytes:
    """Return the key of a block: tenant and partition big-endian, then the id, so that each is one range."""
    return _KEY.pack(tenant, partition, block_id)


def make_keys(tenant: int, partition_of: PartitionOf, ids: Sequence[bytes]) -> list[bytes]:
    """Return the key of each block."""
    pack = _KEY.pack
    return [pack(tenant, partition_of(block_id), block_id) for block_id in ids]


def split_key(key: bytes) -> tuple[int, int, bytes]:
    """Return tenant, partition and id of a key."""
    tenant, partition, block_id = _KEY.unpack(key)
    return tenant, partition, block_id


def tenant_range(tenant: int) -> tuple[bytes, bytes]:
    """Return the lowest key that a tenant can have, and one above all of them."""
    prefix = _TENANT.pack(tenant)
    return prefix, prefix + _ABOVE


def partition_range(tenant: int, partition: int) -> tuple[bytes, bytes]:
    """Return the lowest key that a tenant can have in a partition, and one above all of them."""
    prefix = _PLACE.pack(tenant, partition)
    return prefix, prefix + _ABOVE


class Index:
    """One LMDB environment. Reading is thread-safe; only one thread writes checkpoints."""

    def __init__(self, environment: lmdb.Environment) -> None:
        self._environment = environment
        self._blocks = environment.open_db(b"blocks")
        self._meta = environment.open_db(b"meta")
        self._quarantined = environment.open_db(b"quarantined")

    @classmethod
    def open(cls, directory: Path, *, map_bytes: int) -> Index:
        """Open the index in `directory`, or make an empty one. `map_bytes` bounds its size (address space, not disk).

        Raises:
            IndexDamagedError: it is there but not sound.
        """
        data = directory / "data.mdb"
        try:
            if data.exists() and data.stat().st_size <= VERIFIED_BYTES_MAX:
                problems = lmdb.verify.verify(str(data))  # type: ignore[no-untyped-call]  # the module ships no types
                if problems:
                    raise IndexDamagedError(f"the index is damaged: {problems[0]}")
            directory.mkdir(exist_ok=True)
            environment = lmdb.open(
                str(directory), map_size=max(GIB, map_bytes), max_dbs=3, max_readers=512, readahead=False, mode=0o600
            )
            index = cls(environment)
            index._check_count()
        except (lmdb.Error, lmdb.verify.VerifyError, struct.error) as error:
            raise IndexDamagedError(f"the index cannot be opened: {error}") from error
        return index

    @staticmethod
    def discard(directory: Path) -> None:
        """Remove an index, so that `open` makes an empty one."""
        shutil.rmtree(directory, ignore_errors=False) if directory.exists() else None

    def checkpoint(self) -> Checkpoint | None:
        """Return what the index is true of, or None if it never was written.

        Raises:
            IndexDamagedError: the note of it is unreadable.
        """
        with self._environment.begin(db=self._meta) as transaction:
            packed = transaction.get(_CHECKPOINT_KEY)
        if packed is None:
            return None
        try:
            fields = json.loads(bytes(packed))
            version = fields.pop("version", 1)
            if version != INDEX_VERSION:
                raise IndexDamagedError(f"the index has version {version}; this program makes version {INDEX_VERSION}")
            live = {int(segment): int(count) for segment, count in fields.pop("live_bytes").items()}
            tenants = {int(tenant): int(count) for tenant, count in fields.pop("tenants").items()}
            return Checkpoint(live_bytes=live, tenants=tenants, **fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IndexDamagedError("the index's checkpoint is unreadable") from error

    def get_many(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """Return the entry of each key as of the last checkpoint.

        Raises:
            IndexDamagedError: an entry's checksum is wrong.
        """
        try:
            with self._environment.begin(db=self._blocks) as transaction:
                found = [transaction.get(key) for key in keys]
        except lmdb.Error as error:
            raise IndexDamagedError(f"the index cannot be read: {error}") from error
        return [None if packed is None else _unpack(key, packed) for key, packed in zip(keys, found, strict=True)]

    def range(self, low: bytes, high: bytes, limit: int) -> list[tuple[bytes, Entry]]:
        """Return up to `limit` (key, entry) with `low` <= key < `high`, ascending, as of the last checkpoint.

        Raises:
            IndexDamagedError: an entry's checksum is wrong.
        """
        with self.view() as view:
            return view.range(low, high, limit)

    @contextmanager
    def view(self) -> Iterator[IndexView]:
        """Lend the index as it is now: a checkpoint that is written meanwhile does not show."""
        try:
            with self._environment.begin(db=self._blocks) as transaction:
                yield IndexView(transaction, self._quarantined)
        except lmdb.Error as error:
            raise IndexDamagedError(f"the index cannot be read: {error}") from error

    def write(self, changes: Iterable[tuple[bytes, Entry | None]], checkpoint: Checkpoint) -> None:
        """Apply `changes` (None removes) and note the checkpoint, in one synced transaction.

        Raises:
            lmdb.Error: nothing was changed.
        """
        note = {
            "version": INDEX_VERSION,
            "segment": checkpoint.segment,
            "offset": checkpoint.offset,
            "block_count": checkpoint.block_count,
            "quarantined_count": checkpoint.quarantined_count,
            "live_bytes": {str(segment): count for segment, count in checkpoint.live_bytes.items()},
            "tenants": {str(tenant): count for tenant, count in checkpoint.tenants.items()},
        }
        with self._environment.begin(db=self._blocks, write=True) as transaction:
            any_set_aside = transaction.stat(self._quarantined)["entries"] > 0
            # In order of key, so that neighbouring changes touch a page once.
            for key, entry in sorted(changes, key=lambda change: change[0]):
                if entry is None:
                    transaction.delete(key)
                else:
                    transaction.put(key, _pack(key, entry))
                if entry is not None and entry.quarantined:
                    transaction.put(key, b"", db=self._quarantined)
                elif any_set_aside:
                    transaction.delete(key, db=self._quarantined)
            transaction.put(_CHECKPOINT_KEY, json.dumps(note).encode(), db=self._meta)

    def close(self) -> None:
        """Release the files."""
        self._environment.close()

    def _check_count(self) -> None:
        try:
            checkpoint = self.checkpoint()
        except IndexDamagedError:
            self.close()
            raise
        with self._environment.begin(db=self._blocks) as transaction:
            held = transaction.stat(self._blocks)["entries"]
            set_aside = transaction.stat(self._quarantined)["entries"]
        expected = (0, 0) if checkpoint is None else (checkpoint.block_count, checkpoint.quarantined_count)
        if (held, set_aside) != expected:
            self.close()
            raise IndexDamagedError(
                f"the index holds {held} entries, {set_aside} of them set aside, where its checkpoint counted "
                f"{expected[0]} and {expected[1]}"
            )


class IndexView:
    """What the index said when the view was made; lives as long as its `with`."""

    def __init__(self, transaction: lmdb.Transaction, quarantined: Any) -> None:
        self._transaction = transaction
        self._set_aside = quarantined

    def range(self, low: bytes, high: bytes, limit: int | None) -> list[tuple[bytes, Entry]]:
        """Return up to `limit` (key, entry) with `low` <= key < `high`, ascending; None for all.

        Raises:
            IndexDamagedError: an entry's checksum is wrong.
        """
        listed: list[tuple[bytes, Entry]] = []
        with self._transaction.cursor() as cursor:
            if cursor.set_range(low):
                for key, packed in islice(cast(_Items, cursor.iternext()), limit):
                    if key >= high:
                        break
                    listed.append((key, _unpack(key, packed)))
        return listed

    def set_aside(self) -> Iterator[bytes]:
        """Yield the keys of the copies that are set aside as corrupt, ascending."""
        with self._transaction.cursor(db=self._set_aside) as cursor:
            yield from cast(Iterator[bytes], cursor.iternext(values=False))


def _pack(key: bytes, entry: Entry) -> bytes:
    body = _ENTRY.pack(entry.segment, entry.offset, entry.length, entry.stamp, entry.kind, entry.quarantined)
    return body + _CRC.pack(zlib.crc32(body, zlib.crc32(key)))


def _unpack(key: bytes, packed: bytes | memoryview) -> Entry:
    body = packed[: _ENTRY.size]
    if len(packed) != _ENTRY.size + _CRC.size or _CRC.unpack_from(packed, _ENTRY.size)[0] != zlib.crc32(
        body, zlib.crc32(key)
    ):
        raise IndexDamagedError("an entry of the index is damaged")
    segment, offset, length, stamp, kind, quarantined = _ENTRY.unpack(body)
    return Entry(segment, offset, length, kind, bool(quarantined), stamp)
