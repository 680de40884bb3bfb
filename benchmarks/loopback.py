"""What plain gRPC costs between two Python processes on this machine: batches out, an acknowledgement a batch back.

No protobuf, no hashing, no disk: the floor under sending a copy.
"""

from __future__ import annotations

import asyncio
import resource
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import grpc
import grpc.aio

from holdfast_core.model.limits import MESSAGE_BYTES_MAX

_METHOD = "/holdfast.bench.Loopback/Send"
_OPTIONS = [("grpc.max_receive_message_length", MESSAGE_BYTES_MAX), ("grpc.max_send_message_length", MESSAGE_BYTES_MAX)]


@dataclass(frozen=True, slots=True)
class Sent:
    """CPU seconds of both ends and wall seconds."""

    cpu_s: float
    wall_s: float


def send_over_loopback(batches: Sequence[bytes]) -> Sent:
    """Send `batches` once over one stream to a server in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.loopback"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        if server.stdin is None or server.stdout is None:
            raise RuntimeError("the loopback server has no pipes")
        port = int(server.stdout.readline())
        before, start = _cpu_s(), time.monotonic()
        asyncio.run(_send(port, batches))
        wall_s, own_s = time.monotonic() - start, _cpu_s() - before
        server.stdin.close()
        return Sent(cpu_s=own_s + float(server.stdout.readline()), wall_s=wall_s)


async def _send(port: int, batches: Sequence[bytes]) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=_OPTIONS) as channel:

        async def requests() -> AsyncIterator[bytes]:
            for batch in batches:
                yield batch

        acknowledged = 0
        send: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(_METHOD)
        async for _ in send(requests()):
            acknowledged += 1
    if acknowledged != len(batches):
        raise RuntimeError(f"{acknowledged} of {len(batches)} batches were acknowledged")


async def _serve() -> None:
    async def take(requests: AsyncIterator[bytes], _: object) -> AsyncIterator[bytes]:
        async for _batch in requests:
            yield b"\1"

    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(take)
    service, method = _METHOD.strip("/").split("/")
    server = grpc.aio.server(options=_OPTIONS)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {method: handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    before = _cpu_s()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    print(_cpu_s() - before, flush=True)
    await server.stop(None)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    asyncio.run(_serve())
