"""The time by which locks end: the coordinator's wall clock, as long as nobody sets it forward.

A wall clock jumps, and one that is set forward would end every lock at once. So time goes on from where the wall clock
stood by the monotonic clock alone, which no one sets; where the wall clock falls behind that, the wall clock counts.
Locks may so last longer than they say (a machine that slept, a clock that was put right), and not shorter. What a
coordinator finds when it starts it has to believe.
"""

from __future__ import annotations

from holdfast_core.runtime.clock import Clock


class CautiousClock:
    """Wall-clock time that no jump brings forward. One a process, made when it starts."""

    def __init__(self, clock: Clock) -> None:
        """Begin with the time that the clock shows."""
        self._clock = clock
        self._offset_ms = self._offset_now_ms()

    def now_unix_ms(self) -> int:
        """Return the time in milliseconds since 1970 (UTC), never ahead of the wall clock."""
        self._offset_ms = min(self._offset_ms, self._offset_now_ms())
        return int(self._offset_ms + self._clock.monotonic_s() * 1000)

    def _offset_now_ms(self) -> float:
        return self._clock.now_unix_ms() - self._clock.monotonic_s() * 1000
