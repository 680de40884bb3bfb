"""Numbers by how much each lacks, so that one of those that lack most is found at once, however many there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from holdfast_core.model.layout.board import Random

# So many random picks are tried before all of a level are looked at: nearly all of them will do.
_PICKS: Final = 8


class Buckets:
    """The numbers 0, 1, ... with what each lacks, which only falls; those that lack nothing are out."""

    def __init__(self, lacking: Sequence[int]) -> None:
        """Begin with what each lacks."""
        self._lacking = list(lacking)
        self._levels: dict[int, list[int]] = {}
        self._place = [0] * len(self._lacking)
        for number, lack in enumerate(self._lacking):
            self._put(number, lack)
        self._top = max(self._levels, default=0)

    def lower(self, number: int) -> None:
        """Let a number lack one less."""
        lack = self._lacking[number]
        level, place = self._levels[lack], self._place[number]
        last = level.pop()
        if last != number:
            level[place] = last
            self._place[last] = place
        if not level:
            del self._levels[lack]
        self._lacking[number] = lack - 1
        self._put(number, lack - 1)

    def pick(self, will_do: Callable[[int], bool], random: Random) -> int | None:
        """Return one of those that lack most among those that will do, any of them; None where none will."""
        for level in self._from_most():
            for _ in range(_PICKS):
                number = level[random.below(len(level))]
                if will_do(number):
                    return number
            fit = [number for number in level if will_do(number)]
            if fit:
                return fit[random.below(len(fit))]
        return None

    def _from_most(self) -> Iterator[list[int]]:
        """Yield those that lack most, which nearly always will do, then those that lack less, and so on."""
        while self._top > 0 and self._top not in self._levels:
            self._top -= 1
        if self._top:
            yield self._levels[self._top]
            for lack in sorted(self._levels, reverse=True)[1:]:
                yield self._levels[lack]

    def _put(self, number: int, lack: int) -> None:
        if lack > 0:
            level = self._levels.setdefault(lack, [])
            self._place[number] = len(level)
            level.append(number)
