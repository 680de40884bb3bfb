"""kill -9 at random moments: no acknowledged block or stamp is lost, nothing that was deleted comes back."""

from __future__ import annotations

import os
import random
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from holdfast_storagenode.store import Verdict
from tests.storagenode.blocks import make_block, make_blocks
from tests.storagenode.cluster import WAIT_S
from tests.storagenode.engines import open_engine
from tests.storagenode.writer_process import BLOCK_BYTES

ROOT = Path(__file__).parents[2]
ROUNDS = 4


def run_and_kill(directory: Path, first: int, lines_until_kill: int, pause_s: float) -> list[str]:
    """Run the writer, kill it some time after so many acknowledgements, return all the lines that it wrote."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.storagenode.writer_process", str(directory), str(first)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdout is not None
    output = b""
    try:
        deadline = time.monotonic() + WAIT_S
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while output.count(b"\n") < lines_until_kill:
                assert time.monotonic() < deadline, "the writer does not get on"
                if selector.select(0.1):
                    read = os.read(process.stdout.fileno(), 1 << 16)
                    assert read, "the writer ended by itself"
                    output += read
            # The moment within a write is the point of the test.
            selector.unregister(process.stdout)
            selector.select(pause_s)
    finally:
        process.send_signal(signal.SIGKILL)
        output += process.stdout.read()
        process.stdout.close()
        process.wait()
    return output.decode().split("\n")[:-1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_no_acknowledged_block_is_lost_by_kill_9(tmp_path: Path, seed: int) -> None:
    moments = random.Random(seed)
    stamps: dict[bytes, int] = {}
    acknowledged: dict[int, None] = {}
    deleted: set[int] = set()
    asked: set[int] = set()
    for round_number in range(ROUNDS):
        first = round_number * 1_000_000
        lines = run_and_kill(tmp_path, first, moments.randrange(3, 200), moments.random() * 0.02)
        for line in lines:
            if line.startswith("?"):
                asked.add(int(line[1:]))
            elif line.startswith("-"):
                deleted.add(int(line[1:]))
            elif line.startswith("="):
                number, stamp = map(int, line[1:].split())
                stamps[make_block(number, size=BLOCK_BYTES).id] = stamp
            else:
                number, count = map(int, line.split())
                acknowledged.update(dict.fromkeys(range(number, number + count)))
    store = open_engine(tmp_path)
    certain = [number for number in acknowledged if number not in asked]
    for at in range(0, len(certain), 512):
        numbers = certain[at : at + 512]
        blocks = [make_block(number, size=BLOCK_BYTES) for number in numbers]
        assert store.get(1, [block.id for block in blocks], bytes_max=1 << 30) == blocks
    gone = [make_blocks(1, size=BLOCK_BYTES, first=number)[0].id for number in sorted(deleted)]
    assert store.has(1, gone) == [Verdict.MISSING] * len(gone)
    assert store.status().quarantined_count == 0
    assert len(certain) > 50
    listed = store.scan(1, partition=None, after=b"", limit=1 << 20)
    assert [entry.block_id for entry in listed if entry.stamp < stamps.get(entry.block_id, 1)] == []
    ids = {entry.block_id for entry in listed}
    assert stamps.keys() <= ids
    assert len(stamps) > 20
    assert store.delete(1, list(stamps), cutoff=2) == [Verdict.KEPT] * len(stamps), "the stamps are still known"
    store.close()
