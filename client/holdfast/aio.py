"""`AsyncStateManager`: the SDK's one core, on the caller's event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import (
    AsyncGenerator,
    Callable,
    Coroutine,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from holdfast import convert
from holdfast.key_file import read_key_file
from holdfast.pieces import Pieces, pieces_of
from holdfast.reading import Reading
from holdfast.remote import CoordinatorCalls
from holdfast.results import (
    ClusterStatus,
    LayoutInfo,
    LayoutPlan,
    LayoutState,
    NodeInfo,
    ObjectInfo,
    PointInfo,
    ProgressCallback,
    Stats,
    Transfer,
    VerifyReport,
    VmInfo,
)
from holdfast.sealers import Sealing, SealingProcesses, check_sealing
from holdfast.sources import VolumeSource
from holdfast.writing import Made, ObjectJob, PointJob, Toolbox, WriteJob
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import ERROR_BLOCK_IDS_MAX, MIB, REPLICA_SETTLE_S
from holdfast_core.model.names import check_id, check_name
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.clock import Clock, SystemClock
from holdfast_core.runtime.credentials import find_credential
from holdfast_core.runtime.endpoints import Endpoints
from holdfast_core.runtime.options import TlsFiles, parse_addresses
from holdfast_proto.v1 import state_pb2

COORDINATOR_VARIABLE: Final = "HOLDFAST_COORDINATOR"
RESTORE_DIR_VARIABLE: Final = "HOLDFAST_RESTORE_DIR"
KEY_FILE_VARIABLE: Final = "HOLDFAST_KEY_FILE"
SEALING_VARIABLE: Final = "HOLDFAST_SEALING"
_NONCE_BYTES: Final = 16
_TEACHING_BYTES: Final = 32 * MIB - 8192


class AsyncStateManager:
    """Keeps and restores the state of VMs, and the data of their tasks, in a Holdfast cluster.

    Belongs to the event loop in which it is first used; calls may overlap. Use it as an async context manager, or call
    `close`. Every call raises `HoldfastError` alone for what can go wrong outside the program.
    """

    def __init__(
        self,
        coordinator: str | None = None,
        *,
        token: str | None = None,
        token_file: str | os.PathLike[str] | None = None,
        tenant: str | None = None,
        key_file: str | os.PathLike[str] | None = None,
        restore_dir: str | os.PathLike[str] | None = None,
        tls: TlsFiles | None = None,
        replica_wait_s: float = REPLICA_SETTLE_S,
        workers: int | None = None,
        sealing: Sealing | None = None,
        clock: Clock | None = None,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """Bind to a cluster; nothing connects yet.

        Args:
            coordinator: HOST:PORT of one or several coordinators, separated by commas; HOLDFAST_COORDINATOR if None.
            token: API token; without one it is looked for as `find_credential` says. Who has a certificate needs none.
            token_file: file of the token, read again when it changes.
            tenant: the tenant that is meant; HOLDFAST_TENANT, else the only one the caller has rights in, if None.
            key_file: file of the data key, for a tenant that keeps it itself; HOLDFAST_KEY_FILE if None.
            restore_dir: where restores without a target go, as VM/point/; HOLDFAST_RESTORE_DIR if None.
            tls: client certificate for coordinators and nodes; needed for all but this machine.
            replica_wait_s: how long a write, once at its quorum, waits for the other copies before it commits. With 0
                it commits at once and the other copies go on behind; `settle` waits for them.
            workers: threads for cutting, hashing, compressing; the number of processors if None.
            sealing: who seals raw volumes: "processes", "threads", or "auto", which takes processes where there is much
                to read and they can be started; HOLDFAST_SEALING, else "auto", if None.

        Raises:
            HoldfastError: INVALID_ARGUMENT if no coordinator is named, or an argument is malformed.
        """
        text = coordinator or os.environ.get(COORDINATOR_VARIABLE, "")
        if not text:
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT, f"no coordinator is named; give HOST:PORT or set {COORDINATOR_VARIABLE}"
            )
        self._addresses = parse_addresses(text)
        file = Path(token_file) if token_file is not None else None
        self._credential = find_credential(
            self._addresses, token=token, token_file=file, tenant=tenant, certificate=tls is not None
        )
        key_place = key_file or os.environ.get(KEY_FILE_VARIABLE)
        self._key_file = Path(key_place) if key_place else None
        place = restore_dir or os.environ.get(RESTORE_DIR_VARIABLE)
        self._restore_dir = Path(place) if place else None
        self._tls = tls
        self._replica_wait_s = replica_wait_s
        self._workers = workers or len(os.sched_getaffinity(0))
        self._sealing = check_sealing(sealing or os.environ.get(SEALING_VARIABLE) or "auto")
        self._clock: Clock = clock or SystemClock()
        self._random_bytes = random_bytes
        self._tools: Toolbox | None = None
        self._calls: CoordinatorCalls | None = None
        self._jobs: set[asyncio.Task[None]] = set()
        self._last_transfer: Transfer | None = None
        self._closed = False

    async def __aenter__(self) -> AsyncStateManager:
        """Return the manager."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the manager."""
        await self.close()

    def _open(self) -> tuple[Toolbox, CoordinatorCalls]:
        """Make channels and threads at the first call, inside the loop they belong to."""
        if self._closed:
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "the state manager is closed")
        if self._tools is None or self._calls is None:
            data_key = None if self._key_file is None else read_key_file(self._key_file)
            _keep_freed_memory()
            endpoints = Endpoints(self._addresses, tls=self._tls, credential=self._credential)
            self._calls = CoordinatorCalls(endpoints)
            self._tools = Toolbox(
                endpoints=endpoints,
                pool=NodePool(tls=self._tls, clock=self._clock),
                executor=ThreadPoolExecutor(self._workers, thread_name_prefix="holdfast"),
                processes=SealingProcesses(self._sealing, self._workers),
                clock=self._clock,
                workers=self._workers,
                random_bytes=self._random_bytes,
                replica_wait_s=self._replica_wait_s,
                report_damage=self._report_damage,
                timed=self._timed,
                data_key=data_key,
            )
        return self._tools, self._calls

    @property
    def _remote(self) -> CoordinatorCalls:
        return self._open()[1]

    @property
    def _reading(self) -> Reading:
        return Reading(*self._open())

    def _timed(self, transfer: Transfer) -> None:
        self._last_transfer = transfer

    async def _report_damage(self, block_ids: tuple[bytes, ...], resource_id: str) -> None:
        try:
            await self._remote.report_damage(block_ids[:ERROR_BLOCK_IDS_MAX], resource_id)
        except HoldfastError:
            # The caller is about to hear of the damage itself, which matters more than that the report got lost.
            return

    @property
    def last_transfer(self) -> Transfer | None:
        """Times and counters of the write that committed last, of any task."""
        return self._last_transfer

    async def settle(self, timeout_s: float | None = None) -> bool:
        """Wait for copies that go on behind committed writes; returns whether none is left."""
        jobs = set(self._jobs)
        if jobs:
            await asyncio.wait(jobs, timeout=timeout_s)
        return all(job.done() for job in jobs)

    async def close(self) -> None:
        """Cancel what is under way, copies behind committed writes too, and release everything."""
        if self._closed:
            return
        self._closed = True
        for job in self._jobs:
            job.cancel()
        if self._jobs:
            await asyncio.wait(self._jobs)
        if self._tools is not None:
            await self._tools.pool.close()
            await self._tools.endpoints.close()
            # Waits only for spans that already run; what was queued has been cancelled with its operation.
            self._tools.executor.shutdown(wait=True, cancel_futures=True)

    async def _run(self, job: WriteJob[Made], work: Coroutine[Any, Any, None]) -> Made:
        """Run a write as a task of the manager until its answer is there."""
        task = asyncio.create_task(work)
        self._jobs.add(task)
        task.add_done_callback(self._ended)
        try:
            await asyncio.wait((task, job.made), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait((task,))
            raise
        if job.made.done():
            return job.made.result()
        await task
        raise AssertionError("a write ends with an answer or an error")

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._jobs.discard(task)
        if not task.cancelled():
            task.exception()  # told to the caller, or about copies behind a commit that stands

    # VMs and their points

    async def register_vm(self, vm_id: str, volumes: convert.Volumes, *, replace: bool = False) -> VmInfo:
        """Register a VM; the same registration again is no error.

        Args:
            vm_id: the VM's name.
            volumes: source by volume name: a path, a `file:` URI, or a `VolumeSpec`.
            replace: replace a registration that differs.

        Raises:
            HoldfastError: ALREADY_EXISTS if it is registered otherwise; INVALID_ARGUMENT for names, URIs, sizes.
        """
        return await self._remote.register_vm(vm_id, volumes, replace=replace)

    async def vm(self, vm_id: str) -> VmInfo:
        """Return a VM; NOT_FOUND if it is not registered."""
        return await self._remote.vm(vm_id)

    async def list_vms(self) -> list[VmInfo]:
        """Return all VMs by name."""
        return await self._remote.list_vms()

    async def create_snapshot(
        self,
        vm_id: str,
        *,
        base: str = "",
        takeover: bool = False,
        sources: Mapping[str, VolumeSource] | None = None,
        progress: ProgressCallback | None = None,
    ) -> str:
        """Save all volumes of a VM as its first point; returns the snapshot's id once it is durable and visible.

        Args:
            vm_id: the VM.
            base: a point of any VM whose content may be named instead of sent.
            takeover: end the VM's open session, if there is one, instead of failing.
            sources: read these instead of what is registered, by volume name; they are closed at the end.
            progress: told how far it is.

        Raises:
            HoldfastError: NOT_FOUND, BUSY, SOURCE_UNREADABLE, VOLUME_CHANGED, NO_QUORUM, DISK_FULL, SESSION_LAPSED, …
        """
        request = state_pb2.BeginPointRequest(vm_id=check_name(vm_id, "VM name"), base_id=base, takeover=takeover)
        return await self._make_point(request, sources, progress)

    async def incremental_backup(
        self,
        vm_id: str,
        snapshot_id: str,
        *,
        parent: str = "",
        base: str = "",
        takeover: bool = False,
        sources: Mapping[str, VolumeSource] | None = None,
        progress: ProgressCallback | None = None,
    ) -> str:
        """Save what changed since the newest living point that descends from `snapshot_id`, or since `parent`.

        The new point is a complete image all the same. Further arguments as in `create_snapshot`.

        Raises:
            HoldfastError: NO_PARENT, MISMATCH for another VM's point, and as `create_snapshot`.
        """
        request = state_pb2.BeginPointRequest(
            vm_id=check_name(vm_id, "VM name"),
            incremental=True,
            snapshot_id=check_id(snapshot_id, "snapshot id"),
            parent_id=check_id(parent, "parent id") if parent else "",
            base_id=base,
            takeover=takeover,
        )
        return await self._make_point(request, sources, progress)

    async def _make_point(
        self,
        request: state_pb2.BeginPointRequest,
        sources: Mapping[str, VolumeSource] | None,
        progress: ProgressCallback | None,
    ) -> str:
        if request.base_id:
            check_id(request.base_id, "base id")
        request.nonce = self._random_bytes(_NONCE_BYTES)
        tools, _ = self._open()
        job = PointJob(tools, progress)
        point: PointInfo = await self._run(job, job.run(request, sources or {}))
        return point.point_id

    async def restore_vm(
        self,
        snapshot_id: str,
        backup_id: str = "",
        *,
        target: str | os.PathLike[str] | None = None,
        durable: bool = False,
        progress: ProgressCallback | None = None,
    ) -> Path:
        """Write all volumes of a point as sparse files NAME.raw, verified; returns their directory.

        Args:
            snapshot_id: the snapshot that the lineage starts from.
            backup_id: the backup to restore; "" restores the snapshot itself.
            target: a directory that is empty or does not exist; below the manager's restore_dir if None.
            durable: bring the files to the disk before returning. Without it a power cut soon afterwards may take them;
                the point in the cluster is not touched by that.
            progress: told how far it is.

        Raises:
            HoldfastError: NOT_FOUND, MISMATCH, TARGET_EXISTS, TARGET_UNWRITABLE, UNREACHABLE; CORRUPT or MISSING with
                the damaged ids in `block_ids` and the ranges in `facts["ranges"]`. Nothing is left behind then.
        """
        return await self._reading.restore(
            snapshot_id,
            backup_id,
            target=Path(target) if target is not None else None,
            restore_dir=self._restore_dir,
            durable=durable,
            progress=progress,
        )

    async def points(self, vm_id: str, *, include_forgotten: bool = False) -> list[PointInfo]:
        """Return a VM's points, oldest first; lineage stubs of forgotten ones if asked for."""
        return await self._remote.points(vm_id, include_forgotten=include_forgotten)

    async def point(self, point_id: str) -> PointInfo:
        """Return a point; NOT_FOUND if there is none."""
        return await self._remote.point(point_id)

    async def forget(self, point_id: str) -> None:
        """Forget a point; its id stays known as a link of its lineage."""
        await self._remote.forget(point_id)

    async def verify(
        self, point_id: str, *, node_only: bool = False, progress: ProgressCallback | None = None
    ) -> VerifyReport:
        """Read and check every block of a point; returns only if all is well.

        Without `node_only` one copy of each block is fetched, opened and compared with its fingerprint; with it, every
        node reads and hashes all its copies, and nothing but the index crosses the wire.

        Raises:
            HoldfastError: CORRUPT or MISSING with ids and ranges as in `restore_vm`; UNREACHABLE; NOT_FOUND.
        """
        return await self._reading.verify(check_id(point_id, "point id"), node_only=node_only, progress=progress)

    async def stats(self, vm_id: str = "") -> Stats:
        """Return sums over a VM's points, or over the tenant."""
        return await self._remote.stats(vm_id)

    # Application data

    async def persist_application_data(
        self, task_id: str, data: bytes, *, progress: ProgressCallback | None = None
    ) -> str:
        """Store bytes for a task; returns the storage id once they are durable.

        Raises:
            HoldfastError: as `create_snapshot`.
        """
        return await self.persist_stream(task_id, (data,), progress=progress)

    async def persist_stream(self, task_id: str, stream: Pieces, *, progress: ProgressCallback | None = None) -> str:
        """Store what a file object or an iterable of bytes yields, however much; returns the storage id.

        Raises:
            HoldfastError: as `create_snapshot`. Errors of the stream itself pass through, and nothing is stored.
        """
        request = state_pb2.BeginObjectRequest(
            task_id=check_name(task_id, "task name"), nonce=self._random_bytes(_NONCE_BYTES)
        )
        tools, _ = self._open()
        job = ObjectJob(tools, progress)
        stored: ObjectInfo = await self._run(job, job.run(request, pieces_of(stream)))
        return stored.storage_id

    async def retrieve_application_data(
        self,
        storage_id: str,
        *,
        offset: int = 0,
        length: int | None = None,
        progress: ProgressCallback | None = None,
    ) -> bytes:
        """Return an object's bytes, verified; all of them, or `length` from `offset` (what lies behind the end is cut).

        Raises:
            HoldfastError: NOT_FOUND, CORRUPT, MISSING, UNREACHABLE.
        """
        pieces = self._reading.pieces(storage_id, offset=offset, length=length, progress=progress)
        async with aclosing(pieces):
            return b"".join([piece async for piece in pieces])

    async def retrieve_stream(
        self, storage_id: str, *, offset: int = 0, length: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Yield an object's bytes in pieces, each verified before it is yielded.

        Raises:
            HoldfastError: as `retrieve_application_data`, at the first piece or at a later one.
        """
        pieces = self._reading.pieces(storage_id, offset=offset, length=length, progress=None)
        async with aclosing(pieces):
            async for piece in pieces:
                yield piece

    async def retrieve_to_file(
        self,
        storage_id: str,
        path: str | os.PathLike[str],
        *,
        durable: bool = False,
        progress: ProgressCallback | None = None,
    ) -> Path:
        """Write an object to a new file, which gets its name when it is whole; returns the path.

        Raises:
            HoldfastError: TARGET_EXISTS, TARGET_UNWRITABLE, and as `retrieve_application_data`.
        """
        return await self._reading.to_file(storage_id, Path(path), durable=durable, progress=progress)

    async def application_data(self, storage_id: str) -> ObjectInfo:
        """Return what is known of an object; NOT_FOUND if there is none."""
        return convert.object_info((await self._remote.resolve_object(storage_id)).object)

    async def list_application_data(self, task_id: str) -> list[ObjectInfo]:
        """Return a task's objects, oldest first."""
        return await self._remote.list_objects(task_id)

    async def forget_application_data(self, storage_id: str) -> None:
        """Forget an object."""
        await self._remote.forget_object(storage_id)

    # The cluster

    async def cluster_status(self) -> ClusterStatus:
        """Return how the cluster is."""
        return await self._remote.cluster_status()

    async def nodes(self) -> list[NodeInfo]:
        """Return the storage nodes by name."""
        return await self._remote.nodes()

    async def layout(self) -> LayoutState:
        """Return the living layouts."""
        return await self._remote.layout()

    async def plan_layout(self, *, remove: Sequence[str] = ()) -> LayoutPlan:
        """Return what the next layout would change, `remove` left out of it; changes nothing."""
        return await self._remote.plan_layout(remove)

    async def apply_layout(self, previous_epoch: int, *, remove: Sequence[str] = ()) -> LayoutInfo:
        """Make a planned layout the newest; CONFLICT if another one came in between."""
        return await self._remote.apply_layout(previous_epoch, remove)


def _keep_freed_memory() -> None:
    """Let the C library keep what is freed instead of returning it to the system at every turn.

    Batches of a megabyte come and go all the time, and where fresh pages are dear (2 ms a MB on a virtual machine) that
    is a tenth of all work. glibc learns its thresholds from the largest mapped block that was ever freed: one block of
    nearly 32 MiB, never touched, is all it takes, and other C libraries do not mind.
    """
    bytes(_TEACHING_BYTES)
