"""The checkpointed index: LMDB from tenant, partition and id to where the record is.

It is written by whole checkpoints only, each one synced transaction that also says up to which place in the log it is
true. Nothing depends on it that the segments could not tell again, so a damaged one is thrown away. LMDB has no
checksums and trusts its file: the structure is checked before it is opened, and every entry carries a checksum of its
own.
"""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import lmdb
import lmdb.verify

from holdfast_core.model.limits import GIB, MIB
from holdfast_storagenode.store import PartitionOf

# Above this size the structure is not walked at start: the walk is slow, and entries are checked one by one anyway.
VERIFIED_BYTES_MAX: Final = 64 * MIB

KEY_BYTES: Final = 38
_KEY: Final = struct.Struct(">IH32s")
_ENTRY: Final = struct.Struct("<IIIBB")
_CRC: Final = struct.Struct("<I")
_CHECKPOINT_KEY: Final = b"checkpoint"


class IndexDamagedError(Exception):
    """The index cannot be trusted; it must be rebuilt from the segments."""


class Entry(NamedTuple):
    """Where a block's record begins, its sealed length, its kind, and whether this copy is known to be corrupt."""

    segment: int
    offset: int
    length: int
    kind: int
    quarantined: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What the index is true of: every record before (`segment`, `offset`), counts, and living bytes by segment."""

    segment: int
    offset: int
    block_count: int
    quarantined_count: int
    live_bytes: Mapping[int, int]


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


class Index:
    """One LMDB environment. Reading is thread-safe; only one thread writes checkpoints."""

    def __init__(self, environment: lmdb.Environment) -> None:
        self._environment = environment
        self._blocks = environment.open_db(b"blocks")
        self._meta = environment.open_db(b"meta")

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
                str(directory), map_size=max(GIB, map_bytes), max_dbs=2, max_readers=512, readahead=False, mode=0o600
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
            live = {int(segment): int(count) for segment, count in fields.pop("live_bytes").items()}
            return Checkpoint(live_bytes=live, **fields)
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
        listed: list[tuple[bytes, Entry]] = []
        try:
            with self._environment.begin(db=self._blocks) as transaction, transaction.cursor() as cursor:
                more = cursor.set_range(low)
                while more and len(listed) < limit:
                    key = bytes(cursor.key())
                    if key >= high:
                        break
                    listed.append((key, _unpack(key, cursor.value())))
                    more = cursor.next()
        except lmdb.Error as error:
            raise IndexDamagedError(f"the index cannot be read: {error}") from error
        return listed

    def write(self, changes: Iterable[tuple[bytes, Entry | None]], checkpoint: Checkpoint) -> None:
        """Apply `changes` (None removes) and note the checkpoint, in one synced transaction.

        Raises:
            lmdb.Error: nothing was changed.
        """
        note = {
            "segment": checkpoint.segment,
            "offset": checkpoint.offset,
            "block_count": checkpoint.block_count,
            "quarantined_count": checkpoint.quarantined_count,
            "live_bytes": {str(segment): count for segment, count in checkpoint.live_bytes.items()},
        }
        with self._environment.begin(db=self._blocks, write=True) as transaction:
            # In order of key, so that neighbouring changes touch a page once.
            for key, entry in sorted(changes, key=lambda change: change[0]):
                if entry is None:
                    transaction.delete(key)
                else:
                    transaction.put(key, _pack(key, entry))
            transaction.put(_CHECKPOINT_KEY, json.dumps(note).encode(), db=self._meta)

    def close(self) -> None:
        """Release the files."""
        self._environment.close()

    def _check_count(self) -> None:
        checkpoint = self.checkpoint()
        with self._environment.begin(db=self._blocks) as transaction:
            held = transaction.stat(self._blocks)["entries"]
        expected = 0 if checkpoint is None else checkpoint.block_count
        if held != expected:
            self.close()
            raise IndexDamagedError(f"the index holds {held} entries where its checkpoint counted {expected}")


def _pack(key: bytes, entry: Entry) -> bytes:
    body = _ENTRY.pack(entry.segment, entry.offset, entry.length, entry.kind, entry.quarantined)
    return body + _CRC.pack(zlib.crc32(body, zlib.crc32(key)))


def _unpack(key: bytes, packed: bytes | memoryview) -> Entry:
    body = packed[: _ENTRY.size]
    if len(packed) != _ENTRY.size + _CRC.size or _CRC.unpack_from(packed, _ENTRY.size)[0] != zlib.crc32(
        body, zlib.crc32(key)
    ):
        raise IndexDamagedError("an entry of the index is damaged")
    segment, offset, length, kind, quarantined = _ENTRY.unpack(body)
    return Entry(segment, offset, length, kind, bool(quarantined))
