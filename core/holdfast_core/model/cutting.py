"""Cuts application data by its content, so that an insertion shifts nothing after it (ADR 0006).

FastCDC of `pyfastcdc`, between 64 KiB and 1 MiB, 256 KiB on average. The tenant's cutting key seeds the gear table, so
that cut lengths, which nodes see as block lengths, cannot be looked up against public files without the key.
Cuts depend on the bytes alone, never on how they were handed over.
"""

from __future__ import annotations

from typing import Final

from pyfastcdc import FastCDC

from holdfast_core.model.limits import KIB, MIB
from holdfast_core.model.xaes import Buffer

CUT_BYTES_MIN: Final = 64 * KIB
CUT_BYTES_AVERAGE: Final = 256 * KIB
CUT_BYTES_MAX: Final = 1 * MIB
_SEED_BYTES: Final = 8
_SEED_MAX: Final = 2**63 - 1
_GATHER_BYTES: Final = 4 * CUT_BYTES_MAX


def _seed(cutting_key: bytes) -> int:
    """Return 63 bits of the key, never 0: the library shifts the seed up by one bit, and takes 0 for no seed."""
    return int.from_bytes(cutting_key[:_SEED_BYTES], "little") & _SEED_MAX | 1


class Cutter:
    """Cuts one stream. Holds at most 4 MiB and what the last `feed` brought; not for two threads at once."""

    def __init__(self, cutting_key: bytes) -> None:
        """Take the tenant's cutting key, 32 bytes."""
        self._cutter = FastCDC(
            CUT_BYTES_AVERAGE,
            min_size=CUT_BYTES_MIN,
            max_size=CUT_BYTES_MAX,
            normalized_chunking=2,
            seed=_seed(cutting_key),
        )
        self._gathered: list[bytes] = []
        self._gathered_bytes = 0

    def feed(self, data: Buffer) -> list[bytes]:
        """Take the next bytes of the stream and return the cuts that are now certain, in order."""
        if len(data):
            self._gathered.append(bytes(data))
            self._gathered_bytes += len(data)
        return self._cut(CUT_BYTES_MAX) if self._gathered_bytes >= _GATHER_BYTES else []

    def finish(self) -> list[bytes]:
        """Return the cuts of what is left; none of a stream without bytes."""
        return self._cut(0)

    def _cut(self, keep_bytes: int) -> list[bytes]:
        """Cut as long as more than `keep_bytes` are left: a cut is certain once the longest possible one fits."""
        buffer = b"".join(self._gathered)
        cuts: list[bytes] = []
        at = 0
        if len(buffer) > keep_bytes:
            for chunk in self._cutter.cut_buf(buffer):
                if keep_bytes and len(buffer) - at < keep_bytes:
                    break
                cuts.append(bytes(chunk.data))
                at += chunk.length
        rest = buffer[at:]
        self._gathered = [rest] if rest else []
        self._gathered_bytes = len(rest)
        return cuts
