"""Delta encoding: a disk whose database is worked on between backups, whose log grows, whose configuration is edited.

The same images are saved twice: as ever, and into a cluster of their own with deltas switched off, which shows what
Zstandard alone makes of the same changed blocks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from benchmarks.ext4 import check_filesystem, update_file
from benchmarks.reduction.clones import log
from benchmarks.reduction.cluster import check_restored, fresh_cluster, last_stats, on_disk_bytes
from benchmarks.reduction.databases import Database
from benchmarks.reduction.disks import Content, Template, copy_sparse, put_files
from benchmarks.reduction.rows import DELTAS, Row, Share
from benchmarks.spans import data_blocks
from holdfast.results import TransferStats, VolumeSpec
from holdfast_core.model.block import Codec, Kind
from holdfast_core.model.keys import KeyRing, generate_secrets

MB: Final = 1_000_000
BLOCK_BYTES: Final = 64 * 1024
_VOLUME: Final = "disk"
_LOG: Final = PurePosixPath("/var/log/app.log")
_CONFIGURATION: Final = PurePosixPath("/etc/app/app.conf")
_DATA: Final = PurePosixPath("/var/lib/app")


@dataclass(frozen=True, slots=True)
class Working:
    """What happens between two backups.

    Attributes:
        backups: increments.
        transactions: of the database, before each.
        log_bytes: log at the beginning.
        logged_bytes: log that is added before each.
    """

    backups: int = 5
    transactions: int = 500
    log_bytes: int = 8 * MB
    logged_bytes: int = 256 * 1024


@dataclass(frozen=True, slots=True)
class InPlace:
    """Blocks of an image that differ from what an earlier one has at their place, where that is not zero.

    Attributes:
        blocks: how many.
        plain_bytes: their content.
        zstd_bytes: sealed with Zstandard and no base.
    """

    blocks: int
    plain_bytes: int
    zstd_bytes: int


def measure_changes(
    template: Template, database: Database, plan: Working, *, work: Path, say: Callable[[str], None]
) -> Row:
    """Save a disk, and then increments of it while its database works.

    Raises:
        benchmarks.reduction.cluster.WrongBytes: the last backup was not restored as it was saved.
    """
    work.mkdir()
    image, before = work / "disk.img", work / "before.img"
    disk = _WorkingDisk(image, template, database, plan, work / "scratch")
    with_deltas: list[TransferStats] = []
    without: list[TransferStats] = []
    in_place: list[InPlace] = []
    with ExitStack() as open_clusters:
        ours = open_clusters.enter_context(fresh_cluster(work / "deltas"))
        plain = open_clusters.enter_context(fresh_cluster(work / "plain"))
        ours.register_vm("vm", {_VOLUME: image})
        plain.register_vm("vm", {_VOLUME: VolumeSpec(image, delta=False)})
        first, plain_first = ours.create_snapshot("vm"), plain.create_snapshot("vm")
        backup = ""
        for number in range(plan.backups):
            copy_sparse(image, before)
            disk.work(number)
            backup = ours.incremental_backup("vm", first)
            with_deltas.append(last_stats(ours))
            plain.incremental_backup("vm", plain_first)
            without.append(last_stats(plain))
            in_place.append(changed_in_place(before, image))
            stats = with_deltas[-1]
            say(
                f"  {database.name}, backup {number + 1}: {stats.changed_bytes / 1e6:.1f} MB changed, "
                f"{stats.stored_bytes / 1e6:.2f} MB stored; Zstandard alone {without[-1].stored_bytes / 1e6:.2f} MB"
            )
        check_restored(ours, (first, backup), {_VOLUME: image}, work / "restored")
    check_filesystem(image)
    return changes_row(
        database.name, with_deltas, without, in_place, disk.database_bytes, plan, on_disk_bytes(work / "deltas")
    )


def changes_row(
    name: str,
    with_deltas: Sequence[TransferStats],
    without: Sequence[TransferStats],
    in_place: Sequence[InPlace],
    database_bytes: int,
    plan: Working,
    kept_bytes: int,
) -> Row:
    """Return the row of increments; the blocks that were coded as deltas are judged."""
    changed = sum(stats.changed_bytes for stats in with_deltas)
    return Row(
        name=f"delta encoding, disk with {name}",
        goal=DELTAS,
        workload=(
            f"Debian disk (ext4) with a database of {name}, {database_bytes / 1e6:.0f} MB; before each of "
            f"{plan.backups} increments {plan.transactions} transactions that update two rows at random and add two, "
            f"{plan.logged_bytes // 1024} KiB appended to a log of {plan.log_bytes / 1e6:.0f} MB, a configuration file "
            "written anew"
        ),
        formula="1 - sealed bytes of the delta-coded blocks / their plaintext",
        figure=Share(
            "delta-coded blocks",
            sum(stats.delta_bytes for stats in with_deltas),
            sum(stats.delta_plain_bytes for stats in with_deltas),
        ),
        beside=(
            Share(
                "Zstandard alone on blocks changed in place",
                sum(each.zstd_bytes for each in in_place),
                sum(each.plain_bytes for each in in_place),
            ),
            Share("all changed blocks, index included", sum(stats.stored_bytes for stats in with_deltas), changed),
            Share(
                "all changed blocks with deltas switched off",
                sum(stats.stored_bytes for stats in without),
                sum(stats.changed_bytes for stats in without),
            ),
        ),
        facts={
            "delta blocks": sum(stats.delta_blocks for stats in with_deltas),
            "blocks changed in place": sum(each.blocks for each in in_place),
            "changed blocks": sum(stats.changed_blocks for stats in with_deltas),
            "bytes on the node's disk, snapshot included": kept_bytes,
        },
    )


def changed_in_place(before: Path, after: Path) -> InPlace:
    """Compare two images block by block, and seal what changed as if there were no deltas."""
    sealer = KeyRing(generate_secrets(0, lambda count: bytes(range(count)))).sealer(Kind.VOLUME, 1)
    count = plain = packed = 0
    earlier = data_blocks(before, BLOCK_BYTES)
    number, content = next(earlier, (-1, b""))
    for at, block in data_blocks(after, BLOCK_BYTES):
        while 0 <= number < at:
            number, content = next(earlier, (-1, b""))
        if number == at and content != block:
            count += 1
            plain += len(block)
            packed += len(sealer.seal(block, codec=Codec.ZSTD).data)
    return InPlace(count, plain, packed)


class _WorkingDisk:
    """A disk, the database on it, and the days that it sees."""

    def __init__(self, image: Path, template: Template, database: Database, plan: Working, scratch: Path) -> None:
        self._image = image
        self._database = database
        self._plan = plan
        self._scratch = scratch
        self._dice = random.Random(plan.transactions)
        self._log = scratch.with_name("app.log")
        self._log.write_bytes(log("app", plan.log_bytes, self._dice))
        copy_sparse(template.image, image)
        database.work(plan.transactions)
        files: dict[PurePosixPath, Content] = {_DATA / name: path for name, path in database.files().items()}
        files |= {_LOG: self._log, _CONFIGURATION: self._configuration(0)}
        self.database_bytes = sum(path.stat().st_size for path in database.files().values())
        self._there = put_files(image, files, there=template.places, scratch=scratch)

    def work(self, day: int) -> None:
        """Let a day's changes come to the disk, where a guest's kernel would write them."""
        self._database.work(self._plan.transactions)
        with open(self._log, "ab") as out:
            out.write(log("app", self._plan.logged_bytes, self._dice))
        for name, path in self._database.files().items():
            update_file(self._image, _DATA / name, path)
        update_file(self._image, _LOG, self._log)
        configuration: dict[PurePosixPath, Content] = {_CONFIGURATION: self._configuration(day + 1)}
        put_files(self._image, configuration, there=self._there, scratch=self._scratch)

    def _configuration(self, version: int) -> bytes:
        lines = [f"option.{number} = {number * 7919 % 1000}" for number in range(400)]
        lines[version * 13 % len(lines)] = f"option.edited = {version}"
        return ("\n".join(lines) + "\n").encode()
