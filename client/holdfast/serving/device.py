"""A disk as a guest sees it: what an export is made of."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Span(NamedTuple):
    """A run of bytes of a device, and whether it is known to be zero."""

    length: int
    zero: bool


class Device(Protocol):
    """One volume that can be read and perhaps written. Belongs to an event loop; calls may overlap.

    Ranges have been checked to lie within the device. Every call raises HoldfastError for what it cannot do.
    """

    @property
    def name(self) -> str:
        """Name of the export."""
        ...

    @property
    def description(self) -> str:
        """A line for people."""
        ...

    @property
    def size_bytes(self) -> int:
        """Size, fixed."""
        ...

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""
        ...

    async def pieces(self, offset: int, length: int) -> list[bytes]:
        """Return the bytes of a range, as pieces that lie one after another."""
        ...

    async def write(self, offset: int, data: bytes) -> None:
        """Write; durable at the next `flush`."""
        ...

    async def zero(self, offset: int, length: int, *, allocate: bool) -> None:
        """Make a range zeros; `allocate` keeps room for it."""
        ...

    async def trim(self, offset: int, length: int) -> None:
        """Take note that a range is not needed; whole units of it read as zeros afterwards."""
        ...

    async def flush(self) -> None:
        """Return when every write that was done before this call survives a crash of the machine."""
        ...

    async def spans(self, offset: int, length: int) -> list[Span]:
        """Say what is zero, from `offset` on; may end before the range does, but not before it begins."""
        ...

    def fetch_ahead(self, offset: int, length: int) -> None:
        """Begin to bring a range nearer; returns at once."""
        ...
