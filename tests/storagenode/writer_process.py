"""A process that writes to a store until it is killed, and says what was acknowledged. Run by `test_power.py`.

Arguments: directory, first block number. On stdout: one line a durable batch, "FIRST COUNT"; "-NUMBER" for a durable
delete, "?NUMBER" before it; "=NUMBER STAMP" for a durable stamp of a block that was there. A line about something
durable is written only after the store has acknowledged.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from holdfast_storagenode.segments.engine import EngineOptions, SegmentStore
from holdfast_storagenode.store import Verdict
from tests.storagenode.blocks import make_blocks, partition_of
from tests.storagenode.engines import INCARNATION

BATCH = 8
THREADS = 3
BLOCK_BYTES = 3000


def write(store: SegmentStore, first: int) -> None:
    """Put batches forever; delete the first block of every third."""
    number = first
    while True:
        blocks = make_blocks(BATCH, size=BLOCK_BYTES, first=number)
        store.put(1, blocks, stamp=1)
        os.write(1, f"{number} {BATCH}\n".encode())
        stamp = 2 + (number // BATCH) % 1000
        assert store.has(1, [block.id for block in blocks[2:4]], stamp=stamp) == [Verdict.OK] * 2
        os.write(1, f"={number + 2} {stamp}\n={number + 3} {stamp}\n".encode())
        store.put(1, blocks[4:5], stamp=stamp)
        os.write(1, f"={number + 4} {stamp}\n".encode())
        if (number // BATCH) % 3 == 0:
            os.write(1, f"?{number}\n".encode())
            store.delete(1, [blocks[0].id])
            os.write(1, f"-{number}\n".encode())
        if (number // BATCH) % 11 == 0:
            store.checkpoint()
        if (number // BATCH) % 17 == 0:
            store.compact(dead_fraction_min=0.01)
        number += BATCH * THREADS


def main() -> None:
    """Write from several threads at once."""
    directory, first = Path(sys.argv[1]), int(sys.argv[2])
    options = EngineOptions(capacity_bytes=1 << 40, reserve_bytes=0, segment_bytes=200_000)
    store = SegmentStore.open(directory, incarnation=INCARNATION, partition_of=partition_of, options=options)
    store.learn_epoch(1)
    threads = [threading.Thread(target=write, args=(store, first + BATCH * at)) for at in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
