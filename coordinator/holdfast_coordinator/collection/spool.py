"""What a collection remembers beyond its memory: marks by partition, and the records that it marks from.

Both are kept in memory while they are few, and else in files without a name: the kernel frees those when the process
ends, however it ends, so nothing of a collection is ever left behind. What is in them are ids and records of the
metadata store, no secrets.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final, cast

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import MIB
from holdfast_core.model.names import split_ids

# About 130 bytes each are in use while they are in memory.
MARKS_IN_MEMORY: Final = 400_000
_RECORDS_IN_MEMORY_BYTES: Final = 8 * MIB
_OFFSET: Final = struct.Struct("<Q")
_HEADER: Final = struct.Struct("<BI")


class MarkSpool:
    """Ids by partition, each once or a few times. Not thread-safe.

    When too many are in memory they are written behind one another as a *run*: the ids in order of partitions, then a
    table of where each partition begins.
    """

    def __init__(
        self,
        partition_of: Callable[[bytes], int],
        partitions: int,
        *,
        scratch: Path | None,
        in_memory: int = MARKS_IN_MEMORY,
    ) -> None:
        """Keep up to `in_memory` ids in memory, and the rest in `scratch` (None: where temporary files go)."""
        self._partition_of = partition_of
        self._partitions = partitions
        self._scratch = scratch
        self._in_memory = in_memory
        self._fresh: defaultdict[int, set[bytes]] = defaultdict(set)  # most tenants fill few partitions
        self._left = in_memory
        self._file: BinaryIO | None = None
        self._tables: list[int] = []
        self._spilled = [0] * partitions

    def add(self, block_ids: Iterable[bytes]) -> None:
        """Mark ids, repeats included.

        Raises:
            HoldfastError: DISK_FULL if the scratch directory cannot take them.
        """
        fresh, partition_of = self._fresh, self._partition_of
        count = 0
        for block_id in block_ids:
            fresh[partition_of(block_id)].add(block_id)
            count += 1
        self._left -= count
        if self._left <= 0:
            # Repeats were counted too: look how many there really are.
            self._left = self._in_memory - sum(map(len, fresh.values()))
            if self._left <= self._in_memory // 4:
                self._spill()

    def count(self, partition: int) -> int:
        """Return how many marks a partition has at most."""
        return len(self._fresh.get(partition, ())) + self._spilled[partition]

    def marks(self, first: int, end: int) -> dict[int, set[bytes]]:
        """Return the marks of the partitions from `first` to before `end`, ascending; those without any are left out.

        Raises:
            HoldfastError: UNREACHABLE if the scratch file cannot be read.
        """
        found = defaultdict(set, {at: set(ids) for at, ids in self._fresh.items() if first <= at < end})
        for table_at in self._tables:
            offsets = self._read(table_at + first * _OFFSET.size, (end - first + 1) * _OFFSET.size)
            starts = [offset for (offset,) in _OFFSET.iter_unpack(offsets)]
            data = self._read(starts[0], starts[-1] - starts[0])
            for partition in range(first, end):
                at, until = starts[partition - first] - starts[0], starts[partition - first + 1] - starts[0]
                found[partition].update(split_ids(data[at:until]))
        return {partition: found[partition] for partition in sorted(found) if found[partition]}

    def close(self) -> None:
        """Forget everything and give the disk's space back; idempotent."""
        self._fresh.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _spill(self) -> None:
        try:
            if self._file is None:
                made = tempfile.TemporaryFile(dir=self._scratch, buffering=MIB)  # noqa: SIM115 - closed by `close`
                self._file = cast("BinaryIO", made)
            file = self._file
            at = file.seek(0, os.SEEK_END)
            table = []
            for partition in range(self._partitions):
                ids = self._fresh.get(partition, set())
                table.append(_OFFSET.pack(at))
                at += file.write(b"".join(ids))
                self._spilled[partition] += len(ids)
            table.append(_OFFSET.pack(at))
            file.write(b"".join(table))
            file.flush()
        except OSError as error:
            raise _no_scratch(error) from error
        self._tables.append(at)
        self._fresh.clear()
        self._left = self._in_memory

    def _read(self, at: int, size: int) -> bytes:
        file = self._file
        data = b"" if file is None else os.pread(file.fileno(), size, at)
        if len(data) != size:
            raise HoldfastError(ErrorCode.UNREACHABLE, "the scratch file of a collection is shorter than was written")
        return data


class RecordSpool:
    """Records in the order in which they came, each with the number of what it is. Written once, then read once."""

    def __init__(self, *, scratch: Path | None) -> None:
        """Keep what is beyond some megabytes in `scratch` (None: where temporary files go)."""
        where = str(scratch) if scratch else None
        self._file = tempfile.SpooledTemporaryFile(max_size=_RECORDS_IN_MEMORY_BYTES, dir=where)  # noqa: SIM115

    def add(self, records: Sequence[tuple[int, bytes]]) -> None:
        """Append records. Raises DISK_FULL if the scratch directory cannot take them."""
        try:
            for what, data in records:
                self._file.write(_HEADER.pack(what, len(data)))
                self._file.write(data)
        except OSError as error:
            raise _no_scratch(error) from error

    def read(self) -> Iterator[tuple[int, bytes]]:
        """Yield the records from the first on."""
        self._file.seek(0)
        while header := self._file.read(_HEADER.size):
            what, size = _HEADER.unpack(header)
            yield what, self._file.read(size)

    def close(self) -> None:
        """Forget everything; idempotent."""
        self._file.close()


def _no_scratch(error: OSError) -> HoldfastError:
    return HoldfastError(
        ErrorCode.DISK_FULL, f"the scratch directory cannot keep what a collection has to remember: {error}"
    )
