"""What was committed since a checkpoint: entries by key, None for blocks that are gone, findable by partition."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from holdfast_storagenode.segments.index import Entry

# Tenant and partition, which keys begin with.
_PLACE_BYTES: Final = 6


class Overlay:
    """Changes of entries. `entries` may be read without a lock; all else needs the one that orders changes."""

    def __init__(self) -> None:
        self.entries: dict[bytes, Entry | None] = {}
        self._places: dict[bytes, list[bytes]] = {}
        # Filed when somebody asks: a node that takes blocks and lists none has no need of it.
        self._unfiled: list[bytes] = []

    def set(self, key: bytes, entry: Entry | None) -> None:
        """Take a change."""
        if key not in self.entries:
            self._unfiled.append(key)
        self.entries[key] = entry

    def between(self, low: bytes, high: bytes) -> Iterator[bytes]:
        """Yield the changed keys from `low` to below `high`, in no order."""
        for key in self._unfiled:
            self._places.setdefault(key[:_PLACE_BYTES], []).append(key)
        self._unfiled.clear()
        first, last = low[:_PLACE_BYTES], high[:_PLACE_BYTES]
        if first == last:
            places = [self._places.get(first, [])]
        else:
            places = [keys for place, keys in self._places.items() if first <= place <= last]
        return (key for keys in places for key in keys if low <= key < high)

    def below(self, later: Overlay) -> Overlay:
        """Return this overlay with the changes of a later one over it."""
        merged = Overlay()
        for overlay in (self, later):
            for key, entry in overlay.entries.items():
                merged.set(key, entry)
        return merged
