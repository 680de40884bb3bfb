"""What one node's store takes for ever more small blocks: to put, find, read, open, compare."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.measure import stored_bytes
from holdfast_core.model.block import Codec, Kind, SealedBlock
from holdfast_core.model.keys import KeyRing, TenantSecrets
from holdfast_core.model.layout import Layout, LayoutNode, plan_layout
from holdfast_core.model.limits import PARTITIONS_DEFAULT
from holdfast_storagenode.segments.engine import SegmentStore
from holdfast_storagenode.store import Verdict

TENANT: Final = 1
_BATCH: Final = 1000
_SAMPLE: Final = 10_000
_INCARNATION: Final = bytes(16)


def measure_blocks(folder: Path, sizes: tuple[int, ...], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Fill one store up to each of the sizes, ascending, and measure there."""
    layout = plan_layout(None, [LayoutNode("n", "z", 1)], 1, seed=1, partitions=PARTITIONS_DEFAULT).layout
    ring = KeyRing(
        TenantSecrets(
            tenant=TENANT,
            data_root=secrets.token_bytes(32),
            data_epochs={1: secrets.token_bytes(32)},
            structure_root=secrets.token_bytes(32),
            structure_epochs={1: secrets.token_bytes(32)},
        )
    )
    sealer = ring.sealer(Kind.VOLUME, 1)
    directory = folder / "store"
    directory.mkdir()
    rows: list[dict[str, Any]] = []
    kept: list[bytes] = []
    count = 0
    for size in sizes:
        store = _open(directory, layout)
        put_s = 0.0
        before = count
        while count < size:
            blocks = [
                sealer.seal(number.to_bytes(64, "big"), codec=Codec.STORED)
                for number in range(count, min(size, count + _BATCH))
            ]
            put_s += _timed(partial(store.put, TENANT, blocks))[0]
            kept += [block.id for block in random.Random(count).sample(blocks, len(blocks) // 100 + 1)]
            count += len(blocks)
        row = {"blocks": size, "put_us": 1e6 * put_s / max(1, size - before)} | _look(store, layout, kept)
        # What was written since the last checkpoint is in the log alone: that is what a crash leaves to replay.
        row["close_s"] = _timed(store.close)[0]
        row["open_s"], again = _timed(lambda: _open(directory, layout))
        again.close()
        row["index_bytes"] = sum(stored_bytes_of(path) for path in directory.iterdir() if path.name != "segments")
        row["segment_bytes"] = stored_bytes(directory / "segments")
        rows.append(row)
        say(f"blocks: {row}")
    return rows


def stored_bytes_of(path: Path) -> int:
    """Bytes that a file, or what is below a folder, occupies on the disk."""
    return stored_bytes(path) if path.is_dir() else path.stat().st_blocks * 512


def _look(store: SegmentStore, layout: Layout, kept: list[bytes]) -> dict[str, Any]:
    sample = random.Random(1).sample(kept, min(len(kept), _SAMPLE))
    has_s, verdicts = _timed(lambda: store.has(TENANT, sample))
    if any(verdict is not Verdict.OK for verdict in verdicts):
        raise RuntimeError("the store lost a block")
    get_s, found = _timed(lambda: [store.get(TENANT, [block_id], bytes_max=1 << 20)[0] for block_id in sample[:1000]])
    if not all(isinstance(item, SealedBlock) for item in found):
        raise RuntimeError("the store lost a block")
    first_s, _ = _timed(lambda: [store.holdings(place) for place in range(layout.partitions)])
    again_s, _ = _timed(lambda: [store.holdings(place) for place in range(layout.partitions)])
    return {
        "has_us": 1e6 * has_s / len(sample),
        "get_us": 1e6 * get_s / min(1000, len(sample)),
        "digests_first_s": first_s,
        "digests_again_s": again_s,
        "rss_mb": rss_bytes() / 1e6,
    }


def rss_bytes() -> int:
    """Return the memory that this process holds."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the system does not tell VmRSS")


def _open(directory: Path, layout: Layout) -> SegmentStore:
    return SegmentStore.open(directory, incarnation=_INCARNATION, partition_of=layout.partition_of)


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start_s = time.monotonic()
    result = call()
    return time.monotonic() - start_s, result
