"""Reading sparse images and reckoning what is new."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from blake3 import blake3

from benchmarks.spans import Novelty, allocated_ranges, data_blocks, digest, novelty, warm

BLOCK = 64 * 1024


def sparse(path: Path, *, size: int, pieces: dict[int, bytes]) -> Path:
    """A sparse file with some pieces of data."""
    with open(path, "wb") as out:
        out.truncate(size)
        for offset, piece in pieces.items():
            out.seek(offset)
            out.write(piece)
    return path


def test_blocks_are_those_with_data(tmp_path: Path) -> None:
    """Holes and blocks of zeros are passed over; the last block is short; none comes twice."""
    pieces = {0: b"a" * BLOCK, 5 * BLOCK: bytes(BLOCK), 7 * BLOCK + 100: b"b" * 10, 9 * BLOCK: b"c" * 5}
    image = sparse(tmp_path / "image", size=9 * BLOCK + 5, pieces=pieces)
    found = dict(data_blocks(image, BLOCK))
    assert sorted(found) == [0, 7, 9]
    assert found[7][100:110] == b"b" * 10
    assert found[9] == b"c" * 5
    ranges = list(allocated_ranges(image))
    assert ranges[0][0] == 0
    assert ranges[-1][1] == 9 * BLOCK + 5
    assert all(end <= start for (_, end), (start, _) in pairwise(ranges))


def test_a_file_of_holes_has_no_ranges(tmp_path: Path) -> None:
    """SEEK_DATA past the last data is the end, not an error."""
    assert list(allocated_ranges(sparse(tmp_path / "image", size=10 * BLOCK, pieces={}))) == []


def test_novelty_counts_each_content_once(tmp_path: Path) -> None:
    """What moved or was there before is not new."""
    first = sparse(tmp_path / "0", size=4 * BLOCK, pieces={0: b"a" * BLOCK, BLOCK: b"a" * BLOCK})
    second = sparse(tmp_path / "1", size=4 * BLOCK, pieces={2 * BLOCK: b"a" * BLOCK, 3 * BLOCK: b"d" * BLOCK})
    assert novelty([first, second], block_bytes=BLOCK) == [
        Novelty(data_bytes=2 * BLOCK, new_bytes=BLOCK),
        Novelty(data_bytes=2 * BLOCK, new_bytes=BLOCK),
    ]


def test_warming_reads_holes_too(tmp_path: Path) -> None:
    """Peers that do not know holes read them, so they are warmed as well; the digest covers all bytes."""
    image = sparse(tmp_path / "image", size=3 * BLOCK, pieces={BLOCK: b"x"})
    assert warm(image) == 3 * BLOCK
    assert digest(image) == blake3(image.read_bytes()).hexdigest()
