"""The NBD client against servers that others wrote: QEMU's, its storage daemon's and nbdkit."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from holdfast import ErrorCode
from holdfast.sources.nbd_client import NbdAsked, NbdClient, NbdEndpoint, NbdExtent
from holdfast_core.model import nbd
from tests.client.rig import error_of, make_sparse, noise
from tests.support.nbd import make_qcow2, nbd_server, qemu_io, qemu_nbd, scripted_server
from tests.support.qemu import tool

KIB = 1 << 10
MIB = 1 << 20
ALLOCATION = NbdAsked("", (nbd.CONTEXT_ALLOCATION,))
DATA = [(0, noise(MIB, 1)), (3 * MIB + 4096, noise(100_000, 2))]
SIZE = 8 * MIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A sparse raw image."""
    return make_sparse(tmp_path / "disk.raw", SIZE, DATA)


def read(client: NbdClient, offset: int, length: int) -> bytes:
    """Bytes of an export."""
    buffer = bytearray(length)
    client.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def data_of(client: NbdClient) -> list[tuple[int, int]]:
    """What does not read as zero, neighbours joined."""
    found: list[tuple[int, int]] = []
    for extent in client.extents(nbd.CONTEXT_ALLOCATION, 0, client.size_bytes):
        if not extent.flags & nbd.Status.ZERO:
            begin = found.pop()[0] if found and found[-1][1] == extent.start else extent.start
            found.append((begin, extent.end))
    return found


QEMU_NBD = ("qemu-nbd", "--read-only", "--persistent", "--shared=16", "--format=raw")
STORAGE_DAEMON = (
    *("qemu-storage-daemon", "--nbd-server", "addr.type=fd,addr.str=3,max-connections=0"),
    *("--export", "type=nbd,id=e,node-name=disk,name="),
)
NBDKIT = ("nbdkit", "--foreground", "--readonly", "file")


@pytest.fixture(params=["qemu-nbd", "qemu-nbd-tcp", "qemu-storage-daemon", "nbdkit", "nbdkit-tcp"])
def served(request: pytest.FixtureRequest, tmp_path: Path, image: Path) -> Iterator[NbdEndpoint]:
    """The image behind one of the servers."""
    node = f"driver=raw,node-name=disk,read-only=on,file.driver=file,file.filename={image},file.read-only=on"
    command: dict[str, tuple[str | Path, ...]] = {
        "qemu-nbd": (*QEMU_NBD, image),
        "qemu-storage-daemon": (*STORAGE_DAEMON[:1], "--blockdev", node, *STORAGE_DAEMON[1:]),
        "nbdkit": (*NBDKIT, image),
    }
    name = request.param.removesuffix("-tcp")
    with nbd_server(tmp_path, *command[name], tcp=request.param.endswith("-tcp")) as endpoint:
        yield endpoint


def test_what_is_served_is_read(served: NbdEndpoint, image: Path) -> None:
    client = NbdClient(served, ALLOCATION)
    assert (client.size_bytes, client.export.read_only, client.export.structured) == (SIZE, True, True)
    assert read(client, 0, SIZE) == image.read_bytes()
    assert read(client, SIZE - 1, 1) == b"\0"
    assert read(client, 3 * MIB, 8 * KIB) == bytes(4096) + DATA[1][1][:4096]
    end = -(-(DATA[1][0] + len(DATA[1][1])) // 4096) * 4096
    assert data_of(client) == [(0, MIB), (DATA[1][0], end)]
    inside = list(client.extents(nbd.CONTEXT_ALLOCATION, MIB // 2 + 1, 2 * MIB - 1))
    assert (inside[0].start, inside[-1].end) == (MIB // 2 + 1, 2 * MIB - 1)
    assert all(one.end == other.start for one, other in itertools.pairwise(inside))
    client.close()
    client.close()


def test_threads_share_a_client(served: NbdEndpoint, image: Path) -> None:
    client = NbdClient(served, ALLOCATION, connections_max=3)
    expected = image.read_bytes()
    with ThreadPoolExecutor(8) as threads:
        pieces = list(threads.map(lambda at: read(client, at, 64 * KIB), range(0, SIZE, 64 * KIB)))
    assert b"".join(pieces) == expected
    client.close()


def test_a_server_for_one_client_at_a_time_is_asked_by_one(tmp_path: Path, image: Path) -> None:
    with nbd_server(tmp_path, "qemu-nbd", "--persistent", "--shared=1", "--format=raw", image) as endpoint:
        client = NbdClient(endpoint, ALLOCATION, connections_max=4)
        assert not client.export.shareable
        assert not client.export.read_only
        with ThreadPoolExecutor(4) as threads:
            pieces = list(threads.map(lambda at: read(client, at, 64 * KIB), range(0, SIZE, 64 * KIB)))
        assert b"".join(pieces) == image.read_bytes()
        client.close()


def test_a_server_without_structured_replies(tmp_path: Path, image: Path) -> None:
    with nbd_server(tmp_path, "nbdkit", "--foreground", "--no-sr", "file", image) as endpoint:
        client = NbdClient(endpoint, ALLOCATION)
        assert not client.export.structured
        assert not client.export.contexts
        assert read(client, 0, SIZE) == image.read_bytes()
        client.close()


def test_requests_keep_to_the_servers_sizes(tmp_path: Path, image: Path) -> None:
    policy = (
        "blocksize-minimum=4096",
        "blocksize-preferred=4096",
        "blocksize-maximum=64k",
        "blocksize-error-policy=error",
    )
    command = ("nbdkit", "--foreground", "--filter=blocksize-policy", "file", image, *policy)
    with nbd_server(tmp_path, *command) as endpoint:
        client = NbdClient(endpoint, ALLOCATION)
        assert (client.export.request_bytes_min, client.export.request_bytes_max) == (4096, 64 * KIB)
        assert read(client, 0, SIZE) == image.read_bytes()
        assert read(client, 4095, 70_002) == image.read_bytes()[4095 : 4095 + 70_002]
        assert data_of(client)[0] == (0, MIB)
        first = next(client.extents(nbd.CONTEXT_ALLOCATION, 100, 200))
        assert (first.start, first.end) == (100, 200)
        client.close()


def test_dirty_bitmaps_and_their_listing(tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "disk.qcow2", 4 << 30, "write -P 1 0 1M")
    tool("qemu-img", "bitmap", "--add", image, "one")
    qemu_io(image, "write -P 2 64k 64k", "write -P 3 3G 128k")
    command = qemu_nbd(image, "--read-only", "--bitmap=one", format="qcow2")
    context = nbd.CONTEXT_BITMAP_PREFIX + "one"
    with nbd_server(tmp_path, *command) as endpoint:
        asked = NbdAsked("", (nbd.CONTEXT_ALLOCATION, context, "qemu:dirty-bitmap:other"), ("qemu:dirty-bitmap:",))
        client = NbdClient(endpoint, asked)
        assert set(client.export.contexts) == {nbd.CONTEXT_ALLOCATION, context}
        assert client.export.listed == (context,)
        dirty = [extent for extent in client.extents(context, 0, client.size_bytes) if extent.flags]
        gib3 = 3 << 30
        assert dirty == [NbdExtent(64 * KIB, 128 * KIB, 1), NbdExtent(gib3, gib3 + 128 * KIB, 1)]
        client.close()


def test_exports_have_names(tmp_path: Path, image: Path) -> None:
    with nbd_server(tmp_path, *qemu_nbd(image, "--read-only", "--export-name=disks/röt")) as endpoint:
        client = NbdClient(endpoint, NbdAsked("disks/röt"))
        assert client.size_bytes == SIZE
        client.close()
        error = error_of(lambda: NbdClient(endpoint, NbdAsked("another")))
    assert error.code is ErrorCode.SOURCE_UNREADABLE
    assert "no export of that name" in error.message
    assert "another" in error.message


def test_a_disk_that_fails_says_so_and_the_rest_is_read(tmp_path: Path, image: Path) -> None:
    command = ("nbdkit", "--foreground", "--filter=error", "file", image, "error-pread=EIO", "error-pread-rate=100%")
    with nbd_server(tmp_path, *command) as endpoint:
        client = NbdClient(endpoint, ALLOCATION)
        for _ in range(2):
            error = error_of(lambda: read(client, 0, 4096))
            assert error.code is ErrorCode.SOURCE_UNREADABLE
            assert "Input/output error" in error.message
        assert data_of(client)[0] == (0, MIB)
        client.close()


def test_nobody_there(tmp_path: Path) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        endpoints = [
            NbdEndpoint(socket_path=str(tmp_path / "none")),
            NbdEndpoint("127.0.0.1", unheard.getsockname()[1]),
        ]
        for endpoint in endpoints:
            error = error_of(lambda endpoint=endpoint: NbdClient(endpoint))  # type: ignore[misc]
            assert error.code is ErrorCode.SOURCE_UNREADABLE
            assert str(endpoint) in error.message


def test_a_server_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    def talk(connection: socket.socket) -> None:
        connection.recv(1)

    with scripted_server(tmp_path, talk) as endpoint:
        error = error_of(lambda: NbdClient(endpoint, timeout_s=0.05))
    assert error.code is ErrorCode.SOURCE_UNREADABLE
    assert "in time" in error.message


def greet(connection: socket.socket, size: int = MIB) -> None:
    """Negotiate an export that can be read over several connections."""
    connection.sendall(nbd.pack_greeting(nbd.Handshake.FIXED_NEWSTYLE | nbd.Handshake.NO_ZEROES))
    connection.recv(nbd.CLIENT_FLAGS.size, socket.MSG_WAITALL)
    while True:
        option, length = nbd.unpack_option_header(connection.recv(nbd.OPTION_HEADER.size, socket.MSG_WAITALL))
        data = connection.recv(length, socket.MSG_WAITALL) if length else b""
        if option == nbd.Option.SET_META_CONTEXT:
            for number, name in enumerate(nbd.unpack_meta_query(data).queries):
                answer = nbd.pack_meta_context(number, name)
                connection.sendall(nbd.pack_option_reply(option, nbd.Reply.META_CONTEXT, answer))
        elif option == nbd.Option.GO:
            flags = nbd.Transmission.HAS_FLAGS | nbd.Transmission.CAN_MULTI_CONN | nbd.Transmission.READ_ONLY
            answer = nbd.pack_export_info(nbd.ExportInfo(size, flags))
            connection.sendall(nbd.pack_option_reply(option, nbd.Reply.INFO, answer))
        connection.sendall(nbd.pack_option_reply(option, nbd.Reply.ACK))
        if option == nbd.Option.GO:
            return


def request_of(connection: socket.socket) -> nbd.Request:
    """The next request."""
    data = connection.recv(nbd.REQUEST.size, socket.MSG_WAITALL)
    if len(data) < nbd.REQUEST.size:
        raise ConnectionResetError
    return nbd.unpack_request(data)


def test_closing_wakes_who_waits(tmp_path: Path) -> None:
    asked = threading.Event()

    def talk(connection: socket.socket) -> None:
        greet(connection)
        request_of(connection)
        asked.set()
        connection.recv(1)

    with scripted_server(tmp_path, talk) as endpoint:
        client = NbdClient(endpoint, connections_max=1)
        with ThreadPoolExecutor(2) as threads:
            reading = threads.submit(error_of, lambda: read(client, 0, 4096))
            assert asked.wait(30)
            behind = threads.submit(error_of, lambda: read(client, 4096, 4096))
            client.close()
            assert {reading.result(30).code, behind.result(30).code} == {ErrorCode.SOURCE_UNREADABLE}


def test_an_export_that_becomes_another_is_refused(tmp_path: Path) -> None:
    sizes = iter([MIB, 2 * MIB])
    asked, answered = threading.Event(), threading.Event()

    def talk(connection: socket.socket) -> None:
        greet(connection, next(sizes))
        request_of(connection)
        asked.set()
        answered.wait(30)

    with scripted_server(tmp_path, talk) as endpoint:
        client = NbdClient(endpoint, connections_max=2)
        with ThreadPoolExecutor(1) as threads:
            reading = threads.submit(error_of, lambda: read(client, 0, 4096))
            assert asked.wait(30)
            error = error_of(lambda: read(client, 4096, 4096))
            answered.set()
            assert reading.result(30).code is ErrorCode.SOURCE_UNREADABLE
        client.close()
    assert error.code is ErrorCode.SOURCE_UNREADABLE
    assert "became another one" in error.message
