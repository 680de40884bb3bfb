"""What clients of the NBD server get: exports, reads, writes over the point, block status, and refusals."""

from __future__ import annotations

import random
import socket as stdlib_socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast import ErrorCode, StateManager
from holdfast_core.model import nbd
from holdfast_core.model.nbd import Command, CommandFlag, Errno, Option, Reply, Transmission
from tests.client.rig import BLOCK, error_of
from tests.serving.conftest import DATA_BYTES, ROOT_BYTES, ServedVm
from tests.serving.rig import Client, Wire

HOLE = nbd.Status.HOLE | nbd.Status.ZERO


@pytest.fixture
def read_only(manager: StateManager, served: ServedVm, socket: Path) -> Iterator[Path]:
    """The socket of a server of the point without an overlay."""
    with manager.serve_point(served.point, socket=socket):
        yield socket


@pytest.fixture
def writable(manager: StateManager, served: ServedVm, socket: Path, tmp_path: Path) -> Iterator[Path]:
    """The socket of a server of the point with an overlay."""
    with manager.serve_point(served.point, socket=socket, overlay=tmp_path / "overlay"):
        yield socket


@pytest.mark.parametrize("structured", [True, False])
def test_every_volume_is_an_export(read_only: Path, served: ServedVm, structured: bool) -> None:
    for name, size in (("root", ROOT_BYTES), ("data", DATA_BYTES), ("", DATA_BYTES)):
        with Client(read_only, name, structured=structured) as client:
            assert client.info.size_bytes == size
            assert client.info.flags & Transmission.READ_ONLY
            assert client.read(0, size) == served.content(name or "data")


def test_exports_are_listed_and_described(read_only: Path, served: ServedVm) -> None:
    with Wire(read_only) as wire:
        wire.greet()
        replies = wire.option(Option.LIST)
        assert [nbd.unpack_server(data) for kind, data in replies if kind == Reply.SERVER] == ["data", "root"]
        infos = (nbd.Info.NAME, nbd.Info.DESCRIPTION, nbd.Info.BLOCK_SIZE)
        replies = wire.option(Option.INFO, nbd.pack_info_request("data", infos))
        told = [data for kind, data in replies if kind == Reply.INFO]
        assert nbd.pack_text_info(nbd.Info.NAME, "data") in told
        assert any(served.point.encode() in data for data in told)
        assert nbd.BlockSizes(1, 4096, nbd.REQUEST_BYTES_MAX) in [nbd.unpack_info(data) for data in told]


def test_old_clients_choose_by_name_alone(read_only: Path) -> None:
    for flags, padding in ((1, nbd.EXPORT_NAME_PADDING), (3, 0)):
        with Wire(read_only) as wire:
            wire.greet(flags)
            wire.send(nbd.pack_option(Option.EXPORT_NAME, b"data"))
            size, _ = nbd.EXPORT_NAME_REPLY.unpack(wire.take(nbd.EXPORT_NAME_REPLY.size))
            assert size == DATA_BYTES
            assert wire.take(padding) == bytes(padding)
            wire.send(nbd.pack_request(nbd.Request(0, Command.READ, 7, 4096, 4)))
            assert nbd.unpack_simple_reply(wire.take(nbd.SIMPLE_REPLY.size)) == (0, 7)
            assert wire.take(4) == b"data"


def test_many_requests_may_be_under_way(read_only: Path, served: ServedVm) -> None:
    content = served.content()
    rng = random.Random(3)
    places = [rng.randrange(ROOT_BYTES - 5000) for _ in range(300)]
    with Client(read_only) as client:
        for at in places:
            client.request(Command.READ, at, 5000)
        answers = {}
        for _ in places:
            head = nbd.unpack_chunk_header(client.take(nbd.CHUNK_HEADER.size))
            answers[head.cookie] = client.take(head.length)[nbd.OFFSET.size :]
        assert [answers[cookie + 1] for cookie in range(len(places))] == [content[at : at + 5000] for at in places]


def test_what_is_asked_out_of_bounds_is_refused(writable: Path) -> None:
    with Client(writable, "data") as client:
        whole = DATA_BYTES
        for offset, length in ((whole, 1), (0, whole + 1), (2**64 - 1, 2**32 - 1), (2**63, 1), (0, 0)):
            assert client.ask(Command.READ, offset, length) == Errno.INVAL
            assert client.ask(Command.BLOCK_STATUS, offset, length) == Errno.INVAL
            assert client.ask(Command.TRIM, offset, length) in (Errno.NOSPC, Errno.INVAL)
            assert client.ask(Command.WRITE_ZEROES, offset, length) in (Errno.NOSPC, Errno.INVAL)
        assert client.ask(Command.WRITE, whole - 1, 2, payload=b"xx") == Errno.NOSPC
        assert client.ask(Command.READ, 0, 1, flags=CommandFlag.REQ_ONE) == Errno.INVAL
        assert client.ask(99, 0, 1) == Errno.INVAL
        assert client.read(4096, 4) == b"data"


@pytest.mark.slow
def test_too_much_at_once_is_refused(manager: StateManager, served: ServedVm, socket: Path, tmp_path: Path) -> None:
    served.vm.volume(2 * nbd.REQUEST_BYTES_MAX, name="root")
    served.vm.register("root", "data")
    with (
        manager.serve_point(served.vm.snapshot(), socket=socket, overlay=tmp_path / "overlay"),
        Client(socket) as client,
    ):
        assert client.ask(Command.READ, 0, nbd.REQUEST_BYTES_MAX + 1) == Errno.OVERFLOW
        assert client.read(0, nbd.REQUEST_BYTES_MAX) == bytes(nbd.REQUEST_BYTES_MAX)
        client.request(Command.WRITE, 0, nbd.REQUEST_BYTES_MAX + 1)
        assert client.ended()


def test_a_read_only_export_refuses_writes(read_only: Path) -> None:
    with Client(read_only) as client:
        assert client.ask(Command.WRITE, 0, 3, payload=b"abc") == Errno.PERM
        assert client.ask(Command.TRIM, 0, 4096) == Errno.PERM
        assert client.ask(Command.WRITE_ZEROES, 0, 4096) == Errno.PERM
        client.flush()
        assert client.ask(Command.CACHE, 0, ROOT_BYTES) == 0


def test_what_is_written_is_read_back_and_the_point_stays(writable: Path, served: ServedVm) -> None:
    model = bytearray(served.content())
    rng = random.Random(11)
    with Client(writable) as one, Client(writable) as other:
        for step in range(250):
            at = rng.randrange(ROOT_BYTES)
            length = min(rng.choice([1, 100, 512, 4096, 4097, 3 * BLOCK]), ROOT_BYTES - at)
            client = (one, other)[step % 2]
            kind = rng.choice(["write", "write", "fua", "zero", "full zero"])
            if kind in ("write", "fua"):
                data = rng.randbytes(length)
                client.write(at, data, flags=CommandFlag.FUA if kind == "fua" else 0)
                model[at : at + length] = data
            else:
                flags = CommandFlag.NO_HOLE if kind == "full zero" else 0
                assert client.ask(Command.WRITE_ZEROES, at, length, flags=flags) == 0
                model[at : at + length] = bytes(length)
            at = rng.randrange(ROOT_BYTES)
            length = min(rng.choice([1, 4096, 2 * BLOCK]), ROOT_BYTES - at)
            assert client.read(at, length) == model[at : at + length]
        assert one.read(0, ROOT_BYTES) == other.read(0, ROOT_BYTES) == model
    with served.vm.manager.open_volume(served.point, "root") as file:
        assert file.readall() == served.content()


def test_a_trim_gives_zeros_for_whole_grains_alone(writable: Path, served: ServedVm) -> None:
    content = served.content()
    with Client(writable) as client:
        assert client.ask(Command.TRIM, 100, 3 * 4096) == 0
        assert client.read(0, 5 * 4096) == content[:4096] + bytes(2 * 4096) + content[3 * 4096 : 5 * 4096]
        assert client.ask(Command.TRIM, ROOT_BYTES - 10, 10) == 0
        assert client.read(ROOT_BYTES - 20, 20) == content[-20:]
        assert client.ask(Command.TRIM, 16 * BLOCK, ROOT_BYTES - 16 * BLOCK) == 0
        assert client.read(16 * BLOCK, ROOT_BYTES - 16 * BLOCK) == bytes(ROOT_BYTES - 16 * BLOCK)


def test_writers_of_one_grain_lose_nothing(writable: Path) -> None:
    with Client(writable) as client:
        pieces = [(at, bytes([1 + at % 250]) * 100) for at in range(0, 20_000, 100)]
        random.Random(2).shuffle(pieces)
        for at, data in pieces:
            client.request(Command.WRITE, at, len(data), payload=data)
        assert [client.answer()[0] for _ in pieces] == [0] * len(pieces)
        expected = b"".join(data for _, data in sorted(pieces))
        assert client.read(0, 20_000) == expected


def test_block_status_shows_holes_and_what_was_written(writable: Path) -> None:
    with Client(writable) as client:
        base = [(5 * BLOCK, 0), (4 * BLOCK, HOLE), (BLOCK, 0), (6 * BLOCK, HOLE), (ROOT_BYTES - 16 * BLOCK, 0)]
        assert client.status(0, ROOT_BYTES) == base
        assert client.status(0, ROOT_BYTES, flags=CommandFlag.REQ_ONE) == base[:1]
        assert client.status(BLOCK, 10, flags=CommandFlag.REQ_ONE) == [(10, 0)]
        client.write(12 * BLOCK, b"x" * 8192)
        assert client.ask(Command.WRITE_ZEROES, 0, 2 * BLOCK) == 0
        assert client.status(0, ROOT_BYTES) == [
            (2 * BLOCK, HOLE),
            (3 * BLOCK, 0),
            (4 * BLOCK, HOLE),
            (BLOCK, 0),
            (2 * BLOCK, HOLE),
            (8192, 0),
            (4 * BLOCK - 8192, HOLE),
            (ROOT_BYTES - 16 * BLOCK, 0),
        ]


def test_status_needs_a_context_that_was_agreed_on(read_only: Path) -> None:
    with Client(read_only, structured=False) as client:
        assert client.ask(Command.BLOCK_STATUS, 0, 4096) == Errno.INVAL
    with Wire(read_only) as wire:
        wire.greet()
        query = nbd.pack_meta_query(nbd.MetaQuery("root", (nbd.CONTEXT_ALLOCATION,)))
        assert wire.option(Option.SET_META_CONTEXT, query)[-1][0] == Reply.ERR_INVALID
        assert wire.option(Option.STRUCTURED_REPLY)[-1][0] == Reply.ACK
        for text, count in (("base:", 1), ("", 0), (nbd.CONTEXT_ALLOCATION, 1), ("qemu:", 0)):
            query = nbd.pack_meta_query(nbd.MetaQuery("root", (text,)))
            assert len(wire.option(Option.LIST_META_CONTEXT, query)) == 1 + count, text
        assert len(wire.option(Option.LIST_META_CONTEXT, nbd.pack_meta_query(nbd.MetaQuery("root", ())))) == 2
        unknown = nbd.pack_meta_query(nbd.MetaQuery("nothing", ()))
        assert wire.option(Option.SET_META_CONTEXT, unknown)[-1][0] == Reply.ERR_UNKNOWN


def test_an_address_is_one_place(manager: StateManager, served: ServedVm, socket: Path) -> None:
    with manager.serve_point(served.point, listen="127.0.0.1:0") as first:
        assert first.uris["data"].startswith("nbd://127.0.0.1:")
        address = first.uris["data"].removeprefix("nbd://").removesuffix("/data")
        error = error_of(lambda: manager.serve_point(served.point, listen=address))
        assert error.code is ErrorCode.INVALID_ARGUMENT
    nowhere = error_of(lambda: manager.serve_point(served.point))
    twice = error_of(lambda: manager.serve_point(served.point, listen="127.0.0.1:0", socket=socket))
    assert nowhere.code is twice.code is ErrorCode.INVALID_ARGUMENT


def test_a_dead_socket_is_taken_over_and_a_living_one_is_not(
    manager: StateManager, served: ServedVm, socket: Path
) -> None:
    with stdlib_socket.socket(stdlib_socket.AF_UNIX) as killed:
        killed.bind(str(socket))
        killed.listen()
    assert socket.exists()
    with manager.serve_point(served.point, socket=socket):
        error = error_of(lambda: manager.serve_point(served.point, socket=socket))
        assert error.code is ErrorCode.CONFLICT
        assert socket.stat().st_mode & 0o777 == 0o600
    assert not socket.exists()
    socket.write_text("mine")
    assert error_of(lambda: manager.serve_point(served.point, socket=socket)).code is ErrorCode.INVALID_ARGUMENT
    assert socket.read_text() == "mine"
