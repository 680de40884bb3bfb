"""What restores and checks found: what they brought, and what of it is damaged. Frozen values, as all results."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path


class DamageReason(enum.Enum):
    """Why bytes cannot be read: no owner has their block, all have it with wrong bytes, or some owner does not answer.

    What is UNREACHABLE may come back by itself. What is MISSING or CORRUPT comes back when the content is saved again.
    """

    MISSING = "missing"
    CORRUPT = "corrupt"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True)
class DamagedRange:
    """Bytes that could not be read.

    Attributes:
        volume: name of the volume; empty for application data.
        offset: where they begin.
        length: how many they are.
        reason: why.
        block_ids: blocks that are to blame, index nodes and bases of deltas too; at most 1,024 a range.
    """

    volume: str
    offset: int
    length: int
    reason: DamageReason
    block_ids: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was read and hashed; `verify` returns only if nothing was damaged, `survey` tells what is.

    Attributes:
        blocks: data blocks that were checked; with leaves of the index where nodes checked on their own.
        plain_bytes: plaintext whose fingerprint was checked; 0 where nodes checked on their own.
        thin_blocks: blocks that at least one owner does not hold whole; only counted where nodes checked on their own.
    """

    resource_id: str
    blocks: int
    plain_bytes: int
    thin_blocks: int = 0
    damage: tuple[DamagedRange, ...] = ()


@dataclass(frozen=True, slots=True)
class DamagedResource:
    """A recovery point or application data that cannot be read whole; `owner` is its VM or task."""

    resource_id: str
    owner: str
    damage: tuple[DamagedRange, ...]


@dataclass(frozen=True, slots=True)
class ClusterVerifyReport:
    """What `verify_all` read and hashed.

    Attributes:
        points: recovery points that were checked.
        objects: pieces of application data that were checked.
        gone: points and objects that were forgotten meanwhile.
        blocks: blocks that were checked; what several share counts once, as far as that is remembered.
        plain_bytes: plaintext whose fingerprint was checked; 0 where nodes checked on their own.
        thin_blocks: blocks that at least one owner does not hold whole; only counted where nodes checked on their own.
        damaged_points: points that cannot be read whole.
        damaged_objects: pieces of application data that cannot be read whole.
        damaged: which these are and where, up to 10,000 ranges in all.
    """

    points: int
    objects: int
    gone: int
    blocks: int
    plain_bytes: int
    thin_blocks: int
    damaged_points: int
    damaged_objects: int
    damaged: tuple[DamagedResource, ...]


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """What a restore brought.

    Attributes:
        point_id: the point that was restored.
        directory: where its volumes are.
        fetched_bytes: plaintext that came from the cluster.
        kept_bytes: plaintext that the local copy had already.
        damage: what is not there and left as zeros; only ever anything for a partial restore.
    """

    point_id: str
    directory: Path
    fetched_bytes: int
    kept_bytes: int
    damage: tuple[DamagedRange, ...] = ()
