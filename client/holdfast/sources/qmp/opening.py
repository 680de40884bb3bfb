"""The sources of `qmp:` volumes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from holdfast.results import Consistency, VolumeSpec
from holdfast.sources.interface import BackupRun
from holdfast.sources.nbd import ExportedVolume
from holdfast.sources.qmp.machine import AskedDisk, HeldDisk, Machine
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.uris import VolumeUri, parse_volume_uri


class QmpSource(ExportedVolume):
    """A disk of a running QEMU as it stood when its machine's disks were opened."""

    def __init__(self, machine: Machine, held: HeldDisk, run: BackupRun) -> None:
        """Connect to the export of a disk that is held.

        Raises:
            HoldfastError: SOURCE_UNREADABLE.
        """
        self._machine = machine
        self._held = held
        self._parent_id = run.parent_id if held.parent else ""
        self._reader = machine.reader(held)

    def why_unknown(self) -> str:
        """Return what is wrong with the parent's bitmap."""
        return self._held.reason

    def finish(self) -> Consistency:
        """Let the disk go; the guest's file systems were frozen, or it is as after a power cut.

        Raises:
            HoldfastError: SOURCE_UNREADABLE if the disk was not held all the time.
        """
        self._machine.check_held(self._held)
        self._reader.close()
        self._machine.release(self._held)
        return Consistency.APPLICATION if self._held.application else Consistency.CRASH

    def committed(self) -> None:
        """Track from the new point on.

        Raises:
            HoldfastError: SOURCE_UNREADABLE if QEMU has gone or refuses.
        """
        self._reader.close()
        self._machine.commit(self._held)

    def abandoned(self) -> None:
        """Go on tracking from the parent, with every change since.

        Raises:
            HoldfastError: SOURCE_UNREADABLE if QEMU has gone or refuses.
        """
        self._reader.close()
        self._machine.abandon(self._held)

    def close(self) -> None:
        """Release it; may be called more than once."""
        self._reader.close()
        self._machine.close(self._held)


def open_qmp(specs: Mapping[str, VolumeSpec], run: BackupRun) -> dict[str, QmpSource]:
    """Open volumes that are disks of running QEMUs; those of one QEMU at one moment. All of them or none.

    Args:
        specs: volumes by name.
        run: the session that they are opened for.

    Raises:
        HoldfastError: SOURCE_UNREADABLE; INVALID_ARGUMENT if two volumes name one disk.
    """
    machines: dict[Path, dict[str, AskedDisk]] = {}
    for name, spec in specs.items():
        uri = parse_volume_uri(os.fspath(spec.uri))
        machines.setdefault(Path(uri.path), {})[name] = _asked(uri, spec)
    opened: dict[str, QmpSource] = {}
    try:
        for path, asked in machines.items():
            opened.update(_open_machine(path, asked, run))
    except BaseException:
        _give_up(opened.values())
        raise
    return {name: opened[name] for name in specs}


def _asked(uri: VolumeUri, spec: VolumeSpec) -> AskedDisk:
    agent, scratch = uri.parameter("agent"), uri.parameter("scratch")
    return AskedDisk(
        device=uri.parameter("device"),
        block_bytes=spec.block_bytes,
        agent=Path(agent) if agent else None,
        scratch=Path(scratch) if scratch else None,
    )


def _open_machine(path: Path, asked: Mapping[str, AskedDisk], run: BackupRun) -> dict[str, QmpSource]:
    devices = [each.device for each in asked.values()]
    if len(set(devices)) != len(devices):
        twice = next(each for each in devices if devices.count(each) > 1)
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT, f"two volumes name the same disk of QEMU, {twice}; register it once"
        )
    machine = Machine(path, run)
    opened: dict[str, QmpSource] = {}
    try:
        for name, held in zip(asked, machine.hold(list(asked.values())), strict=True):
            opened[name] = QmpSource(machine, held, run)
    except BaseException:
        for source in opened.values():
            source._reader.close()
        machine.undo()
        machine.close()
        raise
    return opened


def _give_up(sources: Iterable[QmpSource]) -> None:
    """Take back what was opened before another machine failed."""
    for source in sources:
        try:
            source.abandoned()
        except HoldfastError:
            continue  # That QEMU has gone as well, and the first error is the one to tell.
        finally:
            source.close()
