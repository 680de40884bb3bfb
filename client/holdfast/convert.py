"""Between the messages of the wire and the SDK's frozen values."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from holdfast.lifecycle import DiscardReceipt, KeepRule, KeptObject
from holdfast.results import (
    ClusterStatus,
    Codec,
    Consistency,
    LayoutChange,
    LayoutInfo,
    LayoutPlan,
    LayoutState,
    NodeDecision,
    NodeHealing,
    NodeInfo,
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
from holdfast.retention import PointLock, RetainedPoint, RetentionRules
from holdfast_core.model import block
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.layout import Layout
from holdfast_core.model.lifecycle import check_definition, checked_keep, checked_labels
from holdfast_core.model.limits import RETENTION_COUNT_MAX
from holdfast_core.model.names import check_id, check_name, check_volume_name
from holdfast_core.model.retention import check_rules
from holdfast_core.model.uris import check_volume_uri
from holdfast_proto.v1 import cluster_pb2, common_pb2, records_pb2, state_pb2

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
    content, name = definition or (b"", "")
    check_definition(content, name)
    only = next(iter(volumes)) if len(volumes) == 1 else ""
    return records_pb2.VmRecord(
        vm_id=vm_id,
        volumes=specs,
        labels=checked_labels(
            [records_pb2.Label(name=_text(name), value=_text(text)) for name, text in (labels or {}).items()]
        ),
        definition=content,
        definition_name=name,
        template_id=check_id(template, "template's id") if template else "",
        keep=checked_keep([keep_message(rule, only_volume=only) for rule in keep], volumes.keys()),
    )


def keep_message(rule: KeepRule, *, only_volume: str = "") -> records_pb2.KeepRule:
    """Return a keep rule as a message; `only_volume` is the volume of a rule that names none.

    Raises:
        HoldfastError: INVALID_ARGUMENT for patterns that are one text, which would be taken letter by letter.
    """
    for patterns in (rule.include, rule.exclude):
        if isinstance(patterns, str):
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT, f"the patterns of the keep rule {rule.name} are a text; give a list of them"
            )
    return records_pb2.KeepRule(
        name=rule.name,
        task_id=rule.task_id,
        volume=rule.volume or only_volume,
        partition=rule.partition,
        include=list(map(_text, rule.include)),
        exclude=list(map(_text, rule.exclude)),
        exclude_secrets=rule.exclude_secrets,
    )


def _text(text: str) -> str:
    """Return the text if a message can carry it. Raises INVALID_ARGUMENT."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"{text!r} is not a text in Unicode") from error
    return text


def keep_rule(message: records_pb2.KeepRule) -> KeepRule:
    """Return a registered keep rule."""
    return KeepRule(
        name=message.name,
        task_id=message.task_id,
        volume=message.volume,
        partition=message.partition,
        include=tuple(message.include),
        exclude=tuple(message.exclude),
        exclude_secrets=message.exclude_secrets,
    )


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
    volumes = {spec.name: volume_spec(spec) for spec in record.volumes}
    return VmInfo(
        vm_id=record.vm_id,
        volumes=volumes,
        created_unix_ms=record.created_unix_ms,
        labels=label_texts(record.labels),
        definition=record.definition,
        definition_name=record.definition_name,
        template_id=record.template_id,
        keep=tuple(map(keep_rule, record.keep)),
        discarding_unix_ms=record.discarding_unix_ms,
        retention=retention_rules(record.retention) if record.HasField("retention") else None,
    )


def retention_rules(message: records_pb2.RetentionRules) -> RetentionRules:
    """Return rules of retention."""
    return RetentionRules(**{field.name: getattr(message, field.name) for field in dataclasses.fields(RetentionRules)})


def retention_message(rules: RetentionRules) -> records_pb2.RetentionRules:
    """Return rules of retention as a message.

    Raises:
        HoldfastError: INVALID_ARGUMENT or LIMIT_EXCEEDED if they are not allowed.
    """
    counts = dataclasses.asdict(rules)
    for name, count in counts.items():
        if not 0 <= count <= RETENTION_COUNT_MAX:
            raise HoldfastError(
                ErrorCode.LIMIT_EXCEEDED, f"{name} is {count}; a rule keeps from 0 to {RETENTION_COUNT_MAX} points"
            )
    message = records_pb2.RetentionRules(**counts)
    check_rules(message)
    return message


def point_lock(record: records_pb2.LockRecord) -> PointLock:
    """Return a lock."""
    return PointLock(record.point_id, record.until_unix_ms, record.principal, record.set_unix_ms)


def retained_points(points: Iterable[state_pb2.RetainedPoint]) -> list[RetainedPoint]:
    """Return what rules made of points."""
    return [
        RetainedPoint(point.point_id, point.created_unix_ms, tuple(point.reasons), point.forgotten) for point in points
    ]


def label_texts(labels: Iterable[records_pb2.Label]) -> dict[str, str]:
    """Return values of labels by name."""
    return {label.name: label.value for label in labels}


def discard_receipt(answer: state_pb2.DiscardVmResponse) -> DiscardReceipt:
    """Return the receipt of a discarded VM."""
    kept = tuple(
        KeptObject(**{name: getattr(each, name) for name in KeptObject.__dataclass_fields__}) for each in answer.kept
    )
    plain = [name for name in DiscardReceipt.__dataclass_fields__ if name != "kept"]
    return DiscardReceipt(kept=kept, **{name: getattr(answer, name) for name in plain})


def transfer_stats(stats: records_pb2.TransferStats) -> TransferStats:
    """Return a session's counters."""
    return TransferStats(**{field: getattr(stats, field) for field in TransferStats.__dataclass_fields__})


def transfer_message(stats: TransferStats) -> records_pb2.TransferStats:
    """Return a session's counters as a message."""
    return records_pb2.TransferStats(**{name: getattr(stats, name) for name in TransferStats.__dataclass_fields__})


def point_info(record: records_pb2.PointRecord, lock: records_pb2.LockRecord | None = None) -> PointInfo:
    """Return a recovery point, with the lock that keeps it."""
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
        lock=point_lock(lock) if lock is not None else None,
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


def node_info(status: common_pb2.NodeStatus) -> NodeInfo:
    """Return a node."""
    decided = {"healing", "draining", "out", "weight_bytes"}
    plain = {name: getattr(status, name) for name in NodeInfo.__dataclass_fields__ if name not in decided}
    healing = NodeHealing(**{name: getattr(status.healing, name) for name in NodeHealing.__dataclass_fields__})
    state = status.state
    return NodeInfo(**plain, healing=healing, draining=state.draining, out=state.out, weight_bytes=state.weight_bytes)


def layout_info(message: common_pb2.Layout) -> LayoutInfo:
    """Return a layout in numbers."""
    layout = Layout.from_message(message)
    slots = {node.node_id: 0 for node in layout.nodes}
    for partition in range(layout.partitions):
        for node_id in layout.owners_of(partition):
            slots[node_id] += 1
    zones = {node.node_id: node.zone for node in layout.nodes}
    return LayoutInfo(
        epoch=layout.epoch, partitions=layout.partitions, replicas=layout.replicas, zones=zones, slots=slots
    )


def layout_state(answer: cluster_pb2.GetLayoutResponse) -> LayoutState:
    """Return the living layouts."""
    return LayoutState(
        layouts=tuple(layout_info(layout) for layout in answer.layouts),
        nodes_expected=answer.nodes_expected,
        nodes_registered=answer.nodes_registered,
    )


def layout_plan(answer: cluster_pb2.PlanLayoutResponse) -> LayoutPlan:
    """Return a plan."""
    return LayoutPlan(
        layout=layout_info(answer.layout),
        previous_epoch=answer.previous_epoch,
        slots_moved=answer.slots_moved,
        slots_total=answer.slots_total,
        explanation=tuple(answer.explanation),
    )


def node_decision(answer: cluster_pb2.SetNodeResponse) -> NodeDecision:
    """Return what a change of a node came to."""
    return NodeDecision(plan=layout_plan(answer.plan) if answer.HasField("plan") else None, applied=answer.applied)


def layout_change(change: cluster_pb2.LayoutChange) -> LayoutChange:
    """Return one change of the layout."""
    lists = ("joined", "left")
    plain = {name: getattr(change, name) for name in LayoutChange.__dataclass_fields__ if name not in lists}
    return LayoutChange(**plain, joined=tuple(change.joined), left=tuple(change.left))


def cluster_status(answer: cluster_pb2.GetClusterStatusResponse) -> ClusterStatus:
    """Return how the cluster is."""
    plain: Sequence[str] = [name for name in ClusterStatus.__dataclass_fields__ if name != "nodes"]
    return ClusterStatus(
        nodes=tuple(node_info(node) for node in answer.nodes), **{name: getattr(answer, name) for name in plain}
    )
