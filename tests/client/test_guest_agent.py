"""Freezing by agents of all kinds: well, absent, refusing, slow, talking nonsense. No guest is left frozen."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from holdfast import ErrorCode
from holdfast.sources.qmp import agent
from holdfast.sources.qmp.agent import frozen
from tests.client.rig import error_of

Answer = Callable[[dict[str, Any]], bytes]


def well(message: dict[str, Any]) -> bytes:
    """Answer as an agent does that is well."""
    given: object = {"guest-sync": message.get("arguments", {}).get("id"), "guest-fsfreeze-freeze": 2}.get(
        message["execute"], 1
    )
    return json.dumps({"return": given}).encode() + b"\n"


def refusal() -> bytes:
    """What an agent says that does not want to."""
    return b'{"error": {"class": "GenericError", "desc": "not now"}}\n'


@contextmanager
def serving(folder: Path, answer: Answer, *, greeting: bytes = b"") -> Iterator[tuple[Path, list[str]]]:
    """Serve one client as a guest agent; gives the socket and the commands that came."""
    path, commands = folder / "agent", list[str]()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            client, _ = listener.accept()
            with client, client.makefile("rb") as lines:
                client.sendall(greeting)
                for line in lines:
                    message = json.loads(line)
                    commands.append(message["execute"])
                    try:
                        client.sendall(answer(message))
                    except (BrokenPipeError, ConnectionResetError):
                        return

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield path, commands
        finally:
            thread.join(10)
            path.unlink()
    assert not thread.is_alive()


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "ANSWERS_WITHIN_S", 0.2)
    monkeypatch.setattr(agent, "THAWS_WITHIN_S", 0.2)


def test_a_guest_is_frozen_for_as_long_as_it_takes(tmp_path: Path) -> None:
    stale = b'{"return": 17}\n\xff{"return": {}}\n'
    with serving(tmp_path, well, greeting=stale) as (path, commands):
        with frozen(path) as stopped:
            assert stopped
            assert commands[-1] == "guest-fsfreeze-freeze"
        assert commands[-1] == "guest-fsfreeze-thaw"


def test_a_guest_is_thawed_when_what_it_was_frozen_for_fails(tmp_path: Path) -> None:
    with serving(tmp_path, well) as (path, commands):
        with pytest.raises(ZeroDivisionError), frozen(path):
            raise ZeroDivisionError
        assert commands[-1] == "guest-fsfreeze-thaw"


def test_an_agent_that_is_not_there_or_does_not_answer_freezes_nothing(tmp_path: Path) -> None:
    with frozen(tmp_path / "nobody") as stopped:
        assert not stopped
    with serving(tmp_path, lambda _: b"") as (path, commands), frozen(path) as stopped:
        assert not stopped
        assert commands == ["guest-sync"]


NONSENSE = {
    "nothing": b"",
    "a list": b"[]",
    "no JSON": b"x",
    "a word for a count": b'{"return": "many"}',
    "a count for a reason": b'{"error": 3}',
    "a deep nest": b"[" * 100_000,
}


@pytest.mark.parametrize("nonsense", NONSENSE.values(), ids=NONSENSE.keys())
def test_an_agent_that_talks_nonsense_freezes_nothing(tmp_path: Path, nonsense: bytes) -> None:
    def answer(message: dict[str, Any]) -> bytes:
        return nonsense + b"\n" if message["execute"] == "guest-fsfreeze-freeze" else well(message)

    with serving(tmp_path, answer) as (path, commands):
        with frozen(path) as stopped:
            assert not stopped
        assert commands[-1] == "guest-fsfreeze-thaw"


def test_an_agent_that_never_stops_talking_freezes_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, lambda _: b'{"return": 0}\n' * 300_000) as (path, _), frozen(path) as stopped:
        assert not stopped


def test_an_agent_that_refuses_to_freeze_is_told_to_thaw_all_the_same(tmp_path: Path) -> None:
    def answer(message: dict[str, Any]) -> bytes:
        return refusal() if message["execute"] == "guest-fsfreeze-freeze" else well(message)

    with serving(tmp_path, answer) as (path, commands):
        with frozen(path) as stopped:
            assert not stopped
        assert commands[-1] == "guest-fsfreeze-thaw"


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next_one(tmp_path: Path) -> None:
    late = b""

    def answer(message: dict[str, Any]) -> bytes:
        nonlocal late
        if message["execute"] == "guest-fsfreeze-freeze":
            late = well(message)
            return b""
        said, late = late + well(message), b""
        return said

    with serving(tmp_path, answer) as (path, commands):
        with frozen(path) as stopped:
            assert not stopped
        assert commands[-1] == "guest-fsfreeze-thaw"


def test_a_guest_that_may_be_left_frozen_is_an_error(tmp_path: Path) -> None:
    def answer(message: dict[str, Any]) -> bytes:
        return refusal() if message["execute"] == "guest-fsfreeze-thaw" else well(message)

    def freeze(path: Path) -> None:
        with frozen(path):
            pass

    with serving(tmp_path, answer) as (path, _):
        error = error_of(lambda: freeze(path))
    assert error.code is ErrorCode.SOURCE_UNREADABLE
    assert "guest-fsfreeze-thaw" in error.message
