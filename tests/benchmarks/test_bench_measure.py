"""Measuring processes, folders, codecs and stages, on tiny inputs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.codec import BLOCK_BYTES, measure_codecs, sample_blocks
from benchmarks.measure import CommandFailed, durable_write_s, process_tree, run_measured, stored_bytes, tree_cpu_s
from benchmarks.stages import cpu_sum_s, measure_stages, scaled
from holdfast_core.model.block import Codec

MIB = 1024 * 1024


def test_a_command_is_measured_with_its_children(tmp_path: Path) -> None:
    """CPU of a child's child counts, so does its memory, and output is kept."""
    burn = "subprocess.run([sys.executable, '-c', 'sum(range(3_000_000))'])"
    script = f"import subprocess, sys; kept = bytearray(80 << 20); print('said'); {burn}"
    took = run_measured([sys.executable, "-c", script], scratch=tmp_path)
    assert took.output == "said\n"
    assert 80 * MIB < took.peak_rss_bytes < 200 * MIB
    assert took.cpu_s > 0.03
    assert took.wall_s > 0.03


@pytest.mark.slow
def test_memory_of_children_counts(tmp_path: Path) -> None:
    """A command that holds 80 MiB beside a child that holds as much takes both."""
    hold = "kept = bytearray(80 << 20); kept[::4096] = b'1' * (20 << 10)"
    child = f"subprocess.run([sys.executable, '-c', {hold + '; import time; time.sleep(0.3)'!r}])"
    took = run_measured([sys.executable, "-c", f"import subprocess, sys; {hold}; {child}"], scratch=tmp_path)
    assert 160 * MIB < took.peak_rss_bytes < 280 * MIB


def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    """The end of its stderr is in the message."""
    with pytest.raises(CommandFailed, match=r"exited with 3: no such thing"):
        run_measured(
            [sys.executable, "-c", "import sys; print('no such thing', file=sys.stderr); sys.exit(3)"], scratch=tmp_path
        )


def test_the_tree_of_a_process_has_its_children() -> None:
    """A child that waits is in the tree, and its CPU time counts."""
    script = "import sys; sum(range(3_000_000)); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert child.pid in process_tree(os.getpid())
        assert tree_cpu_s(child.pid) > 0.0
        child.communicate()


def test_stored_bytes_are_what_the_disk_gives(tmp_path: Path) -> None:
    """Blocks count, not lengths; links do not count."""
    (tmp_path / "folder").mkdir()
    with open(tmp_path / "folder/sparse", "wb") as out:
        out.truncate(10 * MIB)
        out.write(os.urandom(8192))
        os.fsync(out.fileno())
    (tmp_path / "link").symlink_to("folder/sparse")
    assert 8192 <= stored_bytes(tmp_path) < MIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Sixteen blocks of text that compress, beside sixteen of noise and a hole."""
    path = tmp_path / "image"
    text = b"".join(f"line {at} of some text\n".encode() for at in range(60_000))[: 16 * BLOCK_BYTES]
    with open(path, "wb") as out:
        out.write(text)
        out.seek(8 * BLOCK_BYTES, os.SEEK_CUR)
        out.write(os.urandom(16 * BLOCK_BYTES))
    return path


def test_durable_writes_leave_nothing_behind(tmp_path: Path, image: Path) -> None:
    """More bytes than the image has are written by going round; the file is removed."""
    assert durable_write_s(image, tmp_path, total_bytes=5 * MIB) > 0.0
    assert not (tmp_path / "durable-write").exists()


def test_codecs_are_compared_on_the_same_blocks(image: Path) -> None:
    """Noise is stored as it is, text shrinks, and Zstandard shrinks it more than LZ4."""
    blocks = sample_blocks(image, every=2)
    assert len(blocks) == 16
    figures = {each.name: each for each in measure_codecs(blocks)}
    assert figures["stored"].ratio == 1.0
    assert 1.0 < figures["lz4"].ratio < figures["zstd-1"].ratio
    assert all(each.seal_mb_s > 0 and each.open_mb_s > 0 for each in figures.values() if each.name != "zstd-3")


@pytest.mark.slow
def test_stages_cover_a_snapshot(tmp_path: Path, image: Path) -> None:
    """Every stage was measured; sending and keeping count once a copy; the sum does not count compressing twice."""
    figures = measure_stages(image, tmp_path, sample_blocks(image, every=1), Codec.ZSTD)
    names = [each.name for each in figures]
    assert names[0] == "read"
    assert "compress and seal" in names
    assert "send and receive, gRPC" in names
    assert figures[0].bytes_done >= 32 * BLOCK_BYTES
    once = sum(each.cpu_s for each in figures if each.per == "once" and each.name != "compress")
    copy = sum(each.cpu_s for each in figures if each.per == "per copy")
    assert cpu_sum_s(figures, copies=3) == pytest.approx(once + 3 * copy)
    assert scaled(figures, 2.0)[-1].bytes_done == 2 * figures[-1].bytes_done
