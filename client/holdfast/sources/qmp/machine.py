"""One QEMU for the length of one backup: its disks held still at one moment, and what becomes of their bitmaps."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from holdfast.sources.interface import BackupRun
from holdfast.sources.nbd import ExportReader, bitmap_name
from holdfast.sources.nbd_client import NbdEndpoint
from holdfast.sources.qmp import bitmaps, fleecing
from holdfast.sources.qmp.agent import frozen
from holdfast.sources.qmp.bitmaps import Action
from holdfast.sources.qmp.disks import Disk, check_threads, find_disks, read_bitmaps
from holdfast.sources.qmp.fleecing import Fleece
from holdfast.sources.qmp.monitor import Monitor, understanding
from holdfast_core.model.errors import ErrorCode, HoldfastError

GRANULARITY_BYTES_MAX: Final = 65536


@dataclass(frozen=True, slots=True)
class AskedDisk:
    """A disk as a volume's registration names it.

    Attributes:
        device: what names it in QEMU.
        block_bytes: how finely its volume is cut.
        agent: socket of the guest agent, or None.
        scratch: folder for the scratch image, or None.
    """

    device: str
    block_bytes: int
    agent: Path | None = None
    scratch: Path | None = None


@dataclass(slots=True)
class HeldDisk:
    """A disk while it is held, and what it takes to let it go.

    Attributes:
        disk: the disk.
        fleece: what holds it.
        new: name of the bitmap that began with the point.
        parent: name of the bitmap that stopped with it and tells what changed; empty if there is none of use.
        reason: why there is none, as a phrase; empty if there is one, or none was wanted.
        application: whether the guest's file systems were frozen.
        held: whether it is held now.
        open: whether its source is open, and may still say how the backup ended.
        bitmaps_stand: whether its bitmaps are as the transaction left them, and nobody was told how the backup ended.
    """

    disk: Disk
    fleece: Fleece
    new: str
    parent: str
    reason: str
    application: bool = False
    held: bool = True
    open: bool = True
    bitmaps_stand: bool = field(default=False)


class Machine:
    """A running QEMU. Its methods may be called from several threads at once."""

    def __init__(self, path: Path, run: BackupRun) -> None:
        """Connect to its monitor, and take away what a process left that died.

        Raises:
            HoldfastError: SOURCE_UNREADABLE.
        """
        self._path = path
        self._run = run
        self._lock = threading.RLock()
        self._disks: list[HeldDisk] = []
        self._serving = False
        self._monitor = Monitor(path)
        try:
            fleecing.clear_leftovers(self._monitor)
            self._was_running = self._status() == "running"
        except BaseException:
            self._monitor.close()
            raise

    def hold(self, asked: Sequence[AskedDisk]) -> list[HeldDisk]:
        """Hold disks still, all at one moment; their bitmaps change in the same transaction. All of it or nothing.

        Raises:
            HoldfastError: SOURCE_UNREADABLE; INVALID_ARGUMENT if two name one disk.
        """
        found = find_disks(self._monitor, [each.device for each in asked])
        check_threads(self._monitor, found)
        for at, each in enumerate(asked):
            self._disks.append(self._prepared(at, each, found[each.device]))
        for held in self._disks:
            fleecing.make_scratch(self._monitor, held.fleece, held.disk)
        fleecing.start_server(self._monitor, fleecing.server_socket(self._path))
        self._serving = True
        with _all_frozen(asked) as stopped:
            self._monitor.transaction([action for held, each in self._pairs(asked) for action in _moment(held, each)])
            for held, each in self._pairs(asked):
                held.bitmaps_stand = True
                held.application = stopped.get(each.agent, False)
        for held in self._disks:
            fleecing.export(self._monitor, held.fleece, held.parent)
        return list(self._disks)

    def _pairs(self, asked: Sequence[AskedDisk]) -> Iterator[tuple[HeldDisk, AskedDisk]]:
        return zip(self._disks, asked, strict=True)

    def _prepared(self, at: int, asked: AskedDisk, disk: Disk) -> HeldDisk:
        """Find out which bitmap tells what changed, and make it whole if a process died over it."""
        parent, reason = "", ""
        if self._run.parent_id:
            parent = bitmap_name(self._run.parent_id)
            there = read_bitmaps(self._monitor, disk.node)
            reason = bitmaps.why_unusable(there, parent)
            if reason:
                parent = ""
            else:
                self._monitor.transaction(bitmaps.repairs(disk.node, there, parent))
        names = fleecing.plan_fleece(
            disk, at=at, point_id=self._run.point_id, scratch=asked.scratch, beside=self._path.parent
        )
        return HeldDisk(disk, names, bitmap_name(self._run.point_id), parent, reason)

    def reader(self, held: HeldDisk) -> ExportReader:
        """Connect to a held disk's export.

        Raises:
            HoldfastError: SOURCE_UNREADABLE.
        """
        endpoint = NbdEndpoint("", 0, str(fleecing.server_socket(self._path)))
        return ExportReader(endpoint, held.fleece.node, bitmap=held.parent)

    def check_held(self, held: HeldDisk) -> None:
        """Make sure that a disk was held all the time.

        Raises:
            HoldfastError: SOURCE_UNREADABLE if not, or if QEMU has gone and nobody can tell.
        """
        with self._lock:
            if held.held and not fleecing.is_holding(self._monitor, held.fleece):
                raise HoldfastError(
                    ErrorCode.SOURCE_UNREADABLE,
                    f"the job that held QEMU's disk {held.disk.node} still was ended by somebody while it was read; "
                    "run the backup again",
                )

    def release(self, held: HeldDisk) -> None:
        """Let a disk go; the guest's writes are not copied any more. Further calls do nothing.

        Raises:
            HoldfastError: SOURCE_UNREADABLE.
        """
        with self._lock:
            if not held.held:
                return
            fleecing.release(self._monitor, held.fleece)
            held.held = False
            if not any(each.held for each in self._disks):
                self._let_go()

    def _let_go(self) -> None:
        if self._serving:
            self._serving = False
            fleecing.stop_server(self._monitor)
        # A scratch image that finds no room stops the machine, and nothing but its end lets the write succeed.
        if self._was_running and self._status() == "io-error":
            self._monitor.execute("cont")

    def commit(self, held: HeldDisk) -> None:
        """Go on from the new point.

        Raises:
            HoldfastError: SOURCE_UNREADABLE if that could not be done.
        """
        with self._lock:
            self.release(held)
            there = read_bitmaps(self._monitor, held.disk.node)
            if held.new not in there:
                raise HoldfastError(ErrorCode.SOURCE_UNREADABLE, f"QEMU has lost the bitmap {held.new}")
            self._monitor.transaction(bitmaps.after_commit(held.disk.node, there, held.new))
            held.bitmaps_stand = False

    def abandon(self, held: HeldDisk) -> None:
        """Go on from the parent, with every change since.

        Raises:
            HoldfastError: SOURCE_UNREADABLE if that could not be done; the next opening does it.
        """
        with self._lock:
            self.release(held)
            if held.bitmaps_stand:
                there = read_bitmaps(self._monitor, held.disk.node)
                self._monitor.transaction(bitmaps.after_failure(held.disk.node, there, held.new, held.parent))
                held.bitmaps_stand = False

    def undo(self) -> None:
        """Take back a `hold` that failed, as far as QEMU lets us; the next opening does the rest."""
        with self._lock, contextlib.suppress(HoldfastError):
            fleecing.clear_leftovers(self._monitor)
            for held in self._disks:
                self.abandon(held)
            self._let_go()

    def close(self, held: HeldDisk | None = None) -> None:
        """Let a disk go, as far as QEMU lets us, and close the connection with the last one; None means all."""
        with self._lock:
            for each in self._disks if held is None else [held]:
                with contextlib.suppress(HoldfastError):  # It has gone, or the next opening clears it away.
                    self.release(each)
                each.held = each.open = False
            if not any(each.open for each in self._disks):
                self._monitor.close()

    @understanding("state")
    def _status(self) -> str:
        return str(self._monitor.execute("query-status")["status"])


def _moment(held: HeldDisk, asked: AskedDisk) -> list[Action]:
    """Return a disk's part of the transaction: the next bitmap before the moment, the stop behind it."""
    granularity = min(GRANULARITY_BYTES_MAX, asked.block_bytes)
    node, persistent = held.disk.node, held.disk.persistent
    actions = [
        bitmaps.begin(node, held.new, granularity_bytes=granularity, persistent=persistent),
        fleecing.hold(held.fleece, held.disk),
    ]
    return [*actions, bitmaps.stop(node, held.parent)] if held.parent else actions


@contextlib.contextmanager
def _all_frozen(asked: Sequence[AskedDisk]) -> Iterator[Mapping[Path | None, bool]]:
    """Freeze the guests whose agents are named; gives, by socket, whether its file systems are frozen."""
    with contextlib.ExitStack() as stack:
        agents = sorted({each.agent for each in asked if each.agent is not None})
        yield {agent: stack.enter_context(frozen(agent)) for agent in agents}
