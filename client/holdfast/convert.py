"""Between the messages of the wire and the SDK's frozen values."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from holdfast.results import (
    Codec,
    Consistency,
    NodeShare,
    ObjectForm,
    ObjectInfo,
    ObjectOrigin,
    PointInfo,
    Reading,
    Stats,
    TransferStats,
    VmInfo,
    VolumeInfo,
    VolumeSpec,
)
from holdfast_core.model import block
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.lifecycle import check_definition, checked_keep, checked_labels
from holdfast_core.model.names import check_id, check_name, check_volume_name
from holdfast_core.model.uris import check_volume_uri
from holdfast_proto.v1 import records_pb2, state_pb2

if TYPE_CHECKING:
    from holdfast.lifecycle import KeepRule
    from holdfast.retention import PointLock

_CONSISTENCY: Final = MappingProxyType(
    {
        records_pb2.CONSISTENCY_OFFLINE: Consistency.OFFLINE,
        records_pb2.CONSISTENCY_CRASH: Consistency.CRASH,
        records_pb2.CONSISTENCY_APPLICATION: Consistency.APPLICATION,
        records_pb2.CONSISTENCY_FUZZY: Consistency.FUZZY,
    }
)
CONSISTENCY_NUMBERS: Final = MappingProxyType({value: number for number, value in _CONSISTENCY.items()})

_READING: Final = MappingProxyType(
    {
        records_pb2.READING_WHOLE: Reading.WHOLE,
        records_pb2.READING_COMPARED: Reading.COMPARED,
        records_pb2.READING_CHANGED: Reading.CHANGED,
        records_pb2.READING_DISTRUSTED: Reading.DISTRUSTED,
    }
)

_CODECS: Final = MappingProxyType(
    {
        records_pb2.CODEC_CHOICE_UNSPECIFIED: Codec.DEFAULT,
        records_pb2.CODEC_CHOICE_STORED: Codec.STORED,
        records_pb2.CODEC_CHOICE_LZ4: Codec.LZ4,
        records_pb2.CODEC_CHOICE_ZSTD: Codec.ZSTD,
    }
)
_CODEC_NUMBERS: Final = MappingProxyType({value: number for number, value in _CODECS.items()})

BLOCK_CODECS: Final = MappingProxyType(
    {
        Codec.DEFAULT: block.Codec.ZSTD,
        Codec.STORED: block.Codec.STORED,
        Codec.LZ4: block.Codec.LZ4,
        Codec.ZSTD: block.Codec.ZSTD,
    }
)

Volumes = Mapping[str, "str | os.PathLike[str] | VolumeSpec"]


def vm_record(
    vm_id: str,
    volumes: Volumes,
    *,
    labels: Mapping[str, str] | None = None,
    definition: tuple[bytes, str] | None = None,
    template: str = "",
    keep: Sequence[KeepRule] = (),
) -> records_pb2.VmRecord:
    """Return the record to register; relative paths become absolute, so that they mean the same later.

    Raises:
        HoldfastError: INVALID_ARGUMENT or LIMIT_EXCEEDED if something is not allowed.
    """
    check_name(vm_id, "VM name")
    specs = []
    for name, given in sorted(volumes.items()):
        check_volume_name(name)
        spec = given if isinstance(given, VolumeSpec) else VolumeSpec(given)
        specs.append(
            records_pb2.VolumeSpec(
                name=name,
                uri=_absolute(os.fspath(spec.uri), live=spec.live),
                block_bytes=spec.block_bytes,
                live=spec.live,
                codec=_CODEC_NUMBERS[spec.codec],
                no_delta=not spec.delta,
            )
        )
    rules: list[records_pb2.KeepRule] = []
    if keep:
        from holdfast.lifecycle import keep_message  # here and below: most calls are about neither rules nor locks

        rules = [keep_message(rule, only_volume=next(iter(volumes)) if len(volumes) == 1 else "") for rule in keep]
    content, name = definition or (b"", "")
    check_definition(content, name)
    return records_pb2.VmRecord(
        vm_id=vm_id,
        volumes=specs,
        labels=checked_labels(
            [
                records_pb2.Label(name=checked_text(name), value=checked_text(text))
                for name, text in (labels or {}).items()
            ]
        ),
        definition=content,
        definition_name=name,
        template_id=check_id(template, "template's id") if template else "",
        keep=checked_keep(rules, volumes.keys()),
    )


def checked_text(text: str) -> str:
    """Return the text if a message can carry it. Raises INVALID_ARGUMENT."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"{text!r} is not a text in Unicode") from error
    return text


def _absolute(uri: str, *, live: bool) -> str:
    return str(check_volume_uri(uri, live=live).with_paths(os.path.abspath))


def volume_spec(spec: records_pb2.VolumeSpec) -> VolumeSpec:
    """Return a registered volume."""
    return VolumeSpec(
        spec.uri,
        block_bytes=spec.block_bytes,
        codec=_CODECS.get(spec.codec, Codec.DEFAULT),
        live=spec.live,
        delta=not spec.no_delta,
    )


def vm_info(record: records_pb2.VmRecord) -> VmInfo:
    """Return a registered VM."""
    keep: tuple[KeepRule, ...] = ()
    if record.keep:
        from holdfast.lifecycle import keep_rule

        keep = tuple(map(keep_rule, record.keep))
    retention = None
    if record.HasField("retention"):
        from holdfast.retention import retention_rules

        retention = retention_rules(record.retention)
    return VmInfo(
        vm_id=record.vm_id,
        volumes={spec.name: volume_spec(spec) for spec in record.volumes},
        created_unix_ms=record.created_unix_ms,
        labels=label_texts(record.labels),
        definition=record.definition,
        definition_name=record.definition_name,
        template_id=record.template_id,
        keep=keep,
        discarding_unix_ms=record.discarding_unix_ms,
        retention=retention,
    )


def label_texts(labels: Iterable[records_pb2.Label]) -> dict[str, str]:
    """Return values of labels by name."""
    return {label.name: label.value for label in labels}


def transfer_stats(stats: records_pb2.TransferStats) -> TransferStats:
    """Return a session's counters."""
    return TransferStats(**{field: getattr(stats, field) for field in TransferStats.__dataclass_fields__})


def transfer_message(stats: TransferStats) -> records_pb2.TransferStats:
    """Return a session's counters as a message."""
    return records_pb2.TransferStats(**{name: getattr(stats, name) for name in TransferStats.__dataclass_fields__})


def point_info(record: records_pb2.PointRecord, lock: records_pb2.LockRecord | None = None) -> PointInfo:
    """Return a recovery point, with the lock that keeps it."""
    held: PointLock | None = None
    if lock is not None:
        from holdfast.retention import point_lock

        held = point_lock(lock)
    volumes = tuple(
        VolumeInfo(
            name=volume.name,
            size_bytes=volume.size_bytes,
            block_bytes=volume.block_bytes,
            block_count=volume.block_count,
            consistency=_CONSISTENCY.get(volume.consistency, Consistency.FUZZY),
            root=volume.root,
            reading=_READING.get(volume.reading, Reading.UNKNOWN),
            reading_note=volume.reading_note,
        )
        for volume in record.volumes
    )
    return PointInfo(
        point_id=record.point_id,
        vm_id=record.vm_id,
        parent_id=record.parent_id,
        number=record.number,
        created_unix_ms=record.created_unix_ms,
        volumes=volumes,
        stats=transfer_stats(record.stats),
        forgotten=record.forgotten,
        labels=label_texts(record.labels),
        definition=record.definition,
        definition_name=record.definition_name,
        lock=held,
    )


def object_info(record: records_pb2.ObjectRecord) -> ObjectInfo:
    """Return a stored object."""
    return ObjectInfo(
        storage_id=record.storage_id,
        task_id=record.task_id,
        size_bytes=record.size_bytes,
        block_count=record.block_count,
        created_unix_ms=record.created_unix_ms,
        stats=transfer_stats(record.stats),
        form=ObjectForm.FILES if record.form == records_pb2.OBJECT_FORM_FILES else ObjectForm.BYTES,
        origin=_origin(record.origin) if record.HasField("origin") else None,
    )


def _origin(message: records_pb2.ObjectOrigin) -> ObjectOrigin:
    return ObjectOrigin(**{name: getattr(message, name) for name in ObjectOrigin.__dataclass_fields__})


def stats_info(answer: state_pb2.GetStatsResponse) -> Stats:
    """Return sums."""
    optional = ("exclusive_bytes", "shared_bytes")
    names = [name for name in Stats.__dataclass_fields__ if name not in ("transfer", "shares", *optional)]
    return Stats(
        transfer=transfer_stats(answer.transfer),
        shares=tuple(NodeShare(each.node_id, each.zone, each.blocks, each.bytes) for each in answer.shares),
        exclusive_bytes=answer.exclusive_bytes if answer.HasField("exclusive_bytes") else None,
        shared_bytes=answer.shared_bytes if answer.HasField("shared_bytes") else None,
        **{name: getattr(answer, name) for name in names},
    )
