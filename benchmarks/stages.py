"""Where the CPU of a first snapshot goes: every stage of the data path on its own, on the same real blocks.

Each stage is measured alone and warm, so the sum is what the work costs before any waiting, copying between threads or
scheduling. What a whole run takes beyond the sum is overhead to look for; a stage's own time is what can be gained.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks.codec import BLOCK_BYTES
from benchmarks.loopback import send_over_loopback
from benchmarks.spans import allocated_ranges
from holdfast_core.model import codecs
from holdfast_core.model.block import Codec, Kind, verify
from holdfast_core.model.keys import KeyRing, generate_secrets
from holdfast_core.model.limits import BATCH_BYTES_TARGET

_READ_BYTES: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class StageFigures:
    """What one stage took for the sample.

    Attributes:
        name: of the stage.
        per: `once`, or `per copy` where every replica costs it again.
        bytes_done: plain or sealed bytes that went through.
        cpu_s: user and system, both ends where there are two.
        wall_s: wall time.
    """

    name: str
    per: str
    bytes_done: int
    cpu_s: float
    wall_s: float

    @property
    def mb_s(self) -> float:
        """MB a CPU second; a wall second where hardly any CPU is used."""
        return self.bytes_done / 1e6 / max(self.cpu_s, 1e-9)


def measure_stages(image: Path, scratch: Path, blocks: Sequence[bytes], codec: Codec) -> list[StageFigures]:
    """Measure every stage: reading on the whole image, all others on `blocks`; `scratch` takes a temporary file."""
    ring = KeyRing(generate_secrets(0, lambda count: bytes(range(count))))
    sealer = ring.sealer(Kind.VOLUME, 1)
    zero = bytes(BLOCK_BYTES)
    plain = sum(len(block) for block in blocks)
    sealed = [sealer.seal(block, codec=codec) for block in blocks]
    kept = sum(len(block.data) for block in sealed)
    batches = _batches([block.data for block in sealed])

    read_bytes = 0

    def read() -> None:
        nonlocal read_bytes
        buffer = memoryview(bytearray(_READ_BYTES))
        with open(image, "rb", buffering=0) as source:
            for start, end in allocated_ranges(image):
                for at in range(start, end, _READ_BYTES):
                    read_bytes += os.preadv(source.fileno(), [buffer[: min(_READ_BYTES, end - at)]], at)

    figures = [_timed("read", "once", read, lambda: read_bytes)]
    steps: list[tuple[str, Callable[[bytes], object]]] = [
        ("compare with zero", lambda block: block == zero),
        ("fingerprint", ring.fingerprint),
        ("compress", lambda block: codecs.compress(block, codec, None, quick=True)),
        ("compress and seal", lambda block: sealer.seal(block, codec=codec)),
    ]
    figures += [_timed(name, "once", partial(_drain, blocks, step), lambda: plain) for name, step in steps]
    sent = send_over_loopback(batches)
    figures.append(StageFigures("send and receive, gRPC", "per copy", kept, sent.cpu_s, sent.wall_s))
    figures.append(
        _timed(
            "node: verify hash", "per copy", lambda: [verify(block.id, block.data) for block in sealed], lambda: kept
        )
    )
    target = scratch / "stage-write"
    with open(target, "wb", buffering=0) as out:
        figures.append(_timed("node: write", "per copy", lambda: [out.write(batch) for batch in batches], lambda: kept))
        figures.append(_timed("node: fdatasync", "per copy", lambda: os.fdatasync(out.fileno()), lambda: kept))
    target.unlink()
    return figures


def scaled(figures: Sequence[StageFigures], factor: float) -> list[StageFigures]:
    """The figures of a sample, reckoned up to the whole image; reading already is of the whole."""
    return [
        each
        if each.name == "read"
        else StageFigures(each.name, each.per, int(each.bytes_done * factor), each.cpu_s * factor, each.wall_s * factor)
        for each in figures
    ]


def cpu_sum_s(figures: Sequence[StageFigures], *, copies: int) -> float:
    """CPU seconds of all stages for so many copies; compressing counts within sealing."""
    return sum(each.cpu_s * (copies if each.per == "per copy" else 1) for each in figures if each.name != "compress")


def _drain(blocks: Sequence[bytes], step: Callable[[bytes], object]) -> None:
    for block in blocks:
        step(block)


def _batches(pieces: Sequence[bytes]) -> list[bytes]:
    batches: list[bytes] = []
    pending: list[bytes] = []
    size = 0
    for piece in pieces:
        pending.append(piece)
        size += len(piece)
        if size >= BATCH_BYTES_TARGET:
            batches.append(b"".join(pending))
            pending, size = [], 0
    if pending:
        batches.append(b"".join(pending))
    return batches


def _timed(name: str, per: str, step: Callable[[], object], done: Callable[[], int]) -> StageFigures:
    cpu, wall = _cpu_s(), time.monotonic()
    step()
    return StageFigures(name=name, per=per, cpu_s=_cpu_s() - cpu, wall_s=time.monotonic() - wall, bytes_done=done())


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
