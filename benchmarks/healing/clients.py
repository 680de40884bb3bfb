"""What a client of the cluster gets done: backups of fresh volumes, and restores of them."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from holdfast.manager import StateManager

_PIECE_BYTES: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Turn:
    """One backup of a fresh volume, and one restore of it, in seconds, and whether what was going on outlasted each."""

    backup_s: float
    restore_s: float
    backup_inside: bool = True
    restore_inside: bool = True


@dataclass(frozen=True, slots=True)
class Speeds:
    """Megabytes (10^6 bytes of the volume) per second, medians over turns."""

    backup_mb_s: float
    restore_mb_s: float
    turns: int


class Client:
    """Backs up one volume after another, each of bytes that no store has seen."""

    def __init__(self, manager: StateManager, folder: Path, *, volume_bytes: int) -> None:
        """Work through `manager`, with volumes below `folder`."""
        self._manager = manager
        self._folder = folder
        self._volume_bytes = volume_bytes
        self._turns = 0
        folder.mkdir(parents=True, exist_ok=True)

    def prepare(self, turns: int) -> None:
        """Write the volumes of the next turns, so that making them takes nothing from what is measured."""
        for at in range(self._turns, self._turns + turns):
            self._volume(at)

    def turn(self, going_on: Callable[[], bool] = lambda: True) -> Turn:
        """Back a fresh volume up and restore it; `going_on` says whether what it is measured beside still goes on."""
        volume, vm_id = self._volume(self._turns), f"vm-{self._turns}"
        self._turns += 1
        target = self._folder / "restored"
        self._manager.register_vm(vm_id, {"disk": str(volume)})
        began_s = time.monotonic()
        point_id = self._manager.create_snapshot(vm_id)
        backed_up_s, backup_inside = time.monotonic(), going_on()
        self._manager.restore_vm(point_id, target=target)
        restored_s, restore_inside = time.monotonic(), going_on()
        shutil.rmtree(target)
        volume.unlink()
        return Turn(backed_up_s - began_s, restored_s - backed_up_s, backup_inside, restore_inside)

    def speeds(self, turns: Sequence[Turn]) -> Speeds:
        """Return the medians of those steps that what they were measured beside outlasted.

        Raises:
            RuntimeError: there is no such step of a kind: the volumes are too large for what is measured.
        """
        backups = [turn.backup_s for turn in turns if turn.backup_inside]
        restores = [turn.restore_s for turn in turns if turn.restore_inside]
        if not backups or not restores:
            raise RuntimeError("no backup and restore ended in time; take smaller volumes, or more to heal")
        size_mb = self._volume_bytes / 1e6
        return Speeds(size_mb / statistics.median(backups), size_mb / statistics.median(restores), len(turns))

    def _volume(self, number: int) -> Path:
        path = self._folder / f"volume-{number}"
        if not path.exists():
            with path.open("wb") as stream:
                for at in range(0, self._volume_bytes, _PIECE_BYTES):
                    stream.write(os.urandom(min(_PIECE_BYTES, self._volume_bytes - at)))
        return path
