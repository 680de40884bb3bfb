"""Which dirty bitmaps a disk has, and what happens to them. Pure: lists of bitmaps in, actions for one transaction out.

A bitmap `holdfast-POINT` records what changes since that point. What holds at any moment, wherever a process dies:

* A bitmap that records has everything that changed since its point.
* A bitmap that has stopped recording has everything up to the moment at which another one, that is still there,
  began. Both together have everything since its point; merging others into it too adds too much, never too little.

So a bitmap is stopped only in the transaction that begins the next one, and wherever one is removed all those that
have stopped are removed with it, or made whole before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from holdfast.sources.nbd import BITMAP_PREFIX

KEPT_MAX: Final = 8
"""How many bitmaps of points a disk keeps: an orchestrator may build on several points in turn."""

Action = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Bitmap:
    """A dirty bitmap of a disk.

    Attributes:
        name: `holdfast-` and a point's id.
        recording: whether writes set bits in it now.
        inconsistent: QEMU ended without writing it out; it can only be removed.
        busy: a job or an export uses it.
    """

    name: str
    recording: bool
    inconsistent: bool = False
    busy: bool = False

    @property
    def sound(self) -> bool:
        """Whether it can be merged, stopped and read."""
        return not (self.inconsistent or self.busy)


def bitmaps_of(told: Iterable[Mapping[str, Any]]) -> dict[str, Bitmap]:
    """Return the bitmaps of ours among QEMU's `BlockDirtyInfo`, by name."""
    found = (
        Bitmap(
            name=str(each["name"]),
            recording=bool(each.get("recording")),
            inconsistent=bool(each.get("inconsistent", False)),
            busy=bool(each.get("busy", False)),
        )
        for each in told
        if str(each.get("name", "")).startswith(BITMAP_PREFIX)
    )
    return {bitmap.name: bitmap for bitmap in found}


def why_unusable(bitmaps: Mapping[str, Bitmap], parent: str) -> str:
    """Return why the parent's bitmap cannot be used, as a phrase; empty if it can, after `repairs`."""
    bitmap = bitmaps.get(parent)
    if bitmap is None:
        others = sorted(bitmaps)
        return f"the disk has the bitmap {others[0]} and not {parent}" if others else f"the disk has no bitmap {parent}"
    if bitmap.inconsistent:
        return f"the bitmap {parent} is inconsistent, because QEMU ended without writing it out"
    if bitmap.busy:
        return f"the bitmap {parent} is in use by another job or export of QEMU"
    if not bitmap.recording and not _others(bitmaps, parent):
        return f"the bitmap {parent} has stopped recording, and none went on from it"
    return ""


def repairs(node: str, bitmaps: Mapping[str, Bitmap], parent: str) -> list[Action]:
    """Return what makes the parent's bitmap whole again after a process died with a backup under way."""
    if why_unusable(bitmaps, parent) or bitmaps[parent].recording:
        return []
    others = _others(bitmaps, parent)
    actions = [_on(node, "enable", parent), _merge(node, others, parent)]
    # With several, some may belong to points of another line, to which they are of use.
    return [*actions, _on(node, "remove", others[0])] if len(others) == 1 else actions


def begin(node: str, new: str, *, granularity_bytes: int, persistent: bool) -> Action:
    """Return what begins to record; it comes before the moment of the point."""
    data = {"node": node, "name": new, "granularity": granularity_bytes, "persistent": persistent}
    return {"type": "block-dirty-bitmap-add", "data": data}


def stop(node: str, parent: str) -> Action:
    """Return what stops the parent's bitmap; it comes behind the moment of the point, so that none is missed."""
    return _on(node, "disable", parent)


def after_commit(node: str, bitmaps: Mapping[str, Bitmap], new: str) -> list[Action]:
    """Return what is removed when the new point is durable: all that has stopped, and what is too much."""
    free = [bitmap for name, bitmap in bitmaps.items() if name != new and not bitmap.busy]
    stopped = [bitmap.name for bitmap in free if bitmap.inconsistent or not bitmap.recording]
    going_on = sorted(bitmap.name for bitmap in free if bitmap.name not in stopped)
    return [_on(node, "remove", name) for name in (*stopped, *going_on[KEPT_MAX - 1 :])]


def after_failure(node: str, bitmaps: Mapping[str, Bitmap], new: str, parent: str) -> list[Action]:
    """Return what lets the parent's bitmap go on with every change since; `parent` is empty if it was not stopped."""
    if new not in bitmaps:
        return []
    remove = _on(node, "remove", new)
    if parent not in bitmaps or not bitmaps[parent].sound:
        return [remove]
    return [_on(node, "enable", parent), _merge(node, [new], parent), remove]


def _others(bitmaps: Mapping[str, Bitmap], parent: str) -> list[str]:
    return sorted(name for name, bitmap in bitmaps.items() if name != parent and bitmap.sound)


def _on(node: str, verb: str, name: str) -> Action:
    return {"type": f"block-dirty-bitmap-{verb}", "data": {"node": node, "name": name}}


def _merge(node: str, sources: Sequence[str], target: str) -> Action:
    return {"type": "block-dirty-bitmap-merge", "data": {"node": node, "target": target, "bitmaps": list(sources)}}
