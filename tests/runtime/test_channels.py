"""Who may talk to whom: plain text on this machine, mutual TLS across machines; and messages of full size."""

from __future__ import annotations

import itertools
from pathlib import Path

import grpc
import grpc.aio
import pytest
import trustme

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import BATCH_BYTES_MAX
from holdfast_core.runtime.channels import open_channel
from holdfast_core.runtime.options import TlsFiles
from holdfast_core.runtime.status import error_from_rpc
from holdfast_proto.v1 import blocks_pb2, blocks_pb2_grpc
from tests.runtime.services import running_host


def write_tls(folder: Path, authority: trustme.CA, *names: str) -> TlsFiles:
    folder.mkdir()
    files = TlsFiles(ca=folder / "ca.pem", cert=folder / "cert.pem", key=folder / "key.pem")
    certificate = authority.issue_cert(*names)
    authority.cert_pem.write_to_path(files.ca)
    certificate.private_key_pem.write_to_path(files.key)
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(files.cert, append=True)
    return files


async def status_through(channel: grpc.aio.Channel) -> str:
    stub: blocks_pb2_grpc.BlockServiceAsyncStub = blocks_pb2_grpc.BlockServiceStub(channel)
    try:
        answer = await stub.GetNodeStatus(blocks_pb2.GetNodeStatusRequest(), timeout=10)
        return answer.status.node_id
    except grpc.aio.AioRpcError as failure:
        raise error_from_rpc(failure, peer="test") from failure
    finally:
        await channel.close()


async def test_mutual_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    server = write_tls(tmp_path / "server", authority, "127.0.0.1", "localhost")
    client = write_tls(tmp_path / "client", authority, "client.holdfast.example")
    async with running_host(tls=server) as host:
        assert await status_through(open_channel(host.address, tls=client))


async def test_a_client_without_a_certificate_is_refused(tmp_path: Path) -> None:
    authority = trustme.CA()
    server = write_tls(tmp_path / "server", authority, "127.0.0.1", "localhost")
    async with running_host(tls=server) as host:
        bare = grpc.aio.secure_channel(host.address, grpc.ssl_channel_credentials(server.ca.read_bytes()))
        with pytest.raises(HoldfastError) as caught:
            await status_through(bare)
        assert caught.value.code is ErrorCode.UNREACHABLE
        with pytest.raises(HoldfastError) as caught:
            await status_through(open_channel(host.address))
        assert caught.value.code is ErrorCode.UNREACHABLE


async def test_certificates_of_a_foreign_authority_are_refused(tmp_path: Path) -> None:
    authority, foreign = trustme.CA(), trustme.CA()
    server = write_tls(tmp_path / "server", authority, "127.0.0.1")
    stranger = write_tls(tmp_path / "stranger", foreign, "client.holdfast.example")
    half = TlsFiles(ca=server.ca, cert=stranger.cert, key=stranger.key)
    async with running_host(tls=server) as host:
        for files in (stranger, half):
            with pytest.raises(HoldfastError) as caught:
                await status_through(open_channel(host.address, tls=files))
            assert caught.value.code is ErrorCode.UNREACHABLE


@pytest.mark.parametrize("address", ["192.0.2.7:7400", "coordinator-1:7400", "[2001:db8::1]:7400"])
def test_a_channel_to_another_machine_needs_tls(address: str) -> None:
    with pytest.raises(HoldfastError, match="give the TLS files") as caught:
        open_channel(address)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT


async def test_tls_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    files = TlsFiles(ca=tmp_path / "ca.pem", cert=tmp_path / "cert.pem", key=tmp_path / "key.pem")
    with pytest.raises(HoldfastError, match=r"ca\.pem cannot be read"):
        open_channel("192.0.2.7:7400", tls=files)
    with pytest.raises(HoldfastError, match=r"cannot be read"):
        async with running_host(tls=files):
            raise AssertionError("a server without its files")


async def test_the_largest_batch_passes_and_a_larger_message_is_refused() -> None:
    async with running_host() as host:
        channel = open_channel(host.address)
        stub: blocks_pb2_grpc.BlockServiceAsyncStub = blocks_pb2_grpc.BlockServiceStub(channel)
        batch = blocks_pb2.PutBlocksRequest(sequence=7, blocks=bytes(BATCH_BYTES_MAX))
        answers = [answer.sequence async for answer in stub.PutBlocks(itertools.repeat(batch, 3))]
        assert answers == [7, 7, 7]
        # One message and one answer: on a stream the refusal may overtake the write, which then fails by itself.
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.HasBlocks(blocks_pb2.HasBlocksRequest(block_ids=bytes(17 * 1024 * 1024)))
        assert error_from_rpc(caught.value, peer="test").code is ErrorCode.LIMIT_EXCEEDED
        await channel.close()
