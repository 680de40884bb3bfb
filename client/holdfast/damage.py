"""What an operation could not read: collected while it goes on, told as one error or as a map of ranges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from holdfast.content import ContentDamage
from holdfast.findings import DamagedRange, DamageReason
from holdfast_core.model.errors import HoldfastError
from holdfast_core.model.limits import ERROR_BLOCK_IDS_MAX
from holdfast_core.runtime.blocks.reader import Unreadable

RANGES_NAMED_MAX: Final = 64
_LOOSE_RANGES_MAX: Final = 4096

Places = Mapping[bytes, Sequence[tuple[int, int]]]
"""Byte ranges, (start, end), that index nodes stand for, by id."""


class _Lost(NamedTuple):
    start: int
    end: int
    reason: DamageReason
    block_ids: tuple[bytes, ...]


class DamageReport:
    """Collects what an operation could not read, to name it all at the end.

    Attributes:
        lost_bytes: bytes of content that were asked for and did not come; not those whose index could not be read.
    """

    def __init__(self, what: str, *, tolerant: bool = False) -> None:
        """Begin empty; `what` names the thing being read, for the message.

        What cannot be reached ends the operation, since trying again may read it; `tolerant` collects that, too.
        """
        self._what = what
        self._tolerant = tolerant
        self._missing: dict[bytes, None] = {}
        self._corrupt: dict[bytes, None] = {}
        self._unreachable: dict[bytes, None] = {}
        self._reason: HoldfastError | None = None
        self._ranges: dict[str, list[_Lost]] = {}
        self.lost_bytes = 0

    def add(self, damage: ContentDamage, part: str) -> None:
        """Note damage of `part`, a volume's name or "" for an object; entries' keys are byte offsets.

        Raises:
            HoldfastError: UNREACHABLE at once, unless tolerant.
        """
        reasons = self._note(damage.unreadable)
        lost = []
        for entry in damage.entries:
            ids = tuple(each for each in (entry.block_id, entry.base_id) if each in reasons)
            self.lost_bytes += entry.length
            lost.append(_Lost(entry.key, entry.key + entry.length, _worst(reasons[each] for each in ids), ids))
        self._extend(part, lost)

    def add_index(self, unreadable: Unreadable, part: str, places: Places) -> None:
        """Note index nodes that cannot be read, which make unreadable all that they stand for.

        Raises:
            HoldfastError: UNREACHABLE at once, unless tolerant.
        """
        reasons = self._note(unreadable)
        self._extend(
            part,
            [
                _Lost(start, end, reasons[node_id], (node_id,))
                for node_id, ranges in places.items()
                for start, end in ranges
            ],
        )

    def _note(self, unreadable: Unreadable) -> dict[bytes, DamageReason]:
        """Take over the ids; return the reason of each."""
        if unreadable.unreachable and not self._tolerant and not unreadable.damaged:
            raise unreadable.error(self._what)
        self._missing.update(dict.fromkeys(unreadable.missing))
        self._corrupt.update(dict.fromkeys(unreadable.corrupt))
        self._unreachable.update(dict.fromkeys(unreadable.unreachable))
        self._reason = unreadable.reason or self._reason
        return {
            **dict.fromkeys(unreadable.unreachable, DamageReason.UNREACHABLE),
            **dict.fromkeys(unreadable.missing, DamageReason.MISSING),
            **dict.fromkeys(unreadable.corrupt, DamageReason.CORRUPT),
        }

    def _extend(self, part: str, lost: Sequence[_Lost]) -> None:
        ranges = self._ranges.setdefault(part, [])
        ranges.extend(lost)
        if len(ranges) > _LOOSE_RANGES_MAX:
            ranges[:] = _merged(ranges)

    @property
    def ids(self) -> tuple[bytes, ...]:
        """The ids that are lost; not those that could not be reached."""
        return (*self._corrupt, *self._missing)

    def map(self) -> tuple[DamagedRange, ...]:
        """Return all ranges, by part and offset."""
        return tuple(
            DamagedRange(part, lost.start, lost.end - lost.start, lost.reason, lost.block_ids)
            for part, ranges in sorted(self._ranges.items())
            for lost in _merged(ranges)
        )

    def error(self) -> HoldfastError | None:
        """Return the error that names everything, or None if nothing is damaged."""
        unreadable = Unreadable(
            missing=tuple(self._missing),
            corrupt=tuple(self._corrupt),
            unreachable=tuple(self._unreachable),
            reason=self._reason,
        )
        if not unreadable:
            return None
        named = [
            f"{part + ':' if part else ''}{start}-{end}"
            for part, ranges in sorted(self._ranges.items())
            for start, end in merge_ranges((lost.start, lost.end) for lost in ranges)
        ]
        error = unreadable.error(self._what)
        shown = ", ".join(named[:3]) + (", …" if len(named) > 3 else "")
        return HoldfastError(
            error.code,
            f"{error.message}; damaged bytes: {shown}",
            facts={**error.facts, "ranges": " ".join(named[:RANGES_NAMED_MAX]), "range_count": str(len(named))},
            block_ids=error.block_ids,
        )


def merge_ranges(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return (start, end) ranges in order, neighbours joined."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _merged(ranges: Iterable[_Lost]) -> list[_Lost]:
    """Return ranges in order; neighbours that are lost for one reason are joined, with as many ids as one may name."""
    merged: list[_Lost] = []
    for lost in sorted(ranges, key=lambda each: (each.start, each.end)):
        if merged and lost.start <= merged[-1].end and lost.reason is merged[-1].reason:
            last = merged[-1]
            ids = dict.fromkeys(last.block_ids)
            if len(ids) < ERROR_BLOCK_IDS_MAX:
                ids.update(dict.fromkeys(lost.block_ids))
            merged[-1] = _Lost(last.start, max(last.end, lost.end), last.reason, tuple(ids))
        else:
            merged.append(lost)
    return merged


def _worst(reasons: Iterable[DamageReason]) -> DamageReason:
    """Return what counts for a block and its base: lost is lost, whatever the other is."""
    found = set(reasons)
    for reason in (DamageReason.CORRUPT, DamageReason.MISSING):
        if reason in found:
            return reason
    return DamageReason.UNREACHABLE
