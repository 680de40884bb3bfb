"""File systems in images: what comes out is what went in, no more is read than is needed, and no image does harm."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from holdfast import ErrorCode, HoldfastError
from holdfast.files.image_tree import ImageTree
from holdfast_core.model.files.patterns import select
from tests.client.files.images import MIB, ImageFile, debugfs, make_image, run, with_partitions
from tests.client.files.trees import Likeness, likenesses, make_tree, retrieve, set_bytes, set_of
from tests.client.rig import error_of, noise

VARIANTS = {
    "defaults": (),
    "1 KiB blocks": ("-b", "1024"),
    "4 KiB blocks": ("-b", "4096"),
    "inline data": ("-O", "inline_data", "-I", "512"),
    "large directories": ("-O", "large_dir"),
    "block maps": ("-O", "^extent,^64bit", "-b", "1024"),
    "meta groups": ("-O", "meta_bg,^resize_inode", "-b", "1024", "-g", "1024"),
    "no journal": ("-O", "^has_journal"),
    "32 bits": ("-O", "^64bit,^metadata_csum"),
    "ext2": ("-t", "ext2"),
    "ext3": ("-t", "ext3"),
    "64 KiB blocks": ("-b", "65536"),
    "big clusters": ("-O", "bigalloc", "-C", "65536"),
}


@contextmanager
def opened(image: Path, *, partition: int = 0, root: str = "/") -> Iterator[ImageTree]:
    """A tree of an image, its process ended."""
    with closing(ImageTree(ImageFile(image), partition=partition, root=root)) as tree:
        yield tree


def without(found: dict[bytes, Likeness], *names: bytes) -> dict[bytes, Likeness]:
    return {path: each for path, each in found.items() if path.split(b"/")[0] not in names}


def seconds(found: dict[bytes, Likeness]) -> dict[bytes, Likeness]:
    return {path: replace(each, mtime_ns=each.mtime_ns // 10**9) for path, each in found.items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with one of everything, devices if they can be made."""
    folder = make_tree(tmp_path_factory.mktemp("images") / "source")
    if os.geteuid() == 0:
        os.mknod(folder / "null", 0o20666, os.makedev(1, 3))
        os.mknod(folder / "disk", 0o60640, os.makedev(259, 70_000))
        os.chown(folder / "big.bin", 1234, 70_000)
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_image_gives_what_went_into_it(source: Path, tmp_path: Path, variant: str) -> None:
    size = 64 * MIB if variant in ("64 KiB blocks", "big clusters") else 24 * MIB
    image = make_image(tmp_path / "image", source, *VARIANTS[variant], size=size)
    with opened(image) as tree:
        retrieve(tree, tmp_path / "target")
    # mke2fs keeps whole seconds of times, and with inline data it forgets holes at the ends of files.
    cut = (b"sparse", b"hole at the end") if variant == "inline data" else ()
    found = without(seconds(likenesses(tmp_path / "target")), b"lost+found", *cut)
    assert found == without(seconds(likenesses(source)), *cut)


def test_a_set_is_the_same_from_a_directory_and_from_an_image(source: Path, tmp_path: Path) -> None:
    image = make_image(tmp_path / "image", source, "-b", "1024")
    with opened(image) as tree:
        retrieve(tree, tmp_path / "target", (), ("/lost+found/",))
    with opened(image) as tree:
        from_image = set_bytes(tree, (), ("/lost+found/",))
    assert from_image == set_of(tmp_path / "target")


@pytest.mark.parametrize("table", ["gpt", "mbr"])
def test_partitions(source: Path, tmp_path: Path, table: str) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "hello").write_text("hello")
    make_image(first, tmp_path / "other", size=8 * MIB)
    make_image(second, source)
    only = with_partitions(tmp_path / "only", [first], table=table)
    both = with_partitions(tmp_path / "both", [first, second], table=table)
    with opened(only) as tree:
        assert [item.entry.path for item in tree.items(select(["hello"]))] == [b"hello"]
    with opened(both, partition=2, root="dir/sub") as tree:
        assert [item.entry.path for item in tree.items(select())] == [b"small.txt"]
    assert error_of(lambda: ImageTree(ImageFile(both))).code is ErrorCode.INVALID_ARGUMENT
    assert error_of(lambda: ImageTree(ImageFile(both), partition=3)).code is ErrorCode.NOT_FOUND
    assert error_of(lambda: ImageTree(ImageFile(only), root="/nothing")).code is ErrorCode.NOT_FOUND
    assert error_of(lambda: ImageTree(ImageFile(only), root="/hello")).code is ErrorCode.NOT_FOUND


def test_space_that_was_reserved_and_not_written_is_zero(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "reserved").write_bytes(b"begin" + bytes(200_000))
    (tmp_path / "folder" / "rubbish").write_bytes(noise(MIB))
    image = make_image(tmp_path / "image", tmp_path / "folder", size=8 * MIB)
    debugfs(image, "rm rubbish", "fallocate /reserved 100 300", "set_inode_field reserved size 300000")
    with opened(image) as tree:
        (item,) = tree.items(select(["reserved"]))
    target = tmp_path / "target"
    with opened(image) as tree:
        retrieve(tree, target, ("reserved",))
    assert item.entry.size_bytes == 300_000
    assert (target / "reserved").read_bytes() == b"begin" + bytes(299_995)


@pytest.mark.slow
def test_only_what_is_needed_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "dataset").mkdir(parents=True)
    for number in range(20):
        (folder / "dataset" / f"{number}.bin").write_bytes(noise(4 * MIB, number))
    (folder / "model.safetensors").write_bytes(noise(2 * MIB, 99))
    image = make_image(tmp_path / "image", folder, size=128 * MIB)
    file = ImageFile(image)
    with closing(ImageTree(file)) as tree:
        assert len(list(tree.items(select()))) == 23
        assert file.fetched_bytes < 2 * MIB
        data = set_bytes(tree, ("*.safetensors",))
    assert 2 * MIB < len(data) < 2 * MIB + 4096
    assert file.fetched_bytes < 5 * MIB


class Announced(ImageFile):
    """An image that is told what will be read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.announced: list[tuple[int, int]] = []

    def fetch_ahead(self, start: int, end: int) -> None:
        self.announced.append((start, end))


def test_content_is_announced_before_it_is_read_and_nothing_else_is(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02}.bin").write_bytes(noise(100_000, number))
        (folder / f"{number:02}.other").write_bytes(noise(100_000, 1000 + number))
    (folder / "large.bin").write_bytes(noise(30 * MIB, 7))
    file = Announced(make_image(tmp_path / "image", folder, size=64 * MIB))
    with closing(ImageTree(file)) as tree:
        assert len(list(tree.items(select()))) == 82
        assert not file.announced
        file.fetched.clear()
        set_bytes(tree, ("*.bin",))
    announced = {at for start, end in file.announced for at in range(start // 1024, end // 1024)}
    read = {at for start, length in file.fetched for at in range(start // 1024, (start + length) // 1024)}
    assert 34_000 < len(announced) < 36_000
    assert len(announced - read) < 100
    assert len(file.announced) < 200


@pytest.mark.slow
def test_a_directory_of_many_files(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "many").mkdir(parents=True)
    for number in range(1000):
        (folder / "many" / f"{number:06}-{'n' * 230}").write_text(str(number))
    image = make_image(tmp_path / "image", folder, "-b", "1024")
    run("e2fsck", "-fyD", image, check=False)
    # The hash tree has inner nodes, which hold what would be names to a careless reader.
    assert "Indirect levels: 1" in run("debugfs", "-R", "htree_dump /many", image)
    with opened(image) as tree:
        retrieve(tree, tmp_path / "target", ("/many/",))
    assert likenesses(tmp_path / "target" / "many").keys() == likenesses(folder / "many").keys()
    assert (tmp_path / "target" / "many" / f"000999-{'n' * 230}").read_text() == "999"


def test_files_that_were_deleted_do_not_come_back(source: Path, tmp_path: Path) -> None:
    image = make_image(tmp_path / "image", source)
    debugfs(image, "rm /big.bin", "rm /dir/run.sh", "unlink /empty.txt")
    with opened(image) as tree:
        paths = {item.entry.path for item in tree.items(select())}
    assert paths == likenesses(source).keys() - {b"big.bin", b"dir/run.sh", b"empty.txt"} | {b"lost+found"}


def hostile(image: Path, data: bytes) -> ErrorCode | None:
    """Read all of an image that may be anything; returns the code of the error, if there is one."""
    image.write_bytes(data)
    try:
        with opened(image) as tree:
            set_bytes(tree)
    except HoldfastError as error:
        return error.code
    return None


def test_images_that_are_cut_off(source: Path, tmp_path: Path) -> None:
    data = make_image(tmp_path / "image", source, size=16 * MIB).read_bytes()
    for length in (0, 1, 1023, 1500, 2048, 5000, 70_000, MIB, 3 * MIB):
        assert hostile(tmp_path / "cut", data[:length]) is ErrorCode.SOURCE_UNREADABLE


def test_images_with_flipped_bits_end_in_an_answer_or_a_plain_error(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "a" / "b").mkdir(parents=True)
    for number in range(30):
        (folder / "a" / f"{number}").write_bytes(noise(5000, number))
    good = make_image(tmp_path / "image", folder, size=2 * MIB).read_bytes()
    used = [at for at in range(0, len(good), 64) if any(good[at : at + 64])]
    chance = random.Random(11)
    found = set()
    for _ in range(40):
        data = bytearray(good)
        for _ in range(chance.choice((1, 20, 400))):
            # Metadata lies in the first part; noise in the content would change nothing of the parsing.
            data[min(chance.choice(used[: len(used) // 3]) + chance.randrange(64), len(data) - 1)] ^= (
                1 << chance.randrange(8)
            )
        found.add(hostile(tmp_path / "flipped", bytes(data)))
    assert ErrorCode.SOURCE_UNREADABLE in found
    assert found <= {None, ErrorCode.SOURCE_UNREADABLE, ErrorCode.CORRUPT, ErrorCode.LIMIT_EXCEEDED}


def test_a_directory_that_holds_itself_ends_in_an_error(source: Path, tmp_path: Path) -> None:
    image = make_image(tmp_path / "image", source)
    debugfs(image, "ln /dir /dir/sub/again")
    error = error_of(lambda: hostile_error(image))
    assert error.code is ErrorCode.SOURCE_UNREADABLE
    assert "two places" in str(error)


def hostile_error(image: Path) -> None:
    with opened(image) as tree:
        set_bytes(tree)


def test_files_with_more_content_than_blocks_end_in_an_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    marker = noise(1024, 5)
    (tmp_path / "folder" / "loop").write_bytes(marker)
    image = make_image(tmp_path / "image", tmp_path / "folder", *VARIANTS["block maps"], size=8 * MIB)
    data = bytearray(image.read_bytes())
    at = data.index(marker)
    # A block of numbers of blocks, all of which are its own: three levels of it map sixteen million blocks.
    data[at : at + 1024] = (at // 1024).to_bytes(4, "little") * 256
    image.write_bytes(data)
    debugfs(image, f"set_inode_field loop block[TIND] {at // 1024}", "set_inode_field loop size 16000000000")
    error = error_of(lambda: hostile_error(image))
    assert error.code is ErrorCode.SOURCE_UNREADABLE
    assert "more than that holds" in str(error)


def test_small_files_that_share_blocks_end_in_an_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "000").write_bytes(noise(256 * 1024))
    for number in range(1, 40):
        (tmp_path / "folder" / f"{number:03}").write_bytes(b"x" * 1024)
    image = make_image(tmp_path / "image", tmp_path / "folder", *VARIANTS["block maps"], size=MIB)
    shown = run("debugfs", "-R", "stat /000", image)
    (indirect,) = re.findall(r"\(IND\):(\d+)", shown)
    commands = []
    for number in range(1, 40):
        commands += [f"set_inode_field {number:03} block[IND] {indirect}", f"set_inode_field {number:03} size 262144"]
    debugfs(image, *commands)
    error = error_of(lambda: hostile_error(image))
    assert error.code is ErrorCode.SOURCE_UNREADABLE
    assert "more content than it has blocks" in str(error)


def test_a_name_that_leads_out_is_refused(source: Path, tmp_path: Path) -> None:
    image = make_image(tmp_path / "image", source, "-O", "^metadata_csum")
    data = image.read_bytes()
    assert data.count(b"empty.txt") >= 1
    for name in (b"../../mpt", b"a/b/c.txt"):
        image.write_bytes(data.replace(b"empty.txt", name))
        error = error_of(lambda: hostile_error(image))
        assert error.code is ErrorCode.SOURCE_UNREADABLE


def test_an_error_of_the_image_passes_through(source: Path, tmp_path: Path) -> None:
    file = ImageFile(make_image(tmp_path / "image", source))
    with closing(ImageTree(file)) as tree:

        def fail(offset: int, length: int) -> bytes:
            raise HoldfastError(ErrorCode.UNREACHABLE, "no node answers")

        file.read = fail  # type: ignore[method-assign]
        assert error_of(lambda: list(tree.items(select()))).code is ErrorCode.UNREACHABLE
