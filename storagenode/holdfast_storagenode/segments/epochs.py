"""What a store remembers of collection epochs beside the stamps of single blocks: the epoch, floors, the cut-off.

A small file, replaced as a whole and durable before anything leans on it. It also says whether the stamps are known at
all. They are not in a directory that is new, after the index was made anew (compaction drops records of stamps that the
index holds), and after records were lost. Then the first epoch that is learnt becomes the floor of everything, because
whoever leans on a block began under that epoch or an older one; until then nothing is deleted by a cut-off.

"Not known" is made durable before a new index is, so that no crash in between makes it forgotten.
"""

from __future__ import annotations

import errno
import json
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final

from blake3 import blake3

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_storagenode.durable import write_durably
from holdfast_storagenode.segments.record import STAMP_MAX

EPOCHS_NAME: Final = "epochs"

_VERSION: Final = 1
# The partition within a key of the index.
_PARTITION: Final = struct.Struct(">4xH")


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochState:
    """One state of the file.

    Attributes:
        known: whether stamps are what they were; where not, the next epoch that is learnt becomes the floor.
        epoch: the newest epoch that was learnt.
        cutoff: the highest cut-off that was seen.
        floor: what every block counts as stamped with at least.
        floors: the same for single partitions.
    """

    known: bool = False
    epoch: int = 0
    cutoff: int = 0
    floor: int = 0
    floors: Mapping[int, int] = field(default_factory=dict)

    def counted(self, key: bytes, stamp: int) -> int:
        """Return what the block of a key counts as stamped with, whose own stamp is `stamp`."""
        if self.floors:
            return max(stamp, self.floor, self.floors.get(_PARTITION.unpack_from(key)[0], 0))
        return max(stamp, self.floor)


class Epochs:
    """The file of one store. Thread-safe; `state` is whole at any moment and durable."""

    def __init__(self, directory: Path) -> None:
        """Read the file; one that is missing or damaged knows nothing."""
        self._file = directory / EPOCHS_NAME
        self._lock = threading.Lock()
        state = _read(self._file)
        self.was_lost = state is None
        self.state = EpochState() if state is None else state

    def forget(self) -> None:
        """Take note that stamps may have been lost.

        Raises:
            HoldfastError: DISK_FULL, INTERNAL.
        """
        with self._lock:
            if self.state.known or self.was_lost:
                self._write(replace(self.state, known=False))
                self.was_lost = False

    def learn(self, epoch: int) -> None:
        """Take note of an epoch that was told just now.

        Raises:
            HoldfastError: DISK_FULL, INTERNAL.
        """
        check_epoch(epoch)
        with self._lock:
            newest = max(epoch, self.state.epoch)
            if not self.state.known:
                self._write(replace(self.state, known=True, epoch=newest, floor=max(newest, self.state.floor)))
            elif newest > self.state.epoch:
                self._write(replace(self.state, epoch=newest))

    def raise_floor(self, partitions: Sequence[int], epoch: int) -> None:
        """Let blocks of these partitions count as stamped with at least `epoch`.

        Raises:
            HoldfastError: DISK_FULL, INTERNAL.
        """
        check_epoch(epoch)
        with self._lock:
            floors = self.state.floors
            raised = {partition: epoch for partition in partitions if floors.get(partition, 0) < epoch}
            if raised:
                self._write(replace(self.state, floors={**floors, **raised}))

    def see(self, cutoff: int) -> None:
        """Take note of a delete's cut-off, before anything is deleted under it.

        Raises:
            HoldfastError: CONFLICT if a higher one was seen; NOT_READY while stamps are not known; DISK_FULL, INTERNAL.
        """
        check_epoch(cutoff)
        with self._lock:
            self.check(cutoff)
            if cutoff > self.state.cutoff:
                self._write(replace(self.state, cutoff=cutoff))

    def check(self, cutoff: int) -> None:
        """Return if blocks may be deleted by this cut-off now.

        Raises:
            HoldfastError: CONFLICT if a higher one was seen; NOT_READY while stamps are not known.
        """
        state = self.state
        if not state.known:
            raise HoldfastError(
                ErrorCode.NOT_READY,
                "the node does not know the stamps of its blocks until a coordinator tells it the collection epoch",
            )
        if cutoff < state.cutoff:
            raise HoldfastError(
                ErrorCode.CONFLICT,
                f"a collection with the cut-off {state.cutoff} was here already; this one has {cutoff}",
            )

    def _write(self, state: EpochState) -> None:
        body = json.dumps({"version": _VERSION, **asdict(state)}).encode()
        try:
            write_durably(self._file, blake3(body).hexdigest().encode() + b"\n" + body)
        except OSError as error:
            code = ErrorCode.DISK_FULL if error.errno in (errno.ENOSPC, errno.EDQUOT) else ErrorCode.INTERNAL
            raise HoldfastError(code, f"{self._file} cannot be written: {error.strerror}") from error
        # Only now: a block that counts as stamped is answered for without a write of its own.
        self.state = state


def check_epoch(epoch: int) -> None:
    """Return if `epoch` is one.

    Raises:
        HoldfastError: INVALID_ARGUMENT.
    """
    if not 0 <= epoch <= STAMP_MAX:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"a collection epoch is a number from 0 to {STAMP_MAX}")


def _read(file: Path) -> EpochState | None:
    try:
        checksum, _, body = file.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    if blake3(body).hexdigest().encode() != checksum:
        return None
    fields = json.loads(body)
    if fields.pop("version") != _VERSION:
        return None
    floors = {int(partition): int(epoch) for partition, epoch in fields.pop("floors").items()}
    return EpochState(floors=floors, **fields)
