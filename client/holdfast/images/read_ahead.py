"""Which blocks to fetch before they are asked for: reads that go on where earlier ones ended get ever more ahead.

Several readers may step through an image side by side (nbdcopy has four), so several streams are told apart. Pure:
positions in, positions out.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

STREAMS_MAX: Final = 16


@dataclass(slots=True)
class _Stream:
    """A reader that goes forward: `at` is the end of its furthest read, `ahead` the end of what was asked for it."""

    at: int
    ahead: int
    window: int


class ReadAhead:
    """Follows the reads of one image. Positions are block numbers."""

    def __init__(self, *, first_blocks: int, blocks_max: int, blocks_total: int) -> None:
        """Begin without streams.

        Args:
            first_blocks: what a stream gets ahead at first; doubled with every turn.
            blocks_max: what it gets at most; 0 turns reading ahead off.
            blocks_total: where the image ends.
        """
        self._first = min(first_blocks, blocks_max)
        self._max = blocks_max
        self._total = blocks_total
        self._streams: deque[_Stream] = deque(maxlen=STREAMS_MAX)

    def note(self, first: int, end: int) -> tuple[int, int]:
        """Take a read of the blocks `first` to before `end`; returns which to fetch ahead, possibly none."""
        if not self._max:
            return end, end
        stream = self._stream_of(first)
        if stream is None:
            self._streams.append(_Stream(end, end, self._first))
            return end, end
        stream.at = max(stream.at, end)
        if stream.ahead - stream.at > stream.window // 2:
            return end, end
        begin = max(stream.ahead, stream.at)
        stream.ahead = max(begin, min(stream.at + stream.window, self._total))
        stream.window = min(2 * stream.window, self._max)
        return begin, stream.ahead

    def _stream_of(self, first: int) -> _Stream | None:
        """Return the stream that a read belongs to: requests of one reader may overtake one another a little."""
        for stream in self._streams:
            if stream.at - self._max <= first <= max(stream.at, stream.ahead):
                self._streams.remove(stream)
                self._streams.append(stream)
                return stream
        return None
