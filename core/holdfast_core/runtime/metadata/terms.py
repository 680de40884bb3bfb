"""The terms of leases on a monotonic clock: which last how long yet. Kept by the embedded engine only."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from holdfast_core.model.errors import ErrorCode, HoldfastError


class LeaseTerms:
    """Terms and deadlines of all living leases, in seconds of the clock that is passed in."""

    def __init__(self, terms_s: Mapping[int, float], monotonic_s: Callable[[], float]) -> None:
        """Begin with these leases, each with a full term from now."""
        self._monotonic_s = monotonic_s
        self._terms_s = dict(terms_s)
        now_s = monotonic_s()
        self._deadlines_s = {lease_id: now_s + ttl_s for lease_id, ttl_s in terms_s.items()}

    def __contains__(self, lease_id: int) -> bool:
        return lease_id in self._terms_s

    def add(self, lease_id: int, ttl_s: float) -> None:
        """Begin a lease."""
        self._terms_s[lease_id] = ttl_s
        self._deadlines_s[lease_id] = self._monotonic_s() + ttl_s

    def keep(self, lease_id: int) -> float:
        """Give the lease a new full term and return it. Raises NOT_FOUND if it has ended."""
        self._check(lease_id)
        self._deadlines_s[lease_id] = self._monotonic_s() + self._terms_s[lease_id]
        return self._terms_s[lease_id]

    def left_s(self, lease_id: int) -> float:
        """Return the seconds left. Raises NOT_FOUND if it has ended."""
        self._check(lease_id)
        return self._deadlines_s[lease_id] - self._monotonic_s()

    def remove(self, lease_id: int) -> None:
        """End a lease."""
        del self._terms_s[lease_id], self._deadlines_s[lease_id]

    def lapsed(self) -> list[int]:
        """Return the leases whose term is over, the one that ran out first in front."""
        now_s = self._monotonic_s()
        over = [lease_id for lease_id, deadline_s in self._deadlines_s.items() if deadline_s <= now_s]
        return sorted(over, key=self._deadlines_s.__getitem__)

    def next_deadline_s(self) -> float | None:
        """Return when on the monotonic clock the next lease runs out, None without leases."""
        return min(self._deadlines_s.values(), default=None)

    def _check(self, lease_id: int) -> None:
        if lease_id not in self._terms_s:
            raise HoldfastError(ErrorCode.NOT_FOUND, f"the lease {lease_id} has ended")
