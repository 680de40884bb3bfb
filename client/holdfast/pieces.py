"""Application data on its way in: a file, an iterable or an asynchronous one becomes pieces of a bounded size."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import BinaryIO, Final

from holdfast_core.model.limits import MIB

PIECE_BYTES: Final = 4 * MIB


Pieces = BinaryIO | Iterable[bytes] | AsyncIterable[bytes]
"""A file object open for reading bytes, or the bytes in pieces."""


def _slices(data: bytes) -> Iterable[bytes]:
    view = memoryview(data)
    return (bytes(view[at : at + PIECE_BYTES]) for at in range(0, len(data), PIECE_BYTES))


def _following(iterator: Iterator[bytes]) -> bytes | None:
    return next(iterator, None)


async def pieces_of(stream: Pieces) -> AsyncIterator[bytes]:
    """Yield what a stream gives, reading blocking ones in a thread; large pieces are cut to `PIECE_BYTES`."""
    if isinstance(stream, AsyncIterable):
        async for piece in stream:
            for part in _slices(piece):
                yield part
        return
    read = getattr(stream, "read", None)
    iterator: Iterator[bytes] = iter(lambda: read(PIECE_BYTES), b"") if read is not None else iter(stream)
    while (block := await asyncio.to_thread(_following, iterator)) is not None:
        for part in _slices(block):
            yield part
