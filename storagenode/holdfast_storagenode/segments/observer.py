"""What the engine tells the outside of itself, for logs and metrics."""

from __future__ import annotations


class StoreObserver:
    """Hears of events; this one ignores them. Called from the engine's threads: be quick, raise nothing."""

    def committed(self, *, seconds: float, batches: int, records: int, size_bytes: int) -> None:
        """One group of batches became durable with one sync."""

    def stamped(self, *, blocks: int) -> None:
        """Stamps of so many blocks that were there already became durable."""

    def stamps_unknown(self, *, reason: str) -> None:
        """Stamps may have been lost: the next collection epoch that is learnt counts for every block."""

    def quarantined(self, *, tenant: int, block_id: bytes, segment: int, offset: int) -> None:
        """A copy's bytes no longer match its id; it is set aside."""

    def tail_cut(self, *, segment: int, offset: int, size_bytes: int) -> None:
        """A torn tail of `size_bytes` was cut from a segment at start."""

    def gap_found(self, *, segment: int, offset: int, size_bytes: int) -> None:
        """Bytes between records hold none; they are stepped over and kept."""

    def index_rebuilt(self, *, reason: str, blocks: int) -> None:
        """The index was made anew from the segments."""

    def replayed(self, *, records: int, size_bytes: int) -> None:
        """The records behind the last checkpoint were read and verified at start."""

    def disk_failed(self, *, what: str) -> None:
        """The disk refused to make a write durable; the engine takes no more writes."""

    def compacted(self, *, segment: int, freed_bytes: int) -> None:
        """A segment's living records were moved and its file removed."""
