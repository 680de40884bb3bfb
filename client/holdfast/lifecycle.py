"""What a VM carries through its life and leaves at its end: keep rules, and the receipt of its discarding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.convert import checked_text
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_proto.v1 import records_pb2, state_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepRule:
    """Files of a VM that must be stored before the VM may be discarded.

    Attributes:
        task_id: the task that the kept files belong to from then on.
        include: patterns of paths, as `persist_files` takes them; at least one.
        exclude: patterns of paths to leave out.
        exclude_secrets: whether files that usually hold secrets are left out too.
        volume: the volume that the files are on; may be left out for a VM with one volume.
        partition: its partition, counted from 1; 0 finds the only file system there is.
        name: tells a VM's rules apart.
    """

    task_id: str
    include: Sequence[str]
    exclude: Sequence[str] = ()
    exclude_secrets: bool = False
    volume: str = ""
    partition: int = 0
    name: str = "keep"


@dataclass(frozen=True, slots=True)
class KeptObject:
    """A set of files that outlives its VM.

    Attributes:
        storage_id: the stored object.
        task_id: whose it is.
        keep_rule: name of the rule that it fulfils.
        size_bytes: its size.
        file_count: how many entries it has; directories and links count too.
        point_id: the point that it was read from.
        durable_blocks: its blocks, index nodes too, that were found on enough nodes when the VM was discarded.
    """

    storage_id: str
    task_id: str
    keep_rule: str
    size_bytes: int
    file_count: int
    point_id: str
    durable_blocks: int


@dataclass(frozen=True, slots=True)
class DiscardReceipt:
    """What became of a VM that was discarded.

    Attributes:
        vm_id: its name, which is free again.
        discarded_unix_ms: when.
        point_count: living points that went with it.
        newest_point_id: the newest of them; empty if there was none.
        released_bytes: what the tenant's quota is charged less.
        kept: what stays of it.
    """

    vm_id: str
    discarded_unix_ms: int
    point_count: int
    newest_point_id: str
    released_bytes: int
    kept: tuple[KeptObject, ...]


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
        include=list(map(checked_text, rule.include)),
        exclude=list(map(checked_text, rule.exclude)),
        exclude_secrets=rule.exclude_secrets,
    )


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


def discard_receipt(answer: state_pb2.DiscardVmResponse) -> DiscardReceipt:
    """Return the receipt of a discarded VM."""
    kept = tuple(
        KeptObject(**{name: getattr(each, name) for name in KeptObject.__dataclass_fields__}) for each in answer.kept
    )
    plain = [name for name in DiscardReceipt.__dataclass_fields__ if name != "kept"]
    return DiscardReceipt(kept=kept, **{name: getattr(answer, name) for name in plain})
