"""What the SDK answers with: frozen values, sizes in bytes, times in Unix milliseconds or seconds as named."""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from holdfast.lifecycle import KeepRule
from holdfast.retention import PointLock, RetentionRules
from holdfast_core.model.limits import VOLUME_BLOCK_BYTES_DEFAULT


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
class VerifyReport:
    """What `verify` read and hashed; it returns only if nothing was damaged.

    Attributes:
        blocks: data blocks that were checked; with leaves of the index where nodes checked on their own.
        plain_bytes: plaintext whose fingerprint was checked; 0 where nodes checked on their own.
        thin_blocks: blocks that at least one owner does not hold whole; only counted where nodes checked on their own.
    """

    resource_id: str
    blocks: int
    plain_bytes: int
    thin_blocks: int = 0


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """What a restore brought.

    Attributes:
        point_id: the point that was restored.
        directory: where its volumes are.
        fetched_bytes: plaintext that came from the cluster.
        kept_bytes: plaintext that the local copy had already.
    """

    point_id: str
    directory: Path
    fetched_bytes: int
    kept_bytes: int


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
class NodeHealing:
    """What a node says of its copies.

    Attributes:
        synced_epoch: newest layout epoch of which it holds all that it has to; 0 for none.
        partitions: partitions that it owns in the newest layout that it knows.
        partitions_synced: those of them that it holds all of.
        partitions_at_risk: those that it does not, because too few former owners can be reached.
        foreign_blocks: blocks that it has to hand over before it lets go of them.
        unrepaired_blocks: blocks that it lacks or holds corrupt, and that no peer it reached could give.
        repaired_blocks: blocks that it got from peers since it started.
        repaired_bytes: their sealed bytes.
        scrub_permille: how much of its blocks the present round of scrubbing has read, in thousandths.
        scrubbed_unix_ms: when the last whole round ended; 0 for never.
        collection_epoch: newest collection epoch that it knows.
    """

    synced_epoch: int = 0
    partitions: int = 0
    partitions_synced: int = 0
    partitions_at_risk: int = 0
    foreign_blocks: int = 0
    unrepaired_blocks: int = 0
    repaired_blocks: int = 0
    repaired_bytes: int = 0
    scrub_permille: int = 0
    scrubbed_unix_ms: int = 0
    collection_epoch: int = 0


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """A storage node as the coordinator knows it.

    Attributes:
        layout_epoch: newest layout epoch under which, or a newer one, it takes every write.
        healing: what it says of its copies; told to who may see the whole cluster.
        draining: whether an operator drains it.
        out: whether layouts are made without it because it was down for too long; ends when it is back.
        weight_bytes: its weight in new layouts; 0 for its capacity.
    """

    node_id: str
    address: str
    zone: str
    up: bool
    full: bool
    capacity_bytes: int
    used_bytes: int
    free_bytes: int
    block_count: int
    quarantined_count: int
    last_seen_unix_ms: int
    layout_epoch: int
    healing: NodeHealing = NodeHealing()
    draining: bool = False
    out: bool = False
    weight_bytes: int = 0


@dataclass(frozen=True, slots=True)
class LayoutInfo:
    """A layout: how many owner slots each node has. `zones` and `slots` are by node id."""

    epoch: int
    partitions: int
    replicas: int
    zones: dict[str, str]
    slots: dict[str, int]


@dataclass(frozen=True, slots=True)
class LayoutState:
    """Living layouts, newest first, and how far the cluster is from its first one."""

    layouts: tuple[LayoutInfo, ...]
    nodes_expected: int
    nodes_registered: int


@dataclass(frozen=True, slots=True)
class LayoutPlan:
    """What applying the next layout would change; `previous_epoch` is what `apply_layout` takes."""

    layout: LayoutInfo
    previous_epoch: int
    slots_moved: int
    slots_total: int
    explanation: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NodeDecision:
    """What a change of a node came to: `plan` says what it moves (None before the first layout)."""

    plan: LayoutPlan | None
    applied: bool


@dataclass(frozen=True, slots=True)
class LayoutChange:
    """One change of the layout.

    Attributes:
        epoch: the epoch that it made.
        made_unix_ms: when.
        settled_unix_ms: when it was the only living one, or a newer one was; 0 while older ones live.
        reason: why, a phrase.
        slots_moved: owner slots that moved.
        slots_total: owner slots in all.
        joined: nodes that came in.
        left: nodes that went out.
    """

    epoch: int
    made_unix_ms: int
    settled_unix_ms: int
    reason: str
    slots_moved: int
    slots_total: int
    joined: tuple[str, ...]
    left: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """How the cluster is; `state` is "ready" or a sentence: what it waits for, what is at risk, how far it has healed.

    While it heals it takes writes and reads as ever; `writable` says whether it does.
    """

    cluster_id: str
    state: str
    writable: bool
    layout_epoch: int
    replicas: int
    nodes: tuple[NodeInfo, ...]
    vm_count: int
    point_count: int
    object_count: int
    session_count: int


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
