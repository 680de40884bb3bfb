"""Restoring every volume of a point, several at once, and its VM's definition beside them.

Until every byte of every volume is there and checked, files have temporary names; on any failure they are removed.
Zeros are never written, so raw files come out sparse, and images without the clusters.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

from holdfast.content import ContentReader
from holdfast.convert import point_info
from holdfast.damage import DamageReport, Places
from holdfast.findings import DamagedRange
from holdfast.index import IndexReader, volume_leaves
from holdfast.restoring.files import file_sink
from holdfast.restoring.qcow2 import ClusterMap, Qcow2Layout
from holdfast.restoring.targets import Target
from holdfast.restoring.volumes import WINDOWS_IN_FLIGHT, Callback, read_volume
from holdfast.results import ProgressCallback
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import TREE_FAN_OUT
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.blocks.reader import Unreadable
from holdfast_proto.v1.records_pb2 import PointRecord, VolumeRecord

ImageFormat: TypeAlias = Literal["raw", "qcow2"]
"""How a volume is written."""

DESCRIPTION_NAME: Final = "vm.json"
DAMAGE_NAME: Final = "damage.json"
VOLUMES_AT_ONCE: Final = 4


def check_format(text: str) -> ImageFormat:
    """Return the format that a text names.

    Raises:
        HoldfastError: INVALID_ARGUMENT if it names none.
    """
    for known in get_args(ImageFormat):
        if text == known:
            return known  # type: ignore[no-any-return]
    raise HoldfastError(
        ErrorCode.INVALID_ARGUMENT, f"volumes are restored as {' or '.join(get_args(ImageFormat))}, not as {text!r}"
    )


def description(point: PointRecord, image_format: ImageFormat, *, damage_name: str = "") -> bytes:
    """Return what is written beside the volumes, as JSON: whose they are, from when, and which file is which.

    `damage_name` is the file that tells what is missing of them; empty for volumes that are whole.
    """
    info = point_info(point)
    facts = {
        "vm_id": info.vm_id,
        "point_id": info.point_id,
        "parent_id": info.parent_id,
        "created_unix_ms": info.created_unix_ms,
        "labels": {label.name: label.value for label in point.labels},
        "definition": point.definition_name or None,
        **({"damage": damage_name} if damage_name else {}),
        "volumes": [
            {
                "name": volume.name,
                "file": f"{volume.name}.{image_format}",
                "format": image_format,
                "size_bytes": volume.size_bytes,
                "consistency": volume.consistency.value,
            }
            for volume in info.volumes
        ],
    }
    return json.dumps(facts, indent=2, ensure_ascii=False).encode() + b"\n"


def companions(point: PointRecord, image_format: ImageFormat, damage: Sequence[DamagedRange] = ()) -> dict[str, bytes]:
    """Return the small files that go beside the volumes, by name; with a map of what is missing, if anything is."""
    damage_name = ""
    if damage:
        damage_name = DAMAGE_NAME if point.definition_name != DAMAGE_NAME else f"holdfast-{DAMAGE_NAME}"
    files = {DESCRIPTION_NAME: description(point, image_format, damage_name=damage_name)}
    if point.definition_name:
        files[point.definition_name] = point.definition
    if damage_name:
        files[damage_name] = damage_map(point, damage)
    return files


def damage_map(point: PointRecord, damage: Sequence[DamagedRange]) -> bytes:
    """Return what is missing of the volumes, as JSON: ranges of bytes that are zeros in place of what was saved."""
    volumes = [
        {
            "name": volume.name,
            "size_bytes": volume.size_bytes,
            "damaged": [
                {
                    "offset": lost.offset,
                    "length": lost.length,
                    "reason": lost.reason.value,
                    "block_ids": [block_id.hex() for block_id in lost.block_ids],
                }
                for lost in damage
                if lost.volume == volume.name
            ],
        }
        for volume in point.volumes
    ]
    return json.dumps({"point_id": point.point_id, "volumes": volumes}, indent=2).encode() + b"\n"


async def restore_point(
    index: IndexReader,
    content: ContentReader,
    point: PointRecord,
    target: Target,
    damage: DamageReport,
    progress: ProgressCallback | None,
    *,
    image_format: ImageFormat = "raw",
) -> int:
    """Write every volume of a point into `target` and check it whole; publishing is the caller's.

    Returns the bytes of plaintext that were written.

    Raises:
        HoldfastError: UNREACHABLE, DENIED, TARGET_UNWRITABLE, …; damage is collected in `damage`.
    """
    callback = Callback("restore", sum(volume.size_bytes for volume in point.volumes), progress)
    windows = asyncio.Semaphore(WINDOWS_IN_FLIGHT)
    volumes = asyncio.Semaphore(VOLUMES_AT_ONCE)

    async def restore(volume: VolumeRecord) -> None:
        name = f"{volume.name}.{image_format}"
        path = target.directory / name
        async with volumes:
            place: Callable[[int], int] | None = None
            if image_format == "qcow2":
                layout = Qcow2Layout(volume.size_bytes, await _clusters(index, volume))
                descriptor = await asyncio.to_thread(_begin_image, target, name, layout)
                place = layout.offset_of
            else:
                descriptor = target.create(name, volume.size_bytes)
            sink = file_sink(descriptor, path, place=place)
            await read_volume(index, content, volume, sink, damage, callback, windows=windows)

    async with plain_task_group() as group:
        for volume in point.volumes:
            group.create_task(restore(volume))
    for name, data in companions(point, image_format, damage.map()).items():
        target.write(name, data)
    written = callback.done - damage.lost_bytes
    callback.finish()
    return written


def _begin_image(target: Target, name: str, layout: Qcow2Layout) -> int:
    descriptor = target.create(name, layout.file_bytes)
    sink = file_sink(descriptor, Path(target.directory / name))
    for piece in layout.metadata():
        sink([piece])
    return descriptor


async def _clusters(index: IndexReader, volume: VolumeRecord) -> ClusterMap:
    """Return which clusters the volume takes.

    What a node of the index stands for that cannot be read takes all it may: it may be readable when it is read again
    for the data, and where it is not, these clusters are zeros, which a sparse file does not keep.
    """
    clusters = ClusterMap()
    block_bytes = volume.block_bytes

    def lost(_: Unreadable, places: Places) -> None:
        for ranges in places.values():
            for start, end in ranges:
                clusters.add(start, end)

    async with aclosing(volume_leaves(index, volume, lost)) as groups:
        async for leaves in groups:
            for leaf_index, _, leaf in leaves:
                for slot in leaf.slots:
                    start = (leaf_index * TREE_FAN_OUT + slot) * block_bytes
                    clusters.add(start, min(start + block_bytes, volume.size_bytes))
    return clusters
