"""Clients that do not keep to the protocol, or vanish: they lose their own connection, and nobody else anything."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast import StateManager
from holdfast.serving.server import CONNECTIONS_MAX
from holdfast_core.model import nbd
from holdfast_core.model.nbd import Command, Option
from tests.fuzz.mutations import mutated
from tests.serving.conftest import ROOT_BYTES, ServedVm
from tests.serving.rig import Client, Wire

GRAIN = bytes(range(256)) * 16


@pytest.fixture
def served_socket(
    manager: StateManager, served: ServedVm, socket: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> Iterator[Path]:
    """A server of the point with an overlay, in which the first grain of `data` is known; it must meet no fault."""
    with manager.serve_point(served.point, socket=socket, overlay=tmp_path / "overlay"):
        with Client(socket, "data") as client:
            client.write(0, GRAIN)
        yield socket
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def still_serves(socket: Path) -> None:
    """Somebody else is served as ever."""
    with Client(socket, "data") as client:
        assert client.read(0, 4096) == GRAIN


@pytest.mark.parametrize(
    "words",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        nbd.CLIENT_FLAGS.pack(0xFFFF),
        nbd.CLIENT_FLAGS.pack(3) + b"\0" * 16,
        nbd.CLIENT_FLAGS.pack(3) + nbd.OPTION_HEADER.pack(nbd.OPTION_MAGIC, Option.GO, 0xFFFFFFFF),
        nbd.CLIENT_FLAGS.pack(3) + nbd.pack_option(Option.EXPORT_NAME, b"nothing"),
        nbd.CLIENT_FLAGS.pack(3) + nbd.pack_option(Option.EXPORT_NAME, b"\xff\xfe"),
        nbd.CLIENT_FLAGS.pack(3) + nbd.pack_option(Option.GO, nbd.pack_info_request("root"))[:-1],
        nbd.CLIENT_FLAGS.pack(3) + nbd.pack_option(Option.STRUCTURED_REPLY) * 1500,
    ],
)
def test_a_negotiation_that_is_none_ends(served_socket: Path, words: bytes) -> None:
    with Wire(served_socket) as wire:
        with contextlib.suppress(ConnectionError):
            wire.send(words)
        wire.finish()
        assert wire.ended()
    still_serves(served_socket)


def test_options_that_make_no_sense_are_refused_and_the_client_may_go_on(served_socket: Path) -> None:
    with Wire(served_socket) as wire:
        wire.greet()
        for option, data in (
            (Option.LIST, b"data"),
            (Option.STARTTLS, b""),
            (Option.EXTENDED_HEADERS, b""),
            (Option.GO, b"\xff\xff\xff\xff"),
            (Option.GO, nbd.pack_info_request("../../etc")),
            (Option.INFO, nbd.pack_info_request("root") + b"\0"),
            (Option.SET_META_CONTEXT, b"\0"),
            (4711, b"x" * 1000),
        ):
            kind, _ = wire.option(option, data)[-1]
            assert kind & nbd.REPLY_ERROR_BIT, option
        assert wire.option(Option.GO, nbd.pack_info_request("root"))[-1][0] == nbd.Reply.ACK


def test_a_client_that_sends_half_a_write_changes_nothing(served_socket: Path) -> None:
    with Client(served_socket, "data") as client:
        client.request(Command.WRITE, 0, 4096, payload=b"x" * 4095)
    still_serves(served_socket)


def test_a_client_that_asks_for_much_and_reads_nothing_holds_up_nobody(served_socket: Path) -> None:
    with Client(served_socket) as greedy:
        greedy.socket.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            for _ in range(3000):
                greedy.request(Command.READ, 0, ROOT_BYTES)
        still_serves(served_socket)


def test_there_is_room_for_so_many_clients_and_no_more(served_socket: Path) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(CONNECTIONS_MAX):
            wire = stack.enter_context(Wire(served_socket))
            wire.greet()
        assert stack.enter_context(Wire(served_socket)).ended()
    still_serves_soon(served_socket)


def still_serves_soon(socket: Path) -> None:
    """As `still_serves`, once the server has seen that others are gone."""
    for _ in range(1000):
        with contextlib.suppress(ConnectionError):
            return still_serves(socket)
    raise AssertionError("nobody is served any more")


GOOD_REQUESTS = b"".join(
    nbd.pack_request(nbd.Request(0, command, 1, 8192, 512)) + (b"w" * 512 if command == Command.WRITE else b"")
    for command in (Command.READ, Command.WRITE, Command.FLUSH, Command.TRIM, Command.CACHE, Command.BLOCK_STATUS)
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_requests_gone_wrong_harm_nobody(served_socket: Path, data: st.DataObject) -> None:
    words = data.draw(st.one_of(mutated(GOOD_REQUESTS), st.binary(max_size=200)))
    with Client(served_socket) as client:
        with contextlib.suppress(ConnectionError):
            client.send(words)
        client.finish()
        assert client.ended()
    still_serves(served_socket)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_negotiations_gone_wrong_harm_nobody(served_socket: Path, data: st.DataObject) -> None:
    good = (
        nbd.CLIENT_FLAGS.pack(3)
        + nbd.pack_option(Option.STRUCTURED_REPLY)
        + nbd.pack_option(Option.LIST)
        + nbd.pack_option(Option.SET_META_CONTEXT, nbd.pack_meta_query(nbd.MetaQuery("root", ("base:allocation",))))
        + nbd.pack_option(Option.GO, nbd.pack_info_request("root", [0, 3]))
        + GOOD_REQUESTS
    )
    with Wire(served_socket) as wire:
        with contextlib.suppress(ConnectionError):
            wire.send(data.draw(mutated(good)))
        wire.finish()
        assert wire.ended()
    still_serves(served_socket)


def test_clients_that_vanish_at_any_moment_harm_nobody(served_socket: Path) -> None:
    rng = random.Random(9)
    for _ in range(40):
        with Client(served_socket) as client:
            for _ in range(rng.randrange(30)):
                command = rng.choice([Command.READ, Command.WRITE, Command.TRIM, Command.BLOCK_STATUS])
                length = rng.choice([512, 4096, 100_000])
                payload = b"v" * length if command == Command.WRITE else b""
                client.request(command, rng.randrange(ROOT_BYTES - length), length, payload=payload)
    still_serves(served_socket)
