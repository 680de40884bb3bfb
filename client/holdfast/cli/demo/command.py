"""The demo's story, step by step, told as it goes."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from holdfast.cli.demo.cluster import DemoCluster, running_cluster
from holdfast.cli.demo.files import SourceFile, collect, plan_changes
from holdfast.cli.demo.images import ImageMaker, choose_maker
from holdfast.cli.demo.report import Read, Write, print_report
from holdfast.cli.output import format_seconds, print_line
from holdfast.cli.progress import shown
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import MIB
from holdfast_core.runtime.clock import Clock, SystemClock
from holdfast_core.runtime.options import format_size

if TYPE_CHECKING:
    from holdfast import StateManager

app = typer.Typer()

NODES: Final = 3
_DEAD_NODE: Final = 2
_TASK: Final = "demo-task"
_IMAGE_BYTES_MIN: Final = 256 * MIB
_IMAGE_STEP_BYTES: Final = 64 * MIB


@app.command("demo")
def demo(
    folder: Annotated[
        Path | None,
        typer.Option("--dir", metavar="DIR", help="Work here and keep everything; a temporary one if not given."),
    ] = None,
    size_mib: Annotated[
        int,
        typer.Option("--size", metavar="MIB", min=8, max=4096, help="About how much of real files to use."),
    ] = 200,
) -> None:
    """Show the whole job on this machine: snapshot, change, back up, lose a node, rebuild, compare.

    Needs neither root nor etcd. Exit code 6 if what was rebuilt differs from what was saved.
    """
    with _work_folder(folder) as work:
        same = Demo(work, clock=SystemClock()).run(size_mib * MIB)
    if not same:
        raise HoldfastError(ErrorCode.CORRUPT, "what was rebuilt differs from what was saved; keep this output")


@contextmanager
def _work_folder(asked: Path | None) -> Iterator[Path]:
    if asked is None:
        with tempfile.TemporaryDirectory(prefix="holdfast-demo-") as name:
            yield Path(name)
        return
    work = asked.absolute()
    if work.exists() and any(work.iterdir()):
        raise HoldfastError(ErrorCode.TARGET_EXISTS, f"{work} is not empty; choose another --dir")
    work.mkdir(parents=True, exist_ok=True)
    yield work


@dataclass(frozen=True, slots=True)
class _Saved:
    """What must come back: per point a name, snapshot, backup and SHA-256; and the application data."""

    points: tuple[tuple[str, str, str, str], ...]
    storage_id: str
    data_digest: str


class Demo:
    """One run in a work folder; the steps in order, and what they measured."""

    def __init__(self, work: Path, *, clock: Clock) -> None:
        self._work = work
        self._clock = clock
        self._start_s = clock.monotonic_s()
        self._writes: list[Write] = []
        self._reads: list[Read] = []

    def run(self, file_bytes: int) -> bool:
        """Run everything; return whether all that was rebuilt is identical."""
        from holdfast import StateManager

        files = collect(file_bytes)
        maker = choose_maker(self._work)
        self._tell(f"starting a coordinator and {NODES} storage nodes, each a process of its own")
        with (
            running_cluster(self._work / "cluster", nodes=NODES) as cluster,
            StateManager(cluster.coordinator, token_file=cluster.directory.admin_token) as manager,
        ):
            saved = self._save(manager, maker, files)
            self._break(cluster)
            self._rebuild(manager, saved)
            stats = manager.stats()
            print_report(self._writes, self._reads, used_bytes=stats.cluster_used_bytes, copies=NODES)
        self._tell("done")
        return all(read.identical for read in self._reads)

    def _save(self, manager: StateManager, maker: ImageMaker, files: list[SourceFile]) -> _Saved:
        disk, second = self._work / "vm-1.raw", self._work / "vm-2.raw"
        template, installed, other = _split(files)
        size_bytes = _image_bytes(files)
        self._tell(f"making a disk of {format_size(size_bytes)} from {len(template)} files of this machine")
        maker.make(disk, template, size_bytes=size_bytes)
        self._tell(f"it is {maker.description}")
        maker.copy(disk, second)

        manager.register_vm("vm-1", {"root": str(disk)})
        first_digest = _digest(disk)
        with shown("snapshot of vm-1") as progress:
            snapshot = manager.create_snapshot("vm-1", progress=progress)
        self._wrote(manager, "snapshot of vm-1", snapshot)

        changes = plan_changes(template, installed, seed=1, folder=self._work / "day-1")
        maker.change(disk, changes)
        self._tell(f"a day passes: {len(changes.written)} files written, {len(changes.removed)} removed on its disk")
        second_digest = _digest(disk)
        with shown("backup of vm-1") as progress:
            backup = manager.incremental_backup("vm-1", snapshot, progress=progress)
        self._wrote(manager, "backup of vm-1", backup)

        maker.change(second, plan_changes(template, other, seed=2, folder=self._work / "day-2"))
        manager.register_vm("vm-2", {"root": str(second)})
        with shown("snapshot of vm-2") as progress:
            other_snapshot = manager.create_snapshot("vm-2", progress=progress)
        self._wrote(manager, "vm-2, same template", other_snapshot)

        data = b"".join(file.path.read_bytes() for file in other)
        storage_id = manager.persist_application_data(_TASK, data)
        self._wrote(manager, "application data", storage_id)
        saved = _Saved(
            points=(
                ("snapshot of vm-1", snapshot, "", first_digest),
                ("backup of vm-1", snapshot, backup, second_digest),
                ("vm-2", other_snapshot, "", _digest(second)),
            ),
            storage_id=storage_id,
            data_digest=hashlib.sha256(data).hexdigest(),
        )
        for gone in (disk, second):
            gone.unlink()
        return saved

    def _break(self, cluster: DemoCluster) -> None:
        cluster.kill_node(_DEAD_NODE)
        self._tell(f"the VMs are thrown away: their disks are deleted. Storage node {_DEAD_NODE} is killed (kill -9)")

    def _rebuild(self, manager: StateManager, saved: _Saved) -> None:
        for number, (what, snapshot, backup, digest) in enumerate(saved.points):
            target = self._work / f"rebuilt-{number}"
            started_s = self._clock.monotonic_s()
            with shown(f"rebuilding {what}") as progress:
                manager.restore_vm(snapshot, backup, target=target, progress=progress)
            seconds = self._clock.monotonic_s() - started_s
            rebuilt = target / "root.raw"
            self._reads.append(Read(what, rebuilt.stat().st_size, seconds, _digest(rebuilt) == digest))
            self._tell(f"{what} rebuilt in {format_seconds(seconds)}")
        started_s = self._clock.monotonic_s()
        data = manager.retrieve_application_data(saved.storage_id)
        seconds = self._clock.monotonic_s() - started_s
        same = hashlib.sha256(data).hexdigest() == saved.data_digest
        self._reads.append(Read("application data", len(data), seconds, same))

    def _wrote(self, manager: StateManager, what: str, made: str) -> None:
        transfer = manager.last_transfer
        if transfer is None:
            raise HoldfastError(ErrorCode.INTERNAL, f"{what} left no figures")
        self._writes.append(Write(what, transfer))
        self._tell(f"{what} saved in {format_seconds(transfer.committed_s)} as {made}")

    def _tell(self, text: str) -> None:
        print_line(f"[{self._clock.monotonic_s() - self._start_s:5.1f} s] {text}")


def _split(files: list[SourceFile]) -> tuple[list[SourceFile], list[SourceFile], list[SourceFile]]:
    """Return what the template holds, and twice a twentieth that is kept aside to be installed on one VM each."""
    aside = [files[start::20] for start in (7, 17)]
    kept = {file.name for part in aside for file in part}
    return [file for file in files if file.name not in kept], aside[0], aside[1]


def _image_bytes(files: list[SourceFile]) -> int:
    """Return the disk's size: three times its files, as much of a real disk is empty too, in steps of 64 MiB."""
    wanted = max(_IMAGE_BYTES_MIN, 3 * sum(file.size_bytes for file in files))
    return -(-wanted // _IMAGE_STEP_BYTES) * _IMAGE_STEP_BYTES


def _digest(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
