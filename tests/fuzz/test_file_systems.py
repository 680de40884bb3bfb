"""File systems of arbitrary metadata: read, they give files or a plain error, and soon."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast import ErrorCode, HoldfastError
from holdfast.files.image_tree import ImageTree
from holdfast.files.partitions import partitions_of
from holdfast_core.model.files.patterns import select
from tests.client.files.images import MIB, make_image

PLAIN = {ErrorCode.SOURCE_UNREADABLE, ErrorCode.LIMIT_EXCEEDED, ErrorCode.INVALID_ARGUMENT}


class Memory:
    """An image in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size_bytes = len(data)

    def read(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= self.size_bytes
        return self._data[offset : offset + length]


@cache
def image(*options: str) -> bytes:
    """A small file system with a little of everything that has metadata."""
    with TemporaryDirectory() as name:
        folder = Path(name) / "folder"
        (folder / "a" / "b").mkdir(parents=True)
        for number in range(40):
            (folder / "a" / f"file-{number}").write_bytes(bytes([number]) * (number * 700))
        (folder / "link").symlink_to("a" * 100)
        (folder / "short").symlink_to("a")
        with (folder / "sparse").open("wb") as stream:
            for at in range(0, 40 * 8192, 8192):
                stream.seek(at)
                stream.write(b"x" * 1024)
        return make_image(Path(name) / "image", folder, "-b", "1024", *options, size=MIB).read_bytes()


def read_all(data: bytes) -> None:
    """Read whatever there is."""
    memory = Memory(data)
    try:
        partitions_of(memory)
        for item in ImageTree(memory).items(select()):
            for _, piece in item.read():
                assert len(piece) <= 4 * MIB
    except HoldfastError as error:
        if error.code not in PLAIN:
            raise


OPTIONS = ((), ("-O", "^extent,^64bit,^metadata_csum"), ("-O", "inline_data", "-I", "256"))
changes = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7), st.binary(min_size=1, max_size=8)),
    min_size=1,
    max_size=6,
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(OPTIONS), changes, st.sampled_from(["inodes", "superblock", "anywhere"]))
def test_arbitrary_metadata_ends_in_an_answer_or_a_plain_error(
    options: tuple[str, ...], wanted: list[tuple[float, int, bytes]], where: str
) -> None:
    data = bytearray(image(*options))
    used = [at for at in range(1024, len(data), 8) if any(data[at : at + 8])]
    if where == "superblock":
        used = [at for at in used if at < 4096]
    elif where == "inodes":
        used = [at for at in used if at < 64 * 1024]
    for place, shift, value in wanted:
        at = min(used[int(place * len(used))] + shift, len(data) - len(value))
        data[at : at + len(value)] = value
    read_all(bytes(data))
    assert len(data) == MIB


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=4096), st.sampled_from([b"", b"EFI PART", b"\x55\xaa"]), st.sampled_from([0, 510, 512, 4096]))
def test_arbitrary_tables_of_partitions(data: bytes, magic: bytes, at: int) -> None:
    disk = io.BytesIO(bytes(8192))
    disk.write(data)
    disk.seek(at)
    disk.write(magic)
    found = partitions_of(Memory(disk.getvalue()))
    assert all(part.offset + part.length <= 8192 for part in found)
