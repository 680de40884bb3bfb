"""Reading blocks that lie far apart: the disk hears of all of them before the first is waited for."""

from __future__ import annotations

from pathlib import Path

from holdfast_storagenode.segments.engine import EngineOptions
from tests.storagenode.blocks import make_blocks
from tests.storagenode.engines import FaultyDisk, open_engine

ALL = 1 << 30
LARGE_SEGMENTS = EngineOptions(capacity_bytes=1 << 30, reserve_bytes=0)


class NotedDisk(FaultyDisk):
    """Keeps what it was asked, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, int, int]] = []

    def announce(self, fd: int, offset: int, length: int) -> None:
        self.asked.append(("announce", offset, length))
        super().announce(fd, offset, length)

    def read_at(self, fd: int, length: int, offset: int) -> bytes:
        self.asked.append(("read", offset, length))
        return super().read_at(fd, length, offset)


def test_what_lies_apart_is_announced_before_it_is_read(tmp_path: Path) -> None:
    disk = NotedDisk()
    store = open_engine(tmp_path, options=LARGE_SEGMENTS, disk=disk)
    blocks = make_blocks(60, size=20_000)
    store.put(1, blocks)
    disk.asked.clear()
    apart = [blocks[30], blocks[0], blocks[59], blocks[31]]
    assert store.get(1, [block.id for block in apart], bytes_max=ALL) == apart
    kinds = [kind for kind, _, _ in disk.asked]
    assert kinds == ["announce"] * 3 + ["read"] * 3
    assert [place for _, *place in disk.asked[:3]] == [place for _, *place in disk.asked[3:]]
    disk.asked.clear()
    # Neighbours are one read, and there is nothing to begin before it.
    assert store.get(1, [block.id for block in blocks[:20]], bytes_max=ALL) == blocks[:20]
    assert [kind for kind, _, _ in disk.asked] == ["read"]
    store.close()
