"""Certificates that are replaced under running servers and clients are used from the next connection on."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import pytest
import trustme
from cryptography import x509

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.channels import open_channel
from holdfast_core.runtime.endpoints import Endpoints
from holdfast_core.runtime.options import TlsFiles, parse_address
from holdfast_core.runtime.tls import TlsReader
from holdfast_proto.v1 import blocks_pb2, blocks_pb2_grpc
from tests.runtime.services import EchoBlocks, running_host
from tests.runtime.test_channels import status_through, write_tls

HOST = "127.0.0.1"


def replace(files: TlsFiles, by: TlsFiles) -> None:
    """Put other files at the places of these, one after the other, as a renewal does."""
    for old, new in ((files.ca, by.ca), (files.cert, by.cert), (files.key, by.key)):
        aside = old.with_suffix(".new")
        aside.write_bytes(new.read_bytes())
        aside.replace(old)


def serial(files: TlsFiles) -> int:
    return x509.load_pem_x509_certificates(files.cert.read_bytes())[0].serial_number


async def serial_shown(address: str, client: TlsFiles) -> int:
    """Serial number of the certificate that a server shows to a new connection."""
    context = ssl.create_default_context(cafile=str(client.ca))
    context.load_cert_chain(client.cert, client.key)
    context.set_alpn_protocols(["h2"])
    host, port = parse_address(address)
    _, writer = await asyncio.open_connection(host, port, ssl=context)
    try:
        shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return x509.load_der_x509_certificate(shown).serial_number
    finally:
        writer.close()


async def test_a_server_shows_its_new_certificate_and_open_connections_go_on(tmp_path: Path) -> None:
    authority = trustme.CA()
    server = write_tls(tmp_path / "server", authority, HOST)
    renewed = write_tls(tmp_path / "renewed", authority, HOST)
    client = write_tls(tmp_path / "client", authority, "client.holdfast.example")
    servicer = EchoBlocks()
    async with running_host(servicer, tls=server) as host:
        assert await serial_shown(host.address, client) == serial(server)
        servicer.gate = asyncio.Event()
        under_way = asyncio.ensure_future(status_through(open_channel(host.address, tls=client)))
        await servicer.entered.wait()
        replace(server, renewed)
        assert await serial_shown(host.address, client) == serial(renewed)
        servicer.gate.set()
        assert await under_way


async def test_files_that_do_not_fit_together_are_not_used(tmp_path: Path) -> None:
    authority = trustme.CA()
    files = write_tls(tmp_path / "server", authority, HOST)
    renewed = write_tls(tmp_path / "renewed", authority, HOST)
    client = write_tls(tmp_path / "client", authority, "client.holdfast.example")
    first = serial(files)
    async with running_host(tls=files) as host:
        whole = renewed.cert.read_bytes()
        for half in (whole, whole[: len(whole) // 2], b"", b"no PEM"):
            files.cert.write_bytes(half)
            assert await serial_shown(host.address, client) == first
        files.cert.unlink()
        assert await serial_shown(host.address, client) == first
        replace(files, renewed)
        assert await serial_shown(host.address, client) == serial(renewed)


def test_the_reader_tells_of_changes_once(tmp_path: Path) -> None:
    authority = trustme.CA()
    files = write_tls(tmp_path / "one", authority, HOST)
    other = write_tls(tmp_path / "other", authority, HOST)
    told: list[str] = []
    reader = TlsReader(files, notice=told.append)
    old = reader.current()
    assert reader.changed() is None

    files.key.write_bytes(other.key.read_bytes())
    assert reader.changed() is None
    assert reader.changed() is None
    assert reader.current() is old
    assert [text for text in told if "does not belong to the certificate" in text] == told
    assert len(told) == 1

    files.cert.write_bytes(other.cert.read_bytes())
    new = reader.changed()
    assert new is not None
    assert (new.serial, reader.current()) == (serial(other), new)
    assert f"{new.serial:x}" in told[1]
    assert reader.changed() is None
    # Touched, and the same all the same.
    files.ca.write_bytes(files.ca.read_bytes())
    assert reader.changed() is None
    assert len(told) == 2
    assert other.key.read_text() not in repr(new)


@pytest.mark.parametrize("broken", ["ca", "cert", "key", "pair"])
def test_files_that_cannot_be_used_are_named_at_the_start(tmp_path: Path, broken: str) -> None:
    authority = trustme.CA()
    files = write_tls(tmp_path / "server", authority, HOST)
    named = files.key if broken == "pair" else getattr(files, broken)
    named.write_bytes(authority.issue_cert(HOST).private_key_pem.bytes() if broken == "pair" else b"no PEM")
    with pytest.raises(HoldfastError) as caught:
        TlsReader(files)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert str(named) in caught.value.message


async def test_a_client_goes_over_to_its_new_certificate_and_old_calls_finish(tmp_path: Path) -> None:
    """The server's side changes its authority too: only a client that read its files again gets in."""
    old, new = trustme.CA(), trustme.CA()
    client = write_tls(tmp_path / "client", old, "client.holdfast.example")
    server = write_tls(tmp_path / "server", old, HOST)
    servicer = EchoBlocks()
    async with running_host(servicer, tls=server) as host:
        endpoints = Endpoints([host.address], tls=client)
        request = blocks_pb2.GetNodeStatusRequest()

        async def ask() -> None:
            await endpoints.call(lambda channel: blocks_pb2_grpc.BlockServiceStub(channel).GetNodeStatus, request)

        await ask()
        for turn, authority in enumerate((new, old, new)):
            gate, servicer.entered = asyncio.Event(), asyncio.Event()
            servicer.gate = gate
            under_way = asyncio.ensure_future(ask())
            await servicer.entered.wait()
            servicer.gate = None
            replace(server, write_tls(tmp_path / f"server-{turn}", authority, HOST))
            replace(client, write_tls(tmp_path / f"client-{turn}", authority, "client.holdfast.example"))
            await ask()
            gate.set()
            await under_way
        await endpoints.close()
