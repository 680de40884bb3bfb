"""Which units of a volume a local file holds: a bit each, in pages, so that a large empty volume costs nothing.

Bits are only ever set. Whatever mixture of an older and a newer page a crash leaves behind is therefore a state that
the map has been in or could have been in, and pages are written in place without a journal. Pure: who keeps it durable
takes the changed pages and writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

PAGE_BYTES: Final = 4096
PAGE_UNITS: Final = PAGE_BYTES * 8


class UnitMap:
    """A set of unit numbers, from 0 to before `unit_count`.

    Attributes:
        unit_count: how many units there are.
        held: how many of them are in the set.
    """

    def __init__(self, unit_count: int) -> None:
        """Begin empty."""
        self.unit_count = unit_count
        self.held = 0
        self._pages: dict[int, bytearray] = {}
        self._changed: set[int] = set()

    def load(self, number: int, page: bytes) -> None:
        """Take a page as it was kept; a shorter one ends in zeros. Bits beyond the end are ignored."""
        units = min(PAGE_UNITS, self.unit_count - number * PAGE_UNITS)
        value = int.from_bytes(page, "little") & ((1 << max(0, units)) - 1)
        before = self._pages.pop(number, b"")
        self.held += value.bit_count() - int.from_bytes(before, "little").bit_count()
        if value:
            self._pages[number] = bytearray(value.to_bytes(PAGE_BYTES, "little"))

    def add(self, first: int, end: int) -> None:
        """Put the units `first` to before `end` into the set."""
        for number, low, high in self._parts(first, end):
            page = self._pages.get(number)
            if page is None:
                page = self._pages[number] = bytearray(PAGE_BYTES)
            begin, stop = low >> 3, (high + 7) >> 3
            before = int.from_bytes(page[begin:stop], "little")
            after = before | (((1 << (high - low)) - 1) << (low & 7))
            if after != before:
                page[begin:stop] = after.to_bytes(stop - begin, "little")
                self.held += after.bit_count() - before.bit_count()
                self._changed.add(number)

    def runs(self, first: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Yield (first, end, held) for runs of units that are alike, ascending, over the whole range."""
        begin, held = first, False
        at = first
        for number, low, high in self._parts(first, end):
            for length, state in self._page_runs(number, low, high):
                if state != held:
                    if at > begin:
                        yield begin, at, held
                    begin, held = at, state
                at += length
        if at > begin:
            yield begin, at, held

    def _page_runs(self, number: int, low: int, high: int) -> Iterator[tuple[int, bool]]:
        page = self._pages.get(number)
        left = high - low
        if page is None:
            yield left, False
            return
        value = int.from_bytes(page[low >> 3 : (high + 7) >> 3], "little") >> (low & 7)
        while left:
            state = bool(value & 1)
            # The number of equal bits at the low end.
            length = (value ^ (value + 1)).bit_length() - 1 if state else (value & -value).bit_length() - 1
            length = left if length < 0 else min(length, left)
            yield length, state
            value >>= length
            left -= length

    def _parts(self, first: int, end: int) -> Iterator[tuple[int, int, int]]:
        if not 0 <= first <= end <= self.unit_count:
            raise ValueError(f"units {first} to {end} are not within the {self.unit_count} that there are")
        while first < end:
            number, low = divmod(first, PAGE_UNITS)
            high = min(PAGE_UNITS, low + end - first)
            yield number, low, high
            first += high - low

    def take_changed(self) -> Mapping[int, bytes]:
        """Return copies of the pages that changed since this was called last, by number."""
        changed, self._changed = self._changed, set()
        return {number: bytes(self._pages[number]) for number in sorted(changed)}

    def give_back(self, numbers: Iterable[int]) -> None:
        """Count pages as changed again: they could not be written."""
        self._changed.update(numbers)
