"""What happens to dirty bitmaps, against a model of a disk that knows what really changed.

The model runs the actions one after the other with writes in between, because a disk in a thread of its own may write
there: no order of writes, backups, failures and deaths may lose a change.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.sources.qmp import bitmaps
from holdfast.sources.qmp.bitmaps import Action, Bitmap
from holdfast.sources.qmp.fleecing import server_socket

BLOCKS = 40


class Disk:
    """Blocks that carry the number of their last write, and bitmaps as QEMU keeps them."""

    def __init__(self) -> None:
        self.content = [0] * BLOCKS
        self.bitmaps: dict[str, tuple[Bitmap, set[int]]] = {}
        self.points: dict[str, list[int]] = {}
        self.held: list[int] = []
        self._writes = 0

    def write(self, block: int) -> None:
        """Write a block."""
        self._writes += 1
        self.content[block] = self._writes
        for bitmap, dirty in self.bitmaps.values():
            if bitmap.recording:
                dirty.add(block)

    def told(self) -> dict[str, Bitmap]:
        """The bitmaps as the product sees them."""
        return {name: bitmap for name, (bitmap, _) in self.bitmaps.items()}

    def run(self, actions: list[Action], writes: list[int]) -> None:
        """Run actions; the disk is written between any two of them."""
        for at, action in enumerate(actions):
            self._do(action["type"], action["data"])
            if at < len(writes):
                self.write(writes[at])

    def _do(self, kind: str, data: dict[str, object]) -> None:
        name = str(data.get("name", data.get("target")))
        if kind == "blockdev-backup":
            self.held = list(self.content)
            return
        verb = kind.removeprefix("block-dirty-bitmap-")
        if verb == "add":
            assert name not in self.bitmaps
            self.bitmaps[name] = (Bitmap(name, recording=True), set())
            return
        bitmap, dirty = self.bitmaps[name]
        if verb == "remove":
            del self.bitmaps[name]
        elif verb == "merge":
            sources = data["bitmaps"]
            assert isinstance(sources, list)
            for source in sources:
                dirty |= self.bitmaps[source][1]
        else:
            self.bitmaps[name] = (replace(bitmap, recording=verb == "enable"), dirty)

    def back_up(self, point: str, parent: str, how: str, writes: list[int]) -> None:
        """Make a backup that ends in one of several ways; checks that its hint names all that changed."""
        new, wanted = f"holdfast-{point}", f"holdfast-{parent}"
        usable = bool(parent) and not bitmaps.why_unusable(self.told(), wanted)
        if usable:
            self.run(bitmaps.repairs("disk", self.told(), wanted), writes)
        hold: Action = {"type": "blockdev-backup", "data": {}}
        actions = [bitmaps.begin("disk", new, granularity_bytes=1, persistent=False), hold]
        self.run([*actions, bitmaps.stop("disk", wanted)] if usable else actions, writes)
        if usable:
            before = self.points[parent]
            really = {at for at in range(BLOCKS) if before[at] != self.held[at]}
            assert really <= self.bitmaps[wanted][1]
        if how in ("commit", "die after commit"):
            self.points[point] = self.held
        if how == "commit":
            self.run(bitmaps.after_commit("disk", self.told(), new), writes)
        elif how == "fail":
            self.run(bitmaps.after_failure("disk", self.told(), new, wanted if usable else ""), writes)


Backup = tuple[int, str, list[int]]
a_write = st.integers(0, BLOCKS - 1)
a_backup = st.tuples(
    st.integers(0, 4),
    st.sampled_from(["commit", "commit", "fail", "die", "die after commit"]),
    st.lists(a_write, max_size=6),
)


@pytest.mark.slow
@settings(max_examples=400)
@given(st.lists(st.tuples(st.lists(a_write, max_size=8), a_backup), max_size=14))
def test_a_hint_names_every_change_whatever_happened_before(
    life: list[tuple[list[int], tuple[int, str, list[int]]]],
) -> None:
    disk = Disk()
    for number, (writes, (back, how, meanwhile)) in enumerate(life):
        for block in writes:
            disk.write(block)
        points = list(disk.points)
        # Mostly the newest point is built on; sometimes an older one, or none.
        parent = points[-1 - back % 3] if len(points) > back % 3 and back != 4 else ""
        disk.back_up(f"p{number}", parent, how, meanwhile)


@given(st.lists(st.sampled_from(["commit", "fail"]), min_size=1, max_size=12))
def test_without_deaths_exactly_the_newest_points_bitmap_is_there_and_it_is_used(life: list[str]) -> None:
    disk = Disk()
    disk.back_up("p", "", "commit", [])
    newest = "p"
    for number, how in enumerate(life):
        disk.write(number)
        assert not bitmaps.why_unusable(disk.told(), f"holdfast-{newest}")
        disk.back_up(f"p{number}", newest, how, [])
        newest = f"p{number}" if how == "commit" else newest
        assert list(disk.bitmaps) == [f"holdfast-{newest}"]


@pytest.mark.parametrize(
    ("there", "why"),
    [
        ([], "has no bitmap holdfast-p"),
        ([Bitmap("holdfast-q", recording=True)], "has the bitmap holdfast-q and not holdfast-p"),
        ([Bitmap("holdfast-p", recording=True, inconsistent=True)], "inconsistent"),
        ([Bitmap("holdfast-p", recording=True, busy=True)], "in use"),
        ([Bitmap("holdfast-p", recording=False)], "none went on from it"),
        ([Bitmap("holdfast-p", recording=False), Bitmap("holdfast-q", recording=True, inconsistent=True)], "none went"),
        ([Bitmap("holdfast-p", recording=False), Bitmap("holdfast-q", recording=True)], ""),
    ],
)
def test_which_bitmap_can_be_used(there: list[Bitmap], why: str) -> None:
    told = bitmaps.why_unusable({bitmap.name: bitmap for bitmap in there}, "holdfast-p")
    assert why in told
    assert bool(told) == bool(why)


def test_bitmaps_of_others_are_left_alone() -> None:
    told: list[dict[str, object]] = [
        {"name": "backup-of-somebody", "recording": False},
        {"recording": True},
        {"name": "holdfast-p", "recording": True, "busy": False, "persistent": True},
    ]
    assert bitmaps.bitmaps_of(told) == {"holdfast-p": Bitmap("holdfast-p", recording=True)}


def test_a_disk_keeps_the_bitmaps_of_a_few_points() -> None:
    there = {f"holdfast-p{at}": Bitmap(f"holdfast-p{at}", recording=True) for at in range(20)}
    removed = bitmaps.after_commit("disk", there, "holdfast-p3")
    assert len(there) - len(removed) == bitmaps.KEPT_MAX
    assert "holdfast-p3" not in {action["data"]["name"] for action in removed}


def test_exports_are_served_beside_the_monitor_where_its_path_is_short_enough() -> None:
    assert server_socket(Path("/run/vm/qmp")) == Path("/run/vm/qmp.nbd")
    long = Path("/run") / ("x" * 99) / "qmp"
    assert len(str(server_socket(long))) < 100
    assert server_socket(long) == server_socket(long)
