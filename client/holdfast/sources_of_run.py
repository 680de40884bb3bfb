"""The sources of one session: opened after it began, told how it ended, closed. Their calls block, in threads."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Executor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

from holdfast.access import Access
from holdfast.convert import volume_spec
from holdfast.images.blocking import BlockingImage, runner_on
from holdfast.sources import BackupRun, DifferenceSource, GivenSource, OpenedSources, VolumeSource, open_sources
from holdfast.sources.layered import LayeredSource
from holdfast.sources.opening import open_of
from holdfast.sources.told import ToldChanges
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_proto.v1.records_pb2 import VolumeRecord
from holdfast_proto.v1.state_pb2 import BeginPointResponse

_log = logging.getLogger(__name__)

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class PointWish:
    """What a caller asks of a point, beside what the coordinator is told.

    Attributes:
        sources: read these instead of what is registered, by volume name.
        told: changes that the caller tracked.
        sample: share of what is called unchanged to read all the same, from 0 to 1.
    """

    sources: Mapping[str, GivenSource]
    told: ToldChanges | None
    sample: float


class SourcesOfRun:
    """Holds what the caller brought from the beginning, and all sources of the VM once they are open.

    Whatever happens, trackers hear of it exactly once, and everything is closed.
    """

    def __init__(self, executor: Executor, wish: PointWish) -> None:
        """Take what the caller brought."""
        self._executor = executor
        self._wish = wish
        self._opened: OpenedSources | None = OpenedSources(open_of(wish.sources))

    async def __aenter__(self) -> SourcesOfRun:
        """Return itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End what has not been ended."""
        await self.end()

    @property
    def sources(self) -> Mapping[str, VolumeSource]:
        """The sources by volume name."""
        return self._opened or {}

    async def open(self, begun: BeginPointResponse) -> None:
        """Open all sources of the VM.

        Raises:
            HoldfastError: as `open_sources`; INVALID_ARGUMENT if changes were told of a volume that is not there.
        """
        await self._in_thread(lambda: self._open(begun))

    def _open(self, begun: BeginPointResponse) -> None:
        specs = {spec.name: volume_spec(spec) for spec in begun.vm.volumes}
        if self._wish.told is not None:
            self._wish.told.check_names(specs)
        self._opened = None  # they are ended by `open_sources` if that fails
        run = BackupRun(begun.vm.vm_id, begun.session_id, begun.parent.point_id)
        self._opened = open_sources(specs, run, given=self._wish.sources)

    async def committed(self) -> tuple[str, ...]:
        """Let trackers go on from the new point, and close; returns notices."""
        opened, self._opened = self._opened, None
        if opened is None:
            return ()
        return await self._in_thread(lambda: (*opened.committed(), *opened.close()))

    async def end(self) -> None:
        """Let trackers go on from the parent, and close; nothing where that, or `committed`, has been done."""
        opened, self._opened = self._opened, None
        if opened is not None:
            for notice in await self._in_thread(lambda: (*opened.abandoned(), *opened.close())):
                _log.warning("%s", notice)

    async def _in_thread(self, work: Callable[[], Answer]) -> Answer:
        """Run a call to its end, even where the caller is cancelled meanwhile: a thread cannot be stopped."""
        future = asyncio.get_running_loop().run_in_executor(self._executor, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise


@asynccontextmanager
async def laid_over_parent(
    sources: Mapping[str, VolumeSource], begun: BeginPointResponse, access: Access
) -> AsyncIterator[Mapping[str, VolumeSource]]:
    """Give the sources, with the parent's volumes below those that are differences.

    Raises:
        HoldfastError: MISMATCH if one counts from another point than the parent, or the parent has no such volume;
            INVALID_ARGUMENT if there is no parent; DENIED if the parent may not be read.
    """
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as images:
        laid = dict(sources)
        for name, source in sources.items():
            if isinstance(source, DifferenceSource):
                from holdfast.images.point_image import PointImage  # few sources are differences

                record = _volume_below(name, source, begun)
                image = await images.enter_async_context(PointImage(access, record))
                laid[name] = LayeredSource(source, BlockingImage(image, runner_on(loop)))
        yield laid


def _volume_below(name: str, source: DifferenceSource, begun: BeginPointResponse) -> VolumeRecord:
    """Return the volume of the parent that a difference stands on."""
    if not begun.parent.point_id:
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT,
            f"volume {name} is a difference since {source.since}, and a snapshot has no parent; make a backup of it",
        )
    if source.since != begun.parent.point_id:
        raise HoldfastError(
            ErrorCode.MISMATCH,
            f"volume {name} is a difference since {source.since}, and the parent is {begun.parent.point_id}; "
            f"name the parent, or save the whole volume",
        )
    if not begun.grant.may_read_data:
        raise HoldfastError(
            ErrorCode.DENIED, f"volume {name} is a difference, which takes the right to read the VM's earlier points"
        )
    for volume in begun.parent.volumes:
        if volume.name == name:
            return volume
    raise HoldfastError(
        ErrorCode.MISMATCH, f"volume {name} is a difference since {source.since}, which has no volume of that name"
    )
