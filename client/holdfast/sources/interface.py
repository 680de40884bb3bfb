"""What a volume is read from, as the rest of the SDK sees it. Other change trackers implement these.

A source is read once, into a private buffer of the reader, and never mapped: fingerprint, codec and seal must see the
same bytes whatever a guest writes meanwhile. How far it changed while it was read is said when it is finished.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

from holdfast.descriptors import Extent, RawReader
from holdfast.results import Consistency


@dataclass(frozen=True, slots=True)
class BackupRun:
    """The session that sources are opened for.

    Attributes:
        vm_id: the VM.
        point_id: id of the point that is being made; it does not exist before it is committed.
        parent_id: the point that is built on; empty for a snapshot.
    """

    vm_id: str
    point_id: str
    parent_id: str


class VolumeSource(Protocol):
    """A flat range of bytes that can be read. `read_into` and `allocated` are called from several threads at once."""

    @property
    def size_bytes(self) -> int:
        """Size, fixed when the source was opened."""
        ...

    def allocated(self, start: int, end: int) -> Sequence[Extent]:
        """Return the extents within the range that may hold other bytes than zero, ascending; all else is zero."""
        ...

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes at `offset`.

        Raises:
            HoldfastError: SOURCE_UNREADABLE, or VOLUME_CHANGED if the source has become shorter.
        """
        ...

    def changed_since(self, point_id: str) -> Sequence[Extent] | None:
        """Return what changed since exactly that point, or None if the source cannot tell for sure."""
        ...

    def finish(self) -> Consistency:
        """Say how the source stood while it was read.

        Raises:
            HoldfastError: VOLUME_CHANGED if it changed and may not.
        """
        ...

    def close(self) -> None:
        """Release it; may be called more than once."""
        ...


@runtime_checkable
class SharedSource(VolumeSource, Protocol):
    """A source that is nothing but a file descriptor, so that another process can read it the same way."""

    def shared(self) -> RawReader:
        """Return how it is read; the descriptor stays the source's and is closed with it."""
        ...

    def data_bytes(self) -> int:
        """Return about how many bytes there are to read, without looking at the extents."""
        ...


@runtime_checkable
class TrackingSource(VolumeSource, Protocol):
    """A source with a change tracker that has to hear how the backup ended.

    Exactly one of `committed` and `abandoned` is called, in a worker thread, before `close`; neither where the process
    dies, so that a tracker has to find its way from either state.
    """

    def why_unknown(self) -> str:
        """Return why `changed_since` answered None, as a phrase for people; empty where there is no tracker at all."""
        ...

    def committed(self) -> None:
        """Track from the new point on: it is durable and visible.

        Raises:
            HoldfastError: it could not be done. The backup stands; the next one reads everything.
        """
        ...

    def abandoned(self) -> None:
        """Go on tracking from the parent, with every change since: the new point does not exist.

        Raises:
            HoldfastError: it could not be done; the next backup reads everything.
        """
        ...


@runtime_checkable
class DifferenceSource(VolumeSource, Protocol):
    """A source whose holes mean "as in the point `since`" and not zero, such as a diff of a VM's memory.

    `allocated` gives the ranges that it has; whatever lies outside is read from that point, which has to be the parent.
    """

    @property
    def since(self) -> str:
        """Id of the point that the holes stand for."""
        ...


SourceOpener: TypeAlias = Callable[[BackupRun], VolumeSource]
"""Opens a source for a session: for trackers that have to know which point is being made. Called in a worker thread."""

GivenSource: TypeAlias = VolumeSource | SourceOpener
"""What a caller may bring in place of a registered source."""
