"""What a VM carries through its life and leaves at its end: keep rules, and the receipt of its discarding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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
