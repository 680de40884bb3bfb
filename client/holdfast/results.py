"""What the SDK answers with: frozen values, sizes in bytes, times in Unix milliseconds or seconds as named."""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from holdfast_core.model.limits import VOLUME_BLOCK_BYTES_DEFAULT

if TYPE_CHECKING:
    from holdfast.lifecycle import KeepRule
    from holdfast.retention import PointLock, RetentionRules


class Consistency(enum.Enum):
    """How the source stood while a volume was read."""

    OFFLINE = "offline"
    CRASH = "crash"
    APPLICATION = "application"
    FUZZY = "fuzzy"


class Reading(enum.Enum):
    """How a volume was read. DISTRUSTED is as COMPARED, because a sample contradicted the change tracker."""

    UNKNOWN = "unknown"
    WHOLE = "whole"
    COMPARED = "compared"
    CHANGED = "changed"
    DISTRUSTED = "distrusted"


class Codec(enum.Enum):
    """How a volume's new blocks are compressed. DEFAULT is Zstandard level 1."""

    DEFAULT = "default"
    STORED = "stored"
    LZ4 = "lz4"
    ZSTD = "zstd"


@dataclass(frozen=True, slots=True)
class VolumeSpec:
    """A volume as registered.

    Attributes:
        uri: source; a path or a `file:` URI of a raw file or block device.
        block_bytes: block size, a power of two from 16 KiB to 4 MiB.
        codec: how new blocks are compressed.
        live: whether the source may change while it is read; a point for which it did is marked fuzzy.
        delta: whether a changed block may be coded against the block that its place held before. Those have to be read
            for it; where that does not pay it is soon given up by itself.
    """

    uri: str | os.PathLike[str]
    block_bytes: int = VOLUME_BLOCK_BYTES_DEFAULT
    codec: Codec = Codec.DEFAULT
    live: bool = False
    delta: bool = True


@dataclass(frozen=True, slots=True)
class VmInfo:
    """A registered VM; `volumes` and `labels` by name.

    Attributes:
        definition: whatever its orchestrator defines it with; left out of lists.
        definition_name: file name of the definition, empty for none.
        template_id: the point that first snapshots take fingerprints from, empty for none.
        keep: what must be stored before it may be discarded.
        discarding_unix_ms: when its discarding began; 0 for a VM that lives.
        retention: which of its points are kept; None keeps all.
    """

    vm_id: str
    volumes: dict[str, VolumeSpec]
    created_unix_ms: int
    labels: Mapping[str, str] = field(default_factory=dict)
    definition: bytes = b""
    definition_name: str = ""
    template_id: str = ""
    keep: tuple[KeepRule, ...] = ()
    discarding_unix_ms: int = 0
    retention: RetentionRules | None = None


@dataclass(frozen=True, slots=True)
class TransferStats:
    """What one session read, sent and saved; all in bytes but the counts of blocks.

    Attributes:
        logical_bytes: size of the volumes or the object.
        read_bytes: read from the source.
        changed_bytes: plaintext that differs from the parent; all that is not zero for a snapshot.
        deduplicated_bytes: part of `changed_bytes` that the cluster already had.
        stored_bytes: sealed bytes new to the cluster, one copy counted.
        sent_bytes: sealed bytes that went over the wire, all copies counted.
        stored_plain_bytes: plaintext of the blocks counted in `stored_bytes`.
        changed_blocks: blocks that differ from the parent.
        stored_blocks: blocks new to the cluster, index nodes too.
        under_replicated_blocks: blocks at quorum but not yet with every owner at commit.
        index_bytes: part of `stored_bytes` that is index nodes.
        delta_blocks: blocks that were coded against an earlier block.
        delta_plain_bytes: their plaintext.
        delta_bytes: their sealed bytes.
        sampled_bytes: read and compared although a change tracker called it unchanged.
    """

    logical_bytes: int = 0
    read_bytes: int = 0
    changed_bytes: int = 0
    deduplicated_bytes: int = 0
    stored_bytes: int = 0
    sent_bytes: int = 0
    stored_plain_bytes: int = 0
    changed_blocks: int = 0
    stored_blocks: int = 0
    under_replicated_blocks: int = 0
    index_bytes: int = 0
    delta_blocks: int = 0
    delta_plain_bytes: int = 0
    delta_bytes: int = 0
    sampled_bytes: int = 0


@dataclass(frozen=True, slots=True)
class VolumeInfo:
    """One volume of a point. `block_count` counts the blocks that are not zero; `root` is empty if all are.

    `reading` says how it was read, and `reading_note` why a change tracker was not used, if there was one.
    """

    name: str
    size_bytes: int
    block_bytes: int
    block_count: int
    consistency: Consistency
    root: bytes
    reading: Reading = Reading.UNKNOWN
    reading_note: str = ""


@dataclass(frozen=True, slots=True)
class PointInfo:
    """A recovery point. `parent_id` is empty for a snapshot; `forgotten` marks a lineage stub without content.

    `labels` and the definition are what the VM had when the point was begun; `definition` is left out of lists. `lock`
    is what keeps it from being forgotten, None where nothing does.
    """

    point_id: str
    vm_id: str
    parent_id: str
    number: int
    created_unix_ms: int
    volumes: tuple[VolumeInfo, ...]
    stats: TransferStats
    forgotten: bool
    labels: Mapping[str, str] = field(default_factory=dict)
    definition: bytes = b""
    definition_name: str = ""
    lock: PointLock | None = None

    @property
    def size_bytes(self) -> int:
        """Size of all volumes."""
        return sum(volume.size_bytes for volume in self.volumes)


@dataclass(frozen=True, slots=True)
class ObjectOrigin:
    """Where the files of a stored object come from.

    Attributes:
        vm_id: the VM; empty for files from a directory, as are the point and the volume.
        point_id: the recovery point that they were read from.
        volume: the volume.
        keep_rule: name of the VM's keep rule that they fulfil; empty for none.
        keep_digest: stands for what that rule said, 32 bytes; empty for none.
        file_count: how many entries the set has.
    """

    vm_id: str
    point_id: str
    volume: str
    keep_rule: str
    keep_digest: bytes
    file_count: int


class ObjectForm(enum.Enum):
    """What the bytes of a stored object are: whatever the caller gave, or a set of files."""

    BYTES = "bytes"
    FILES = "files"


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """A stored object of a task; `origin` is None where it holds no files."""

    storage_id: str
    task_id: str
    size_bytes: int
    block_count: int
    created_unix_ms: int
    stats: TransferStats
    form: ObjectForm = ObjectForm.BYTES
    origin: ObjectOrigin | None = None


@dataclass(frozen=True, slots=True)
class NodeShare:
    """How much of something one node keeps.

    Attributes:
        node_id: name of the node.
        zone: its failure domain.
        blocks: distinct blocks that the newest layout puts there.
        bytes: their sealed bytes.
    """

    node_id: str
    zone: str
    blocks: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Stats:
    """Sums over a VM's points, or over the tenant.

    Attributes:
        logical_bytes: all points and objects as if each were kept whole.
        stored_bytes: sealed bytes that the sessions added, one copy counted.
        exclusive_bytes: sealed bytes reachable from these points alone; None where too few nodes answer to tell.
        shared_bytes: sealed bytes reachable from these points and from others too; None as `exclusive_bytes`.
        cluster_used_bytes: what the nodes' segments occupy, all copies, whole cluster; 0 for who may not see the
            whole cluster.
        share_blocks: distinct blocks that the shares are of, one copy counted.
        shares: how these spread over the nodes, by name; empty as `exclusive_bytes`.
    """

    vm_count: int
    point_count: int
    object_count: int
    logical_bytes: int
    stored_bytes: int
    exclusive_bytes: int | None
    shared_bytes: int | None
    cluster_used_bytes: int
    transfer: TransferStats
    share_blocks: int = 0
    shares: tuple[NodeShare, ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a long operation is.

    Attributes:
        phase: "send", "settle" (waiting for the last copies), "commit", "restore", "retrieve" or "verify".
        bytes_done: logical bytes dealt with.
        bytes_total: logical bytes in all; 0 where not known beforehand (streams).
    """

    phase: str
    bytes_done: int
    bytes_total: int


ProgressCallback = Callable[[Progress], None]
"""Called often, from the SDK's event loop: return quickly. An exception from it ends the operation."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """The last write of a manager, timed; seconds count from the call.

    Attributes:
        resource_id: the point or object.
        stats: what was moved.
        quorum_s: when the last block had a write quorum.
        committed_s: when the point or object was visible.
        replicated_s: when the last owner had acknowledged; None while copies are under way or if an owner failed.
        notices: sentences for people: volumes read whole although there is a change tracker, and trackers lost.
    """

    resource_id: str
    stats: TransferStats
    quorum_s: float
    committed_s: float
    replicated_s: float | None
    notices: tuple[str, ...] = ()
