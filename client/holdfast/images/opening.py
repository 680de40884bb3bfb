"""Opening a recovery point for reading in place: one grant for all its volumes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.access import Access
from holdfast.images import CACHE_BYTES_DEFAULT, READ_AHEAD_BYTES_DEFAULT
from holdfast.remote import CoordinatorCalls
from holdfast.writing import Toolbox
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.records import check_point
from holdfast_proto.v1.records_pb2 import PointRecord, VolumeRecord

if TYPE_CHECKING:
    from holdfast.images.point_image import PointImage


@dataclass(frozen=True, slots=True)
class OpenedPoint:
    """A point whose record has been checked, and the right to read it."""

    point: PointRecord
    access: Access
    tools: Toolbox

    def volume(self, name: str) -> VolumeRecord:
        """Return the record of a volume; "" is the first.

        Raises:
            HoldfastError: NOT_FOUND.
        """
        for volume in self.point.volumes:
            if name in ("", volume.name):
                return volume
        known = ", ".join(volume.name for volume in self.point.volumes)
        raise HoldfastError(
            ErrorCode.NOT_FOUND, f"point {self.point.point_id} has no volume {name!r}; it has {known or 'none'}"
        )

    def image(
        self,
        name: str,
        *,
        cache_bytes: int = CACHE_BYTES_DEFAULT,
        read_ahead_bytes: int = READ_AHEAD_BYTES_DEFAULT,
    ) -> PointImage:
        """Return the image of a volume, to be closed by the caller.

        Raises:
            HoldfastError: NOT_FOUND; INVALID_ARGUMENT for a bound below zero.
        """
        from holdfast.images.point_image import PointImage

        if cache_bytes < 0 or read_ahead_bytes < 0:
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "the bounds of cache and read-ahead may not be negative")
        point_id, report = self.point.point_id, self.tools.report_damage

        async def lost(block_ids: tuple[bytes, ...]) -> None:
            await report(block_ids, point_id)

        return PointImage(
            self.access,
            self.volume(name),
            cache_bytes=cache_bytes,
            read_ahead_bytes=read_ahead_bytes,
            report_damage=lost,
        )


async def open_point(tools: Toolbox, calls: CoordinatorCalls, snapshot_id: str, backup_id: str = "") -> OpenedPoint:
    """Resolve a point, and check its record.

    Raises:
        HoldfastError: NOT_FOUND, MISMATCH, DENIED, CORRUPT if the record was tampered with.
    """
    resolved = await calls.resolve_point(snapshot_id, backup_id)
    point = resolved.point
    access = Access(
        tools.endpoints,
        tools.pool,
        resolved.grant,
        clock=tools.clock,
        resource_id=point.point_id,
        data_key=tools.data_key,
    )
    check_point(access.ring, point)
    return OpenedPoint(point, access, tools)
