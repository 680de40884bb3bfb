"""A host from start to drain: health, reflection, metrics page, addresses, signals."""

from __future__ import annotations

import asyncio
import os
import signal
import urllib.request
from pathlib import Path

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.channels import open_channel
from holdfast_core.runtime.server import ServiceHost, run_until_signalled
from holdfast_core.runtime.status import error_from_rpc
from holdfast_proto.v1 import blocks_pb2, blocks_pb2_grpc
from tests.runtime.services import SERVICE_NAME, EchoBlocks, running_host

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


async def test_reflection_lists_the_services() -> None:
    async with running_host() as host:
        channel = open_channel(host.address)
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        answers = [answer async for answer in stub.ServerReflectionInfo(iter([request]))]
        await channel.close()
    names = {service.name for service in answers[0].list_services_response.service}
    assert {SERVICE_NAME, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} <= names


async def test_health_of_the_process_and_of_each_service() -> None:
    async with running_host() as host:
        channel = open_channel(host.address)
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE_NAME):
            assert (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="nobody.Knows"))
        assert error_from_rpc(caught.value, peer="test").code is ErrorCode.NOT_FOUND
        unknown = stub.Watch(health_pb2.HealthCheckRequest(service="nobody.Knows"))
        assert (await unknown.read()).status == SERVICE_UNKNOWN
        unknown.cancel()
        await channel.close()


async def test_a_drain_tells_health_watchers_and_ends_watches() -> None:
    async with running_host() as host:
        channel = open_channel(host.address)
        health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await health.read()).status == SERVING
        stub: blocks_pb2_grpc.BlockServiceAsyncStub = blocks_pb2_grpc.BlockServiceStub(channel)
        watch = stub.ScanBlocks(blocks_pb2.ScanBlocksRequest())
        await watch.read()
        async with asyncio.timeout(5):
            await host.stop(60)
        assert (await health.read()).status == NOT_SERVING
        assert await health.read() is grpc.aio.EOF
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watch.read()
        ended = error_from_rpc(caught.value, peer="test")
        assert (ended.code, ended.retryable) == (ErrorCode.UNREACHABLE, True)
        await channel.close()


async def test_a_call_in_flight_finishes_during_the_drain_and_new_ones_are_refused() -> None:
    servicer = EchoBlocks()
    servicer.gate = asyncio.Event()
    async with running_host(servicer) as host:
        channel, other = open_channel(host.address), open_channel(host.address)
        stub: blocks_pb2_grpc.BlockServiceAsyncStub = blocks_pb2_grpc.BlockServiceStub(channel)
        health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        await health.read()
        call = stub.GetNodeStatus(blocks_pb2.GetNodeStatusRequest())
        await servicer.entered.wait()
        stopping = asyncio.ensure_future(host.stop(60))
        assert (await health.read()).status == NOT_SERVING
        late: blocks_pb2_grpc.BlockServiceAsyncStub = blocks_pb2_grpc.BlockServiceStub(other)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await late.GetNodeStatus(blocks_pb2.GetNodeStatusRequest())
        assert error_from_rpc(caught.value, peer="test").code is ErrorCode.UNREACHABLE
        assert not stopping.done()
        servicer.gate.set()
        assert (await call).status.node_id
        async with asyncio.timeout(5):
            await stopping
        await channel.close()
        await other.close()


async def test_what_outlives_the_grace_is_cancelled() -> None:
    servicer = EchoBlocks()
    servicer.gate = asyncio.Event()
    async with running_host(servicer) as host:
        channel = open_channel(host.address)
        stub: blocks_pb2_grpc.BlockServiceAsyncStub = blocks_pb2_grpc.BlockServiceStub(channel)
        call = stub.GetNodeStatus(blocks_pb2.GetNodeStatusRequest())
        await servicer.entered.wait()
        async with asyncio.timeout(5):
            await host.stop(0.1)
        with pytest.raises(grpc.aio.AioRpcError):
            await call
        await channel.close()


async def test_the_metrics_page() -> None:
    async with running_host(metrics_bind="127.0.0.1:0") as host:
        channel = open_channel(host.address)
        stub: blocks_pb2_grpc.BlockServiceAsyncStub = blocks_pb2_grpc.BlockServiceStub(channel)
        await stub.GetNodeStatus(blocks_pb2.GetNodeStatusRequest())
        await channel.close()
        page = await asyncio.to_thread(_read, f"http://127.0.0.1:{host.metrics_port}/metrics")
    assert f'holdfast_calls_total{{method="/{SERVICE_NAME}/GetNodeStatus",status="OK"}} 1.0' in page
    assert "process_resident_memory_bytes" in page
    assert host.metrics_port is not None


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        text: str = answer.read().decode()
        return text


async def test_plain_text_is_for_this_machine_only() -> None:
    for bind in ("0.0.0.0:0", "[::]:0", "192.0.2.1:7400", "storage-1:7400"):
        with pytest.raises(HoldfastError, match="can be reached from other machines") as caught:
            ServiceHost("test", bind=bind)
        assert caught.value.code is ErrorCode.INVALID_ARGUMENT


async def test_a_taken_address_is_a_conflict() -> None:
    async with running_host() as first:
        with pytest.raises(HoldfastError, match="cannot be listened on") as caught:
            async with running_host(bind=first.address):
                raise AssertionError("two servers on one port")
        assert caught.value.code is ErrorCode.CONFLICT
        with pytest.raises(HoldfastError, match="metrics cannot be served") as caught:
            async with running_host(metrics_bind=first.address):
                raise AssertionError("two servers on one port")
        assert caught.value.code is ErrorCode.CONFLICT


async def test_a_unix_socket(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/s"
    async with running_host(bind=address) as host:
        assert host.address == address
        channel = open_channel(address)
        stub: blocks_pb2_grpc.BlockServiceAsyncStub = blocks_pb2_grpc.BlockServiceStub(channel)
        assert (await stub.GetNodeStatus(blocks_pb2.GetNodeStatusRequest())).status.node_id
        await channel.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains(number: signal.Signals) -> None:
    host = ServiceHost("test", bind="127.0.0.1:0")
    host.add(blocks_pb2_grpc.add_BlockServiceServicer_to_server, EchoBlocks(), SERVICE_NAME)
    announced: list[str] = []

    def announce(address: str) -> None:
        announced.append(address)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    async with asyncio.timeout(10):
        await run_until_signalled(host, on_started=announce)
    assert announced == [host.address]
    assert not host.address.endswith(":0")
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("bind", "level"), [("127.0.0.1:0", "INFO"), ("0.0.0.0:0", "WARNING")])
async def test_a_service_says_that_it_speaks_plain_text(
    bind: str, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "holdfast")
    host = ServiceHost("test", bind=bind, plaintext_on_network=True)
    port = await host.start()
    channel = open_channel(f"127.0.0.1:{port}")
    health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert health.status == SERVING
    await channel.close()
    await host.stop(0)
    assert [record.levelname for record in caplog.records if "plain text" in str(record.msg)] == [level]
