"""`AsyncStateManager`: the SDK's one core, on the caller's event loop."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from holdfast.calls.application import AsyncApplicationCalls
from holdfast.calls.cluster import AsyncClusterCalls
from holdfast.calls.collection import AsyncCollectionCalls
from holdfast.calls.core import (
    COORDINATOR_VARIABLE,
    KEY_FILE_VARIABLE,
    NONCE_BYTES,
    RESTORE_DIR_VARIABLE,
    SEALING_VARIABLE,
)
from holdfast.calls.files import AsyncFileCalls
from holdfast.calls.lifecycle import AsyncLifecycleCalls
from holdfast.calls.retention import AsyncRetentionCalls
from holdfast.calls.serving import AsyncServingCalls
from holdfast.calls.verifying import AsyncVerifyCalls
from holdfast.results import PointInfo, ProgressCallback, Stats
from holdfast.sampling import check_sample
from holdfast.sources import GivenSource
from holdfast.sources.told import Changed, told_changes
from holdfast.sources_of_run import PointWish
from holdfast.writing import PointJob
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.names import check_id, check_name
from holdfast_proto.v1 import state_pb2

if TYPE_CHECKING:
    from holdfast.findings import RestoreReport

__all__ = [
    "COORDINATOR_VARIABLE",
    "KEY_FILE_VARIABLE",
    "RESTORE_DIR_VARIABLE",
    "SEALING_VARIABLE",
    "AsyncStateManager",
]


class AsyncStateManager(
    AsyncLifecycleCalls,
    AsyncRetentionCalls,
    AsyncFileCalls,
    AsyncApplicationCalls,
    AsyncClusterCalls,
    AsyncCollectionCalls,
    AsyncServingCalls,
    AsyncVerifyCalls,
):
    """Keeps and restores the state of VMs, and the data of their tasks, in a Holdfast cluster.

    Belongs to the event loop in which it is first used; calls may overlap. Use it as an async context manager, or call
    `close`. Every call raises `HoldfastError` alone for what can go wrong outside the program.
    """

    async def __aenter__(self) -> AsyncStateManager:
        """Return the manager."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the manager."""
        await self.close()

    # Points of VMs

    async def create_snapshot(
        self,
        vm_id: str,
        *,
        base: str = "",
        takeover: bool = False,
        sources: Mapping[str, GivenSource] | None = None,
        progress: ProgressCallback | None = None,
    ) -> str:
        """Save all volumes of a VM as its first point; returns the snapshot's id once it is durable and visible.

        Args:
            vm_id: the VM.
            base: a point of any VM whose content may be named instead of sent.
            takeover: end the VM's open session, if there is one, instead of failing.
            sources: read these instead of what is registered, by volume name: sources, or what opens one for a
                `BackupRun`; they are closed at the end.
            progress: told how far it is.

        Raises:
            HoldfastError: NOT_FOUND, BUSY, SOURCE_UNREADABLE, VOLUME_CHANGED, NO_QUORUM, DISK_FULL, SESSION_LAPSED, …
        """
        request = state_pb2.BeginPointRequest(vm_id=check_name(vm_id, "VM name"), base_id=base, takeover=takeover)
        return await self._make_point(request, PointWish(sources or {}, None, 0.0), progress)

    async def incremental_backup(
        self,
        vm_id: str,
        snapshot_id: str,
        *,
        parent: str = "",
        base: str = "",
        takeover: bool = False,
        sources: Mapping[str, GivenSource] | None = None,
        changed: Changed | None = None,
        since: str = "",
        sample: float | None = None,
        progress: ProgressCallback | None = None,
    ) -> str:
        """Save what changed since the newest living point that descends from `snapshot_id`, or since `parent`.

        The new point is a complete image all the same. Further arguments as in `create_snapshot`.

        Args:
            vm_id: the VM.
            snapshot_id: the snapshot that the lineage starts from.
            parent: build on this point, not on the newest one.
            base: a point of any VM whose content may be named instead of sent.
            takeover: end the VM's open session, if there is one, instead of failing.
            sources: read these instead of what is registered, by volume name: sources, or what opens one for a
                `BackupRun`; they are closed at the end.
            changed: (offset, length) in bytes of every range that changed, of the VM's one volume or by volume name;
                nothing else of those volumes is read. Volumes that are not named are read as they always are.
            since: the point that `changed` counts from. If it is not the parent, `changed` is not used and everything
                is read; `last_transfer.notices` says so.
            sample: share of what is called unchanged to read and compare all the same, from 0 to 1, at most 16 MiB a
                volume; the manager's if None. A difference makes the run read everything.
            progress: told how far it is.

        Raises:
            HoldfastError: NO_PARENT, MISMATCH for another VM's point, INVALID_ARGUMENT for changes that make no sense,
                and as `create_snapshot`.
        """
        request = state_pb2.BeginPointRequest(
            vm_id=check_name(vm_id, "VM name"),
            incremental=True,
            snapshot_id=check_id(snapshot_id, "snapshot id"),
            parent_id=check_id(parent, "parent id") if parent else "",
            base_id=base,
            takeover=takeover,
        )
        share = self._sample if sample is None else check_sample(sample)
        return await self._make_point(request, PointWish(sources or {}, told_changes(changed, since), share), progress)

    async def _make_point(
        self, request: state_pb2.BeginPointRequest, wish: PointWish, progress: ProgressCallback | None
    ) -> str:
        if request.base_id:
            check_id(request.base_id, "base id")
        request.nonce = self._random_bytes(NONCE_BYTES)
        tools, _ = self._open()
        job = PointJob(tools, progress)
        point: PointInfo = await self._run(job, job.run(request, wish))
        return point.point_id

    async def restore_vm(
        self,
        snapshot_id: str,
        backup_id: str = "",
        *,
        target: str | os.PathLike[str] | None = None,
        onto: str | os.PathLike[str] | None = None,
        image_format: str = "raw",
        durable: bool = False,
        partial: bool = False,
        progress: ProgressCallback | None = None,
    ) -> Path:
        """Write all volumes of a point as sparse files NAME.raw, verified; returns their directory.

        Beside them are `vm.json`, which says what is what, and the VM's definition if it has one.

        Args:
            snapshot_id: the snapshot that the lineage starts from.
            backup_id: the backup to restore; "" restores the snapshot itself.
            target: a directory that is empty or does not exist; below the manager's restore_dir if None.
            onto: a directory with older copies NAME.raw of the volumes, which become this point: only blocks that
                differ are fetched. Nothing may run on them. If it fails, the files keep temporary names
                (.NAME.raw.partial), from which the same call goes on.
            image_format: "raw", or "qcow2" for files NAME.qcow2; not with `onto`.
            durable: bring the files to the disk before returning. Without it a power cut soon afterwards may take them;
                the point in the cluster is not touched by that.
            partial: restore what can be read of a damaged point. What cannot is left as zeros and written down in
                damage.json beside the volumes, and `last_restore.damage` tells it. Not with `onto`.
            progress: told how far it is.

        Raises:
            HoldfastError: NOT_FOUND, MISMATCH, TARGET_EXISTS, TARGET_UNWRITABLE, UNREACHABLE; CORRUPT or MISSING with
                the damaged ids in `block_ids` and the ranges in `facts["ranges"]`, and also with `partial` if nothing
                at all can be read. Nothing is left behind then.
        """
        from holdfast.restoring.points import check_format  # what only saves does not wait for this to load

        chosen = check_format(image_format)
        if onto is not None:
            if target is not None or chosen != "raw" or partial:
                raise HoldfastError(
                    ErrorCode.INVALID_ARGUMENT,
                    "onto= takes raw files where they are, whole: no target=, no other format, no partial=",
                )
            self._last_restore = await self._reading.restore_onto(
                snapshot_id, backup_id, directory=Path(onto), durable=durable, progress=progress
            )
        else:
            self._last_restore = await self._reading.restore(
                snapshot_id,
                backup_id,
                target=Path(target) if target is not None else None,
                restore_dir=self._restore_dir,
                image_format=chosen,
                durable=durable,
                partial=partial,
                progress=progress,
            )
        return self._last_restore.directory

    @property
    def last_restore(self) -> RestoreReport | None:
        """What the restore that ended last brought, of any task."""
        return self._last_restore

    async def points(self, vm_id: str, *, include_forgotten: bool = False) -> list[PointInfo]:
        """Return a VM's points, oldest first; lineage stubs of forgotten ones if asked for."""
        return await self._remote.points(vm_id, include_forgotten=include_forgotten)

    async def point(self, point_id: str) -> PointInfo:
        """Return a point; NOT_FOUND if there is none."""
        return await self._remote.point(point_id)

    async def forget(self, point_id: str) -> None:
        """Forget a point; its id stays known as a link of its lineage."""
        await self._remote.forget(point_id)

    async def stats(self, vm_id: str = "") -> Stats:
        """Return sums over a VM's points, or over the tenant."""
        return await self._remote.stats(vm_id)
