"""File systems that were not unmounted: what is read is what mounting would show, by e2fsprogs' own journal."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from holdfast import ErrorCode
from holdfast.files.ext4.journal import JOURNAL_MAGIC
from holdfast.files.image_tree import ImageTree
from tests.client.files.images import MIB, ImageFile, debugfs, make_image, run
from tests.client.files.trees import make_tree, set_bytes
from tests.client.rig import error_of, noise

VARIANTS = {
    "defaults": (),
    "plain tags": ("-O", "^metadata_csum,^64bit"),
    "64 bits without checksums": ("-O", "^metadata_csum,64bit"),
    "large blocks": ("-b", "4096"),
}


def journal(path: Path, blocks: Sequence[tuple[int, bytes]], *, revoked: Sequence[int] = ()) -> None:
    """Write a committed transaction into an image's journal, and do not apply it."""
    content = path.with_suffix(".blocks")
    content.write_bytes(b"".join(data for _, data in blocks))
    commands = ["journal_open"]
    if blocks:
        commands.append(f"journal_write -b {','.join(str(number) for number, _ in blocks)} {content}")
    if revoked:
        commands.append(f"journal_write -r {','.join(map(str, revoked))}")
    debugfs(path, *commands, "journal_close")


def block_bytes_of(path: Path) -> int:
    return 1024 << int.from_bytes(path.read_bytes()[1048:1052], "little")


def difference(old: Path, new: Path) -> list[tuple[int, bytes]]:
    """The blocks that differ."""
    size = block_bytes_of(old)
    before, after = old.read_bytes(), new.read_bytes()
    return [
        (at // size, after[at : at + size])
        for at in range(0, len(after), size)
        if before[at : at + size] != after[at : at + size]
    ]


def view(path: Path) -> bytes:
    """Everything in an image, as a set."""
    with closing(ImageTree(ImageFile(path))) as tree:
        return set_bytes(tree)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "source")


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_in_the_journal_alone_is_seen(source: Path, tmp_path: Path, variant: str) -> None:
    old = make_image(tmp_path / "old", source, *VARIANTS[variant])
    new = tmp_path / "new"
    shutil.copy(old, new)
    # Content that begins with the journal's magic number is escaped in the journal.
    (tmp_path / "fresh").write_bytes(JOURNAL_MAGIC + noise(20_000, 3))
    debugfs(
        new,
        "rm /big.bin",
        f"write {tmp_path / 'fresh'} fresh",
        "ln /fresh /dir/second",
        "set_inode_field /fresh links_count 2",
        "mkdir /dir/made",
    )
    blocks = difference(old, new)
    journal(old, blocks)
    before = old.read_bytes()
    assert b"needs_recovery" in run("dumpe2fs", "-h", old).encode()
    assert view(old) == view(new)
    assert old.read_bytes() == before
    run("e2fsck", "-fy", "-E", "journal_only", old, check=False)
    assert view(old) == view(new)


def test_the_newest_transaction_counts_and_revoked_blocks_do_not(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"a" * 4096)
    image = make_image(tmp_path / "image", tmp_path / "folder", "-b", "4096", size=16 * MIB)
    number = image.read_bytes().index(b"a" * 4096) // 4096
    journal(image, [(number, b"b" * 4096)])
    assert b"b" * 4096 in view(image)
    journal(image, [(number, b"c" * 4096)])
    assert b"c" * 4096 in view(image)
    journal(image, [], revoked=[number])
    assert b"a" * 4096 in view(image)
    replayed = tmp_path / "replayed"
    shutil.copy(image, replayed)
    run("e2fsck", "-fy", "-E", "journal_only", replayed, check=False)
    assert view(image) == view(replayed)


def test_a_transaction_that_was_not_committed_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"a" * 4096)
    image = make_image(tmp_path / "image", tmp_path / "folder", "-b", "4096", size=16 * MIB)
    number = image.read_bytes().index(b"a" * 4096) // 4096
    journal(image, [(number, b"b" * 4096)])
    data = bytearray(image.read_bytes())
    commit = data.rindex(JOURNAL_MAGIC + (2).to_bytes(4, "big"))
    data[commit : commit + 4] = bytes(4)
    image.write_bytes(data)
    assert b"a" * 4096 in view(image)


@pytest.mark.slow
def test_a_damaged_journal_is_a_plain_error(source: Path, tmp_path: Path) -> None:
    image = make_image(tmp_path / "image", source, "-b", "1024")
    number = image.read_bytes().index(b"small\n") // 1024
    journal(image, [(number, b"x" * 1024)])
    data = bytearray(image.read_bytes())
    start = data.index(JOURNAL_MAGIC + (4).to_bytes(4, "big"))
    for at, value in ((start, 255), (start + 12, 3), (start + 23, 255), (start + 28, 255)):
        broken = data.copy()
        broken[at] ^= value
        image.write_bytes(broken)
        assert error_of(lambda: view(image)).code is ErrorCode.SOURCE_UNREADABLE
