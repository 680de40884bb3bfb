"""A process that seals spans for the SDK: `python -m holdfast.sealing_worker`, with a socket as its standard input.

Started by `holdfast.sealing` alone. It takes one request after another until the socket ends, and keeps nothing that
outlives it. What it cannot foresee ends it: the SDK sees the socket close and reads the reason from standard error.
Loads as little as it can: it is started for a single backup.
"""

from __future__ import annotations

import gc
import mmap
import os
import signal
import socket
from typing import Any, Final

from holdfast.descriptors import RawReader
from holdfast.sealing_messages import (
    MESSAGE_BYTES_MAX,
    READY,
    SLOT_BYTES,
    SLOTS,
    ArenaSealer,
    PlacedBlock,
    SpanRequest,
    VolumeRequest,
    pack_error,
    pack_span,
    unpack_entries,
    unpack_request,
)
from holdfast.spans import FingerprintCache, SpanContext, seal_volume_span
from holdfast_core.model.errors import HoldfastError

_STANDARD_INPUT: Final = 0


class Worker:
    """Serves one socket."""

    def __init__(self, channel: socket.socket, arena: memoryview) -> None:
        """Take the socket and the arena, `SLOTS` times `SLOT_BYTES` long."""
        self._channel = channel
        self._arena = arena
        self._caches: dict[tuple[int, int], FingerprintCache] = {}
        self._volumes: dict[int, tuple[int, SpanContext[PlacedBlock], ArenaSealer, RawReader]] = {}

    def serve(self) -> None:
        """Answer requests until the other end is closed."""
        while True:
            packet, descriptors, _, _ = socket.recv_fds(self._channel, MESSAGE_BYTES_MAX, 1)
            if not packet:
                return
            kind, body = unpack_request(packet)
            if kind == "span":
                self._channel.send(self._seal(body))
            elif kind == "volume":
                self._open(VolumeRequest.unpacked(body), descriptors[0])
            else:
                self._forget(body)

    def _open(self, request: VolumeRequest, descriptor: int) -> None:
        cache = self._caches.setdefault((request.session, request.codec), FingerprintCache())
        sealer = ArenaSealer(request.keys.sealer())
        context = SpanContext(request.keys, sealer, request.codec, cache, frozenset())
        reader = RawReader(descriptor, name=request.name, size_bytes=request.size_bytes, live=request.live)
        self._volumes[request.volume] = (request.session, context, sealer, reader)

    def _seal(self, body: Any) -> bytes:
        slot, request = SpanRequest.unpacked(body)
        _, context, sealer, reader = self._volumes[request.volume]
        place = self._arena[slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES]
        sealer.begin(place)
        try:
            span = seal_volume_span(
                context,
                reader,
                leaf_offset=request.leaf_offset,
                first_slot=request.first_slot,
                end_slot=request.end_slot,
                block_bytes=request.block_bytes,
                parent=unpack_entries(request.parent),
                base=unpack_entries(request.base),
                delta_every=request.delta_every,
            )
        except HoldfastError as error:
            return pack_error(error)
        return pack_span(span, place)

    def _forget(self, session: int) -> None:
        for number, (owner, _, _, reader) in list(self._volumes.items()):
            if owner == session:
                os.close(reader.descriptor)
                del self._volumes[number]
        for key in [key for key in self._caches if key[0] == session]:
            del self._caches[key]


def main() -> None:
    """Serve standard input until it ends."""
    # An interrupt of the terminal reaches every process of its group; what it means for a backup, the SDK decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What it makes holds no cycles and is freed at once; looking for some would pass over all that it remembers.
    gc.disable()
    channel = socket.socket(fileno=_STANDARD_INPUT)
    _, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
    if descriptors:
        arena = mmap.mmap(descriptors[0], SLOTS * SLOT_BYTES)
        os.close(descriptors[0])
        try:
            channel.send(READY)
            Worker(channel, memoryview(arena)).serve()
        except (BrokenPipeError, ConnectionResetError):
            # Whoever asked is gone: that is the end of the socket too, met while answering.
            os._exit(0)
    # There is nothing to put in order, and the interpreter's own tidying takes longer than a span.
    os._exit(0)


if __name__ == "__main__":
    main()
