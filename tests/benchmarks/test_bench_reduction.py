"""The reduction report: its formulas on numbers made up, its parts on small disks, and a miss that is called one."""

from __future__ import annotations

import hashlib
import random
import statistics
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest

from benchmarks.ext4 import check_filesystem, file_extents, make_filesystem, update_file
from benchmarks.packages import Package
from benchmarks.reduction.changes import InPlace, Working, changed_in_place, changes_row, measure_changes
from benchmarks.reduction.clones import Clones, clones_row, measure_clones
from benchmarks.reduction.cluster import (
    WrongBytes,
    allocated_bytes,
    check_restored,
    fresh_cluster,
    last_stats,
    on_disk_bytes,
)
from benchmarks.reduction.databases import Accounts, Database, LmdbBank, SqliteBank
from benchmarks.reduction.disks import Template, build_template
from benchmarks.reduction.rows import DELTAS, TEXT, Goal, Row, Share, details, record, summary
from benchmarks.reduction.tensors import Floats, draw, network, safetensors, tensors_of, write_checkpoint
from benchmarks.reduction.texts import cut, machine_texts, measure_texts, texts_row
from benchmarks.reduction.training import Training, measure_training, training_row
from benchmarks.spans import data_blocks
from holdfast.results import TransferStats

MIB = 1024 * 1024
BLOCK = 64 * 1024


def row(left: int, whole: int, goal: Goal = DELTAS) -> Row:
    """A row with such a figure and nothing beside it."""
    return Row("a row", goal, "something", "1 - left / whole", Share("bytes", left, whole), (), {"counted": 7})


@pytest.mark.parametrize(("left", "met"), [(0, True), (30, True), (31, False), (100, False), (130, False)])
def test_a_goal_is_met_from_its_lower_end_on(left: int, met: bool) -> None:
    assert row(left, 100).met is met
    assert row(left, 100).figure.saved == pytest.approx(1 - left / 100)
    assert ("**SHORT**" in summary([row(left, 100)])) is not met
    assert ("| met |" in summary([row(left, 100)])) is met
    assert record(row(left, 100))["met"] is met


def test_nothing_measured_meets_no_goal() -> None:
    assert not row(0, 0).met
    assert row(0, 0).figure.saved == 0.0


def test_a_row_shows_the_bytes_behind_it() -> None:
    shown = replace(row(1_500_000, 10_000_000), beside=(Share("other", 2_000_000, 4_000_000),))
    assert "| 85.0% | met | 1 - 1.5 / 10.0 MB | 1 - left / whole |" in summary([shown])
    assert "other: 50.0% (1 - 2.0 / 4.0 MB)" in details(shown)
    assert "counted 7" in details(shown)
    assert record(shown)["beside"][0]["saved"] == 0.5


def test_the_template_counts_as_stored_and_not_as_a_vm() -> None:
    template = TransferStats(stored_plain_bytes=100, stored_bytes=40)
    vms = [TransferStats(stored_plain_bytes=10, stored_bytes=5)] * 8
    found = clones_row(template, vms, [110] * 8, Clones(), kept_bytes=99)
    assert found.figure == Share("plaintext", 180, 880)
    assert found.met
    sealed, later, _ = found.beside
    assert (sealed.left_bytes, later.left_bytes) == (80, 80)
    # VMs that share little with their template miss the goal.
    assert not clones_row(template, [TransferStats(stored_plain_bytes=45)] * 8, [110] * 8, Clones(), kept_bytes=0).met


def test_what_was_deduplicated_does_not_count_as_compressed() -> None:
    stats = TransferStats(logical_bytes=900, deduplicated_bytes=800, stored_plain_bytes=100, stored_bytes=71)
    found = texts_row({"logs": stats}, kept_bytes=0)
    assert found.figure == Share("text", 71, 100)
    assert not found.met
    assert texts_row({"logs": replace(stats, stored_bytes=70)}, kept_bytes=0).met


def test_delta_coded_blocks_are_judged_and_all_changed_ones_stand_beside() -> None:
    stats = TransferStats(
        changed_bytes=200, stored_bytes=120, delta_bytes=20, delta_plain_bytes=100, delta_blocks=2, changed_blocks=4
    )
    plain = TransferStats(changed_bytes=200, stored_bytes=180)
    found = changes_row("SQLite", [stats, stats], [plain, plain], [InPlace(2, 120, 90)] * 2, 64, Working(), 0)
    assert found.figure == Share("delta-coded blocks", 40, 200)
    assert found.met
    assert [(each.left_bytes, each.whole_bytes) for each in found.beside] == [(180, 240), (240, 400), (360, 400)]
    assert not changes_row("SQLite", [replace(stats, delta_bytes=31)], [plain], [], 64, Working(), 0).met
    assert not changes_row("SQLite", [plain], [plain], [], 64, Working(), 0).met, "no block was a delta"


def test_what_is_kept_counts_whole_against_what_the_disk_holds() -> None:
    saved, kept = TransferStats(stored_bytes=500), TransferStats(stored_bytes=40)
    found = training_row(saved, kept, Training(), kept_size=50, allocated=1000, disk=600)
    assert found.figure == Share("plaintext", 50, 1000)
    assert found.met
    assert not training_row(saved, kept, Training(), kept_size=51, allocated=1000, disk=600).met


def test_blocks_count_as_changed_in_place_where_both_images_hold_something(tmp_path: Path) -> None:
    same, old, new = (bytes([value]) * BLOCK for value in (1, 2, 3))
    before, after = tmp_path / "before", tmp_path / "after"
    before.write_bytes(same + old + bytes(BLOCK) + old + old)
    after.write_bytes(same + new + new + bytes(BLOCK) + new)
    found = changed_in_place(before, after)
    assert (found.blocks, found.plain_bytes) == (2, 2 * BLOCK)
    assert 0 < found.zstd_bytes < BLOCK


def test_a_file_is_changed_where_it_lies_and_grows_behind_itself(tmp_path: Path) -> None:
    place = PurePosixPath("/var/data")
    tree = tmp_path / "tree"
    source = tmp_path / "source"
    (tree / "var").mkdir(parents=True)
    content = bytearray(random.Random(1).randbytes(40 * 4096 + 100))
    content[8 * 4096 : 12 * 4096] = bytes(4 * 4096)  # which the file system keeps as a hole
    (tree / "var/data").write_bytes(content)
    image = tmp_path / "image"
    make_filesystem(image, size_bytes=16 * MIB, tree=tree)
    before = file_extents(image, place)
    content[5 * 4096 + 7] ^= 1
    source.write_bytes(content)
    assert update_file(image, place, source) == 1
    content[9 * 4096] = 1
    content += b"more" * 5000
    source.write_bytes(content)
    update_file(image, place, source)
    check_filesystem(image)
    after = file_extents(image, place)
    assert after[0].image_offset == before[0].image_offset
    read = bytearray()
    with open(image, "rb") as disk:
        for extent in after:
            assert extent.file_offset == len(read)
            disk.seek(extent.image_offset)
            read += disk.read(extent.length)
    assert bytes(read[: len(content)]) == bytes(content)
    source.write_bytes(b"short")
    with pytest.raises(ValueError, match="shall have 5"):
        update_file(image, place, source)
    with pytest.raises(RuntimeError, match="does not find /nowhere"):
        update_file(image, PurePosixPath("/nowhere"), source)


def test_drawn_floats_are_distributed_normally_and_hardly_compress() -> None:
    content = Floats(random.Random(3)).normal(50_000, 0.02)
    numbers = struct.unpack("<50000f", content)
    assert statistics.fmean(numbers) == pytest.approx(0.0, abs=0.001)
    assert statistics.pstdev(numbers) == pytest.approx(0.02, rel=0.03)
    assert 0.80 < len(zlib.compress(content, 6)) / len(content) < 0.98
    assert min(struct.unpack("<1000f", Floats(random.Random(3)).normal(1000, 1.0, positive=True))) >= 0.0


def test_weights_are_read_as_they_were_written(tmp_path: Path) -> None:
    shapes = {"a.weight": (16, 8), "b.bias": (3,)}
    tensors = draw(shapes, Floats(random.Random(1)), 0.1)
    content = safetensors(tensors, shapes)
    assert tensors_of(content) == tensors
    with pytest.raises(ValueError, match=r"a\.weight does not have its shape|b\.bias does not have its shape"):
        tensors_of(content[:-1])
    with pytest.raises(ValueError, match="too short"):
        tensors_of(b"1234")
    write_checkpoint(tmp_path / "step.pt", shapes, Floats(random.Random(2)))
    assert (tmp_path / "step.pt").stat().st_size > 3 * sum(len(each) for each in tensors.values())
    assert len(network(6_300_000)) == 14


def test_pieces_are_cut_at_the_byte() -> None:
    assert list(cut([b"abc", b"defg", b"hi"], 5)) == [b"abc", b"de"]
    assert list(cut([b"abc"], 5)) == [b"abc"]
    assert list(cut([b"abc"], 0)) == []


@pytest.fixture
def packages(tmp_path: Path) -> list[Package]:
    """Sixty packages of a file that compresses by half."""
    made = []
    for number in range(60):
        path = tmp_path / "source" / f"package-{number}" / "program.py"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"".join(hashlib.sha256(f"{number} {at}".encode()).hexdigest().encode() for at in range(2048)))
        made.append(Package(f"package-{number}", "optional", (path,), path.stat().st_size))
    return made


@pytest.fixture
def template(tmp_path: Path, packages: list[Package]) -> Template:
    """A disk with most of the packages."""
    work = tmp_path / "template"
    work.mkdir()
    return build_template(work, packages, size_bytes=96 * MIB, filled_bytes=6_000_000, others_bytes=1_500_000)


@pytest.mark.slow
def test_allocated_bytes_are_what_the_image_holds_and_wrong_bytes_end_a_row(tmp_path: Path, template: Template) -> None:
    """Counted from the index on one side, and from the image on the other."""
    with fresh_cluster(tmp_path / "cluster") as manager:
        manager.register_vm("vm", {"disk": template.image})
        point_id = manager.create_snapshot("vm")
        assert last_stats(manager).stored_bytes > 0
        held = sum(len(block) for _, block in data_blocks(template.image, BLOCK))
        assert allocated_bytes(manager, point_id) == held > 6_000_000
        check_restored(manager, (point_id, ""), {"disk": template.image}, tmp_path / "first")
        with open(template.image, "r+b") as disk:
            disk.write(b"otherwise")
        with pytest.raises(WrongBytes, match="volume disk was not restored as it was saved"):
            check_restored(manager, (point_id, ""), {"disk": template.image}, tmp_path / "second")
    assert on_disk_bytes(tmp_path / "cluster") > 3_000_000


@pytest.mark.slow
def test_vms_of_a_template_store_what_is_their_own(tmp_path: Path, template: Template) -> None:
    said: list[str] = []
    plan = Clones(count=3, packages_bytes=300_000, log_bytes=50_000)
    found = measure_clones(template, plan, work=tmp_path / "work", say=said.append)
    assert len(said) == 3
    assert 0.4 < found.figure.saved < 1 - 1 / 3
    _, later, sealed = found.beside
    assert later.saved > 0.6
    assert sealed.left_bytes < later.left_bytes


@pytest.mark.slow
def test_text_is_compressed_and_noise_is_reported_as_missed(tmp_path: Path, packages: list[Package]) -> None:
    (tmp_path / "info").mkdir()
    (tmp_path / "info/package-0.list").write_text("/usr\n" * 9000)
    (tmp_path / "status").write_text("Package: package-0\n" * 1000)
    texts = machine_texts(packages, info=tmp_path / "info", logs=tmp_path)
    wanted = {kind: texts[kind] for kind in ("logs", "CSV", "source text", "package lists")}
    found = measure_texts(wanted, each_bytes=500_000, work=tmp_path / "text", say=lambda _: None)
    assert [share.what for share in found.beside] == list(wanted)
    assert found.goal == TEXT
    assert found.met

    def noise() -> Iterator[bytes]:
        yield random.Random(5).randbytes(300_000)

    missed = measure_texts({"noise": noise}, each_bytes=500_000, work=tmp_path / "noise", say=lambda _: None)
    assert not missed.met
    assert "**SHORT**" in summary([missed])


@pytest.mark.slow
@pytest.mark.parametrize("bank", [SqliteBank, LmdbBank])
def test_deltas_beat_zstandard_on_a_database(
    tmp_path: Path, template: Template, bank: type[SqliteBank] | type[LmdbBank]
) -> None:
    words = [f"word{number}" for number in range(500)]
    database: Database = bank(tmp_path / "database", 6 * MIB, Accounts(random.Random(1), words))
    try:
        plan = Working(backups=2, transactions=60, log_bytes=200_000, logged_bytes=20_000)
        found = measure_changes(template, database, plan, work=tmp_path / "work", say=lambda _: None)
    finally:
        database.close()
    assert found.facts["delta blocks"] > 20
    assert found.met
    in_place, all_changed, without = found.beside
    assert found.figure.saved > in_place.saved
    assert all_changed.left_bytes < without.left_bytes


@pytest.mark.slow
def test_only_the_weights_are_kept(tmp_path: Path, template: Template, packages: list[Package]) -> None:
    plan = Training(parameters=1000, checkpoints=1, dataset_bytes=300_000)
    texts = (path.read_bytes() for package in packages for path in package.paths)
    found = measure_training(template, plan, texts, work=tmp_path / "work", say=lambda _: None)
    # One layer is the least: 12.6 MB of weights, and three times that in the checkpoint.
    assert 12_580_000 < found.figure.left_bytes < 12_700_000
    assert found.figure.whole_bytes > 4 * found.figure.left_bytes
    assert not found.met
