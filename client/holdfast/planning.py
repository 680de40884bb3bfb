"""How each volume of a VM is going to be read: all of it, or what a change hint names, if a sample bears it out."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from holdfast.descriptors import Extent
from holdfast.hints import (
    BlockRanges,
    Hint,
    IndexDamaged,
    ParentIndex,
    changed_blocks,
    damaged_positions,
    hint_of,
)
from holdfast.index import IndexReader
from holdfast.sampling import Sampler
from holdfast.sources import DifferenceSource, SharedSource, VolumeSource
from holdfast.sources.told import ToldChanges
from holdfast_proto.v1 import records_pb2
from holdfast_proto.v1.records_pb2 import PointRecord, VmRecord, VolumeRecord, VolumeSpec


@dataclass(frozen=True, slots=True)
class PointSources:
    """What a point is made from: the registration, open sources, and earlier points whose content may be named.

    Attributes:
        damaged: ids under parent and base that count as not present.
        opened: sources by volume name.
        given: names of those that the caller brought, which no other process can read.
        told: changes that the caller tracked.
    """

    vm: VmRecord
    parent: PointRecord | None
    base: PointRecord | None
    damaged: Collection[bytes]
    opened: Mapping[str, VolumeSource]
    given: Collection[str]
    told: ToldChanges | None


@dataclass(frozen=True, slots=True)
class VolumePlan:
    """How one volume is going to be read.

    Attributes:
        parent: its index in the parent; None where there is nothing to compare with.
        base: the volume in a point whose content may be named.
        reading: what the point's record says of it.
        note: why a change tracker is not used, a phrase.
        changed: positions to read; None reads all that is allocated.
    """

    spec: VolumeSpec
    source: VolumeSource
    parent: ParentIndex | None
    base: VolumeRecord | None
    reading: records_pb2.Reading.ValueType
    note: str = ""
    changed: BlockRanges | None = None

    def read_bytes(self) -> int:
        """Return about how many bytes there are to read, if the source can say."""
        data_bytes = self.source.data_bytes() if isinstance(self.source, SharedSource) else 0
        return data_bytes if self.changed is None else min(data_bytes, self.changed.count() * self.spec.block_bytes)

    def compared(self, note: str) -> VolumePlan:
        """Return the plan that reads everything, because of `note`."""
        return dataclasses.replace(self, reading=records_pb2.READING_COMPARED, note=note, changed=None)

    def notice(self) -> str:
        """Return a sentence that says why all of the volume is read."""
        return f"volume {self.spec.name}: all of it is read and compared, because {self.note}"


class Planner:
    """Plans the volumes of one session.

    Attributes:
        notices: sentences for people: where a hint could not be used, and why.
        sampled_bytes: plaintext that samples compared.
    """

    def __init__(self, sources: PointSources, index: IndexReader, executor: Executor, sampler: Sampler) -> None:
        """Bind to a session."""
        self.notices: list[str] = []
        self.sampled_bytes = 0
        self._sources = sources
        self._index = index
        self._executor = executor
        self._sampler = sampler

    async def plan(self, spec: VolumeSpec) -> VolumePlan:
        """Plan one volume; takes the sample.

        Raises:
            HoldfastError: UNREACHABLE, or what the source raises.
        """
        sources = self._sources
        source = sources.opened[spec.name]
        record = _same_volume(sources.parent, spec)
        parent = ParentIndex(self._index, record, sources.damaged) if record is not None else None
        base = _same_volume(sources.base, spec)
        reading = records_pb2.READING_WHOLE if parent is None else records_pb2.READING_COMPARED
        plan = VolumePlan(spec, source, parent, base, reading)
        hint = await self._hint(spec, source)
        if hint.extents is None and not hint.why_not:
            return plan
        if parent is not None and hint.extents is not None:
            plan = await self._trusting(plan, parent, hint.extents)
        elif parent is None:
            plan = dataclasses.replace(plan, note="the parent has no volume of this name and block size")
        else:
            plan = plan.compared(hint.why_not)
        if plan.note:
            self.notices.append(plan.notice())
        return plan

    async def _hint(self, spec: VolumeSpec, source: VolumeSource) -> Hint:
        parent_id = self._sources.parent.point_id if self._sources.parent is not None else ""
        return await asyncio.get_running_loop().run_in_executor(
            self._executor, hint_of, spec.name, source, self._sources.told, parent_id
        )

    async def _trusting(self, plan: VolumePlan, parent: ParentIndex, extents: Sequence[Extent]) -> VolumePlan:
        """Return the plan that goes by a hint if a sample agrees with it, else the one that reads everything."""
        changed = changed_blocks(extents, parent.record, plan.source.size_bytes)
        try:
            if self._sources.damaged:
                changed = BlockRanges([*changed, *await damaged_positions(parent)])
            hinted = dataclasses.replace(plan, reading=records_pb2.READING_CHANGED, changed=changed)
            if isinstance(plan.source, DifferenceSource):
                return hinted  # outside the hint it has nothing of its own that could be compared
            sample = await self._sampler.take(parent, plan.source, changed)
        except IndexDamaged:
            return plan.compared("the parent's index is damaged")
        self.sampled_bytes += sample.read_bytes
        if sample.differs_at is None:
            return hinted
        note = f"the change tracker called the block at byte {sample.differs_at} unchanged, and it is not the parent's"
        return dataclasses.replace(plan.compared(note), reading=records_pb2.READING_DISTRUSTED)


def _same_volume(point: PointRecord | None, spec: VolumeSpec) -> VolumeRecord | None:
    """Return the volume of an earlier point that can be compared block by block."""
    for volume in point.volumes if point is not None else ():
        if volume.name == spec.name and volume.block_bytes == spec.block_bytes:
            return volume
    return None
