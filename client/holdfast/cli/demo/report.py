"""The demo's table: what a newcomer wants to know, in columns that add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.cli.output import format_seconds, print_facts, print_line, print_table
from holdfast_core.runtime.options import format_size

if TYPE_CHECKING:
    from holdfast.results import Transfer


@dataclass(frozen=True, slots=True)
class Write:
    """One snapshot, backup or piece of application data, and what it moved."""

    what: str
    transfer: Transfer


@dataclass(frozen=True, slots=True)
class Read:
    """One restore, how long it took, and whether the bytes are those that were saved."""

    what: str
    size_bytes: int
    seconds: float
    identical: bool


def print_report(writes: Sequence[Write], reads: Sequence[Read], *, used_bytes: int, copies: int) -> None:
    """Print the tables to stdout."""
    print_line("")
    rows = []
    for write in writes:
        stats = write.transfer.stats
        rows.append(
            (
                write.what,
                format_size(stats.logical_bytes),
                format_size(stats.changed_bytes),
                format_size(stats.deduplicated_bytes),
                format_size(stats.stored_bytes),
                format_size(stats.sent_bytes),
                format_seconds(write.transfer.committed_s),
            )
        )
    print_table(("SAVED", "SIZE", "CHANGED", "KNOWN", "STORED", f"SENT ({copies} COPIES)", "TIME"), rows)
    print_line("")
    print_table(
        ("REBUILT, one node dead", "SIZE", "TIME", "SHA-256"),
        [
            (
                read.what,
                format_size(read.size_bytes),
                format_seconds(read.seconds),
                "identical" if read.identical else "DIFFERENT",
            )
            for read in reads
        ],
    )
    print_line("")
    print_facts(_sums(writes, used_bytes=used_bytes, copies=copies))


def _sums(writes: Sequence[Write], *, used_bytes: int, copies: int) -> dict[str, str]:
    stats = [write.transfer.stats for write in writes]
    logical = sum(each.logical_bytes for each in stats)
    changed = sum(each.changed_bytes for each in stats)
    known = sum(each.deduplicated_bytes for each in stats)
    plain = sum(each.stored_plain_bytes for each in stats)
    stored = sum(each.stored_bytes for each in stats)
    return {
        "logical": f"{format_size(logical)}: every save as if kept whole",
        "changed": f"{format_size(changed)}: what is neither empty nor as in the save before{_less(logical, changed)}",
        "dedup": f"{format_size(changed - known)}: without what the cluster knew{_less(changed, changed - known)}",
        "compression": f"{format_size(stored)}: compressed, sealed, index and all{_less(plain, stored)}",
        "on disk": f"{format_size(used_bytes)}: {copies} copies on all nodes",
    }


def _less(before: int, after: int) -> str:
    return f" ({100 * (before - after) / before:.0f} % less)" if before else ""
