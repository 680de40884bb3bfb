"""The write operations, from Begin to Commit: recovery points and stored objects.

Each runs as one job whose answer is ready at commit; copies that are still under way then go on in the job, which the
manager owns and waits for when it settles or closes.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from holdfast.access import Access
from holdfast.convert import object_info, point_info, transfer_message
from holdfast.index import IndexReader
from holdfast.planning import Planner, PointSources
from holdfast.points import PointReader, ReadSums
from holdfast.results import ObjectInfo, PointInfo, Progress, ProgressCallback, Transfer, TransferStats
from holdfast.sampling import Sampler
from holdfast.sealers import SealingProcesses
from holdfast.sessions import COMMIT_TIMEOUT_S, Session, abort
from holdfast.sources_of_run import PointWish, SourcesOfRun, laid_over_parent
from holdfast.uploader import Uploader
from holdfast_core.model.errors import HoldfastError
from holdfast_core.model.key_file import DataKey
from holdfast_core.model.names import split_ids
from holdfast_core.model.records import check_point, object_mac, point_mac
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.blocks.reader import BlockReader
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.endpoints import Endpoints
from holdfast_proto.v1 import state_pb2
from holdfast_proto.v1.common_pb2 import Grant
from holdfast_proto.v1.records_pb2 import OBJECT_FORM_FILES, OBJECT_FORM_UNSPECIFIED, ObjectOrigin, VolumeRecord
from holdfast_proto.v1.state_pb2_grpc import StateServiceStub

TAIL_S: Final = 600.0
_SAMPLE_SEED_BYTES: Final = 16

Made = TypeVar("Made", PointInfo, ObjectInfo)


@dataclass(frozen=True, slots=True)
class Toolbox:
    """What a manager lends to its operations.

    Attributes:
        replica_wait_s: how long a commit waits for copies beyond the quorum.
        report_damage: tells the coordinator of ids that no owner could give, and of what was being read.
        timed: told of each write's times, again when its last copy is written.
        data_key: the tenant's data key, where it keeps it itself.
    """

    endpoints: Endpoints
    pool: NodePool
    executor: Executor
    processes: SealingProcesses
    clock: Clock
    workers: int
    random_bytes: Callable[[int], bytes]
    replica_wait_s: float
    report_damage: Callable[[tuple[bytes, ...], str], Awaitable[None]]
    timed: Callable[[Transfer], None]
    data_key: DataKey | None = None

    def reader(self, access: Access) -> BlockReader:
        """Return a reader under an operation's access."""
        return access.reader(self.executor)

    def index(self, access: Access, reader: BlockReader) -> IndexReader:
        """Return a reader of index nodes."""
        return IndexReader(reader, access.ring.opener(), self.executor)


class WriteJob(Generic[Made]):
    """One write. `made` is its answer, ready at commit; `run` ends when the copies are settled too."""

    def __init__(self, tools: Toolbox, progress: ProgressCallback | None) -> None:
        """Make a job; to be run inside the manager's event loop."""
        self.made: asyncio.Future[Made] = asyncio.get_running_loop().create_future()
        self._tools = tools
        self._progress = progress
        self._started_s = tools.clock.monotonic_s()

    async def _access(self, session_id: str, grant: Grant) -> Access:
        """Take the grant of a session that has just begun; where it does not fit the data key, the session ends.

        Raises:
            HoldfastError: as `Access`.
        """
        tools = self._tools
        try:
            return Access(
                tools.endpoints,
                tools.pool,
                grant,
                clock=tools.clock,
                session_id=session_id,
                data_key=tools.data_key,
            )
        except HoldfastError:
            await abort(tools.endpoints, session_id)
            raise

    def _elapsed_s(self) -> float:
        return self._tools.clock.monotonic_s() - self._started_s

    def _tell(self, phase: str, logical_bytes: int) -> None:
        if self._progress is not None:
            self._progress(Progress(phase, logical_bytes, logical_bytes))

    async def _finish(
        self,
        uploader: Uploader,
        session: Session,
        sums: ReadSums,
        commit: Callable[[TransferStats], Awaitable[Made]],
        committed: Callable[[], Awaitable[tuple[str, ...]]] | None = None,
    ) -> None:
        """Bring everything to its quorum, wait a little for the other copies, commit, then wait for the rest.

        `committed` is called once the commit stands, before anybody hears of it, and returns notices.
        """
        await uploader.flush()
        quorum_s = self._elapsed_s()
        self._tell("settle", sums.logical_bytes)
        settled = await uploader.settle(self._tools.replica_wait_s)
        replicated_s = self._elapsed_s() if settled and not uploader.under_replicated_blocks else None
        stats = _stats(sums, uploader)
        self._tell("commit", sums.logical_bytes)
        made = await session.commit(lambda: commit(stats))
        committed_s = self._elapsed_s()
        notices = await committed() if committed is not None else ()
        times = Transfer(session.session_id, stats, quorum_s, committed_s, replicated_s, notices)
        self._tools.timed(times)
        self.made.set_result(made)
        if not settled:
            if not await uploader.settle(TAIL_S):
                uploader.give_up()
            elif not uploader.under_replicated_blocks:
                self._tools.timed(dataclasses.replace(times, replicated_s=self._elapsed_s()))


def _stats(sums: ReadSums, uploader: Uploader) -> TransferStats:
    sent = uploader.sums
    return TransferStats(
        logical_bytes=sums.logical_bytes,
        read_bytes=sums.read_bytes,
        changed_bytes=sums.changed_bytes,
        deduplicated_bytes=sums.reused_bytes + sent.present_plain_bytes,
        stored_bytes=sent.stored_bytes,
        sent_bytes=sent.sent_bytes,
        stored_plain_bytes=sent.stored_plain_bytes,
        changed_blocks=sums.changed_blocks,
        stored_blocks=sent.stored_blocks,
        under_replicated_blocks=uploader.under_replicated_blocks,
        index_bytes=sent.index_bytes,
        delta_blocks=sums.delta_blocks,
        delta_plain_bytes=sums.delta_plain_bytes,
        delta_bytes=sums.delta_bytes,
        sampled_bytes=sums.sampled_bytes,
    )


def _about_template(request: state_pb2.BeginPointRequest, begun: state_pb2.BeginPointResponse) -> tuple[str, ...]:
    """Return a notice if the VM has a template and this snapshot could not use it."""
    template = begun.vm.template_id
    if not template or request.incremental or begun.base.point_id:
        return ()
    return (f"the template {template} is gone or may not be seen, so nothing was compared with it",)


class PointJob(WriteJob[PointInfo]):
    """Makes a recovery point."""

    async def run(self, request: state_pb2.BeginPointRequest, wish: PointWish) -> None:
        """Begin, open the sources, read, send, commit, and let the sources hear how it ended.

        Raises:
            HoldfastError: whatever stands in the way; the session is then aborted.
        """
        tools = self._tools
        async with SourcesOfRun(tools.executor, wish) as opened:
            begun = await tools.endpoints.call(lambda channel: StateServiceStub(channel).BeginPoint, request)
            access = await self._access(begun.session_id, begun.grant)
            session = Session(tools.endpoints, access, begun.session_id, ttl_ms=begun.session_ttl_ms, clock=tools.clock)
            async with session, Uploader(access, tools.pool, clock=tools.clock) as uploader:
                for point in (begun.parent, begun.base):
                    if point.point_id:
                        check_point(access.ring, point)
                try:
                    await opened.open(begun)
                    reader, volumes = await self._read(begun, access, uploader, opened, wish)

                    async def committed() -> tuple[str, ...]:
                        told = await opened.committed()
                        await tools.processes.ended()
                        # Not before: whether blocks that nobody needs any more are lost is not this point's concern.
                        if reader.lost_bases:
                            building_on = begun.parent.point_id or begun.base.point_id
                            await tools.report_damage(tuple(reader.lost_bases), building_on)
                        return (*_about_template(request, begun), *reader.notices, *told)

                    commit = self._committing(begun, access, volumes)
                    await self._finish(uploader, session, reader.sums, commit, committed)
                finally:
                    # While the session still holds the VM: another backup would meet trackers that are not told yet.
                    await opened.end()
                    await tools.processes.ended()

    def _committing(
        self, begun: state_pb2.BeginPointResponse, access: Access, volumes: list[VolumeRecord]
    ) -> Callable[[TransferStats], Awaitable[PointInfo]]:
        """Return the call that makes the point visible."""
        parent_id = begun.parent.point_id
        mac = point_mac(
            access.ring,
            tenant=access.ring.tenant,
            point_id=begun.session_id,
            vm_id=begun.vm.vm_id,
            parent_id=parent_id,
            volumes=volumes,
        )

        async def commit(stats: TransferStats) -> PointInfo:
            answer = await self._tools.endpoints.call(
                lambda channel: StateServiceStub(channel).CommitPoint,
                state_pb2.CommitPointRequest(
                    session_id=begun.session_id,
                    volumes=volumes,
                    mac=mac,
                    stats=transfer_message(stats),
                    parent_id=parent_id,
                ),
                timeout_s=COMMIT_TIMEOUT_S,
            )
            return point_info(answer.point)

        return commit

    async def _read(
        self,
        begun: state_pb2.BeginPointResponse,
        access: Access,
        uploader: Uploader,
        opened: SourcesOfRun,
        wish: PointWish,
    ) -> tuple[PointReader, list[VolumeRecord]]:
        """Read all volumes into the uploader; damage of earlier indexes is reported."""
        tools = self._tools
        parent = begun.parent if begun.HasField("parent") else None
        base = begun.base if begun.HasField("base") else None
        blocks = tools.reader(access)
        index = tools.index(access, blocks)
        damage: list[bytes] = []
        reader = PointReader(
            access,
            uploader,
            index,
            blocks,
            tools.executor,
            tools.processes,
            workers=tools.workers,
            key_epoch=access.sealing_epoch(begun.key_epoch),
            progress=self._progress,
            damaged_index=damage.extend,
        )
        damaged = frozenset(split_ids(begun.damaged_ids))
        sampler = Sampler(
            access.ring, tools.executor, fraction=wish.sample, seed=tools.random_bytes(_SAMPLE_SEED_BYTES)
        )
        async with laid_over_parent(opened.sources, begun, access) as laid:
            sources = PointSources(begun.vm, parent, base, damaged, laid, wish.sources.keys(), wish.told)
            volumes = await reader.read(sources, Planner(sources, index, tools.executor, sampler))
        if damage:
            await tools.report_damage(tuple(damage), begun.parent.point_id)
        return reader, volumes


class ObjectJob(WriteJob[ObjectInfo]):
    """Makes a stored object."""

    async def run(
        self,
        request: state_pb2.BeginObjectRequest,
        pieces: AsyncIterator[bytes],
        *,
        origin: ObjectOrigin | None = None,
    ) -> None:
        """Begin, cut and send what `pieces` yields, commit; with an `origin`, which may grow till then, a set of files.

        Raises:
            HoldfastError: whatever stands in the way; the session is then aborted.
        """
        from holdfast.objects import ObjectWriter  # what saves VMs does not wait for this to load

        tools = self._tools
        begun = await tools.endpoints.call(lambda channel: StateServiceStub(channel).BeginObject, request)
        access = await self._access(begun.session_id, begun.grant)
        session = Session(tools.endpoints, access, begun.session_id, ttl_ms=begun.session_ttl_ms, clock=tools.clock)
        async with session, Uploader(access, tools.pool, clock=tools.clock) as uploader:
            writer = ObjectWriter(
                access,
                uploader,
                tools.executor,
                workers=tools.workers,
                key_epoch=access.sealing_epoch(begun.key_epoch),
                progress=self._progress,
            )
            root, block_count = await writer.write(pieces)
            size = writer.sums.logical_bytes
            mac = object_mac(
                access.ring,
                tenant=access.ring.tenant,
                storage_id=begun.session_id,
                task_id=request.task_id,
                size_bytes=size,
                root=root,
            )

            async def commit(stats: TransferStats) -> ObjectInfo:
                answer = await tools.endpoints.call(
                    lambda channel: StateServiceStub(channel).CommitObject,
                    state_pb2.CommitObjectRequest(
                        session_id=begun.session_id,
                        size_bytes=size,
                        root=root,
                        block_count=block_count,
                        mac=mac,
                        stats=transfer_message(stats),
                        form=OBJECT_FORM_UNSPECIFIED if origin is None else OBJECT_FORM_FILES,
                        origin=origin,
                    ),
                    timeout_s=COMMIT_TIMEOUT_S,
                )
                return object_info(answer.object)

            await self._finish(uploader, session, writer.sums, commit)
