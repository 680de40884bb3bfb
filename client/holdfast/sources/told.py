"""Changes that the caller tracked and tells: `changed=` and `since=` of an incremental backup."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from holdfast.descriptors import Extent
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.names import check_id

Changed = Sequence[tuple[int, int]] | Mapping[str, Sequence[tuple[int, int]]]
"""(offset, length) of each range that changed, in bytes: of the VM's one volume, or by volume name."""

RANGES_MAX: Final = 1 << 22
_OFFSET_MAX: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class ToldChanges:
    """What changed since a point, as the caller says.

    Attributes:
        since: the point.
        volumes: extents by volume name; one entry named "" stands for the VM's only volume.
    """

    since: str
    volumes: Mapping[str, Sequence[Extent]]

    def of(self, name: str) -> Sequence[Extent] | None:
        """Return what changed of a volume, or None if nothing was told of it."""
        return self.volumes.get(name, self.volumes.get(""))

    def check_names(self, names: Iterable[str]) -> None:
        """Compare with the volumes that a VM has.

        Raises:
            HoldfastError: INVALID_ARGUMENT if another is named, or if one list is given and there are several volumes.
        """
        known = set(names)
        if "" in self.volumes and len(known) != 1:
            raise _refused(f"the VM has {len(known)} volumes; give the changed ranges by volume name")
        for name in self.volumes:
            if name and name not in known:
                raise _refused(f"changed ranges are given for {name}, which is no volume of the VM")


def told_changes(changed: Changed | None, since: str) -> ToldChanges | None:
    """Return what a caller told, or None if it told nothing.

    Raises:
        HoldfastError: INVALID_ARGUMENT if only one of the two is given, or anything is malformed.
    """
    if changed is None and not since:
        return None
    if changed is None:
        raise _refused("since= names a point, and changed= is not given; give both or neither")
    if not since:
        raise _refused("changed ranges are given; name the point that they count from with since=")
    check_id(since, "id of the point that changes count from")
    volumes = changed if isinstance(changed, Mapping) else {"": changed}
    if isinstance(changed, Mapping) and not all(isinstance(name, str) and name for name in volumes):
        raise _refused("changed ranges are given by volume name, or as one list")
    return ToldChanges(since, MappingProxyType({name: _extents(ranges) for name, ranges in volumes.items()}))


def _extents(ranges: Any) -> list[Extent]:
    if not isinstance(ranges, Sequence) or isinstance(ranges, str | bytes):
        raise _refused("changed ranges are a list of (offset, length) pairs")
    if len(ranges) > RANGES_MAX:
        raise _refused(f"there are {len(ranges)} changed ranges of a volume; {RANGES_MAX} are allowed, join neighbours")
    return [_extent(given) for given in ranges]


def _extent(given: Any) -> Extent:
    """Check a pair: whoever counts wrongly must hear of it, and not lose the change."""
    pair = given if isinstance(given, Sequence) and not isinstance(given, str | bytes) else ()
    whole = all(isinstance(number, int) and not isinstance(number, bool) for number in pair)
    if len(pair) != 2 or not whole or min(pair) < 0 or sum(pair) > _OFFSET_MAX:
        raise _refused(f"a changed range is an offset and a length in bytes, neither negative, and not {given!r:.80}")
    return Extent(pair[0], pair[0] + pair[1])


def _refused(message: str) -> HoldfastError:
    return HoldfastError(ErrorCode.INVALID_ARGUMENT, message)
