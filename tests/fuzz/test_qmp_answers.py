"""Whatever a QMP server answers, opening its disks ends with a plain error; a QEMU may be in its guest's hands."""

from __future__ import annotations

import json
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast import ErrorCode, VolumeSpec
from holdfast.sources import BackupRun
from holdfast.sources.qmp import monitor, open_qmp
from tests.client.rig import error_of

GREETING = b'{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": []}}\n'
HONEST: dict[str, Any] = {
    "qmp_capabilities": {},
    "query-block-exports": [],
    "query-jobs": [],
    "query-status": {"status": "running"},
    "query-version": {"qemu": {"major": 7, "minor": 2, "micro": 0}},
    "query-iothreads": [{"id": "io"}],
    "query-block": [
        {"device": "disk", "qdev": "/machine/disk", "inserted": {"node-name": "n", "image": {"virtual-size": 65536}}}
    ],
    "query-named-block-nodes": [{"node-name": "n", "dirty-bitmaps": [{"name": "holdfast-p", "recording": False}]}],
    "qom-list": [{"name": "parent_bus"}],
    "qom-get": "/machine/disk/x",
}

words = st.sampled_from([*HONEST, "disk", "n", "holdfast-p", "holdfast-", "inserted", "image", "node-name", "id", ""])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=4),
    max_leaves=8,
)


@contextmanager
def serving(answer: Callable[[str], bytes]) -> Iterator[Path]:
    """Serve one client as QEMU's monitor."""
    with tempfile.TemporaryDirectory(prefix="holdfast-qmp-") as folder, socket.socket(socket.AF_UNIX) as listener:
        path = Path(folder) / "qmp"
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                try:
                    client.sendall(GREETING)
                    # A client sends one command at a time and, as QMP has it, without an end of line.
                    while message := client.recv(65536):
                        client.sendall(answer(message.decode()))
                except OSError:
                    return

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield path
        finally:
            thread.join()


def must_fail_plainly(answer: Callable[[str], bytes]) -> None:
    """Open a disk of the server, which must be refused with a plain error."""
    with serving(answer) as path:
        specs = {"root": VolumeSpec(f"qmp:{path}?device=disk")}
        error = error_of(lambda: open_qmp(specs, BackupRun("vm", "snap-a", "p")))
    assert error.code is ErrorCode.SOURCE_UNREADABLE


@pytest.fixture(autouse=True, scope="module")
def _short_waits() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setattr(monitor, "ANSWERS_WITHIN_S", 0.05)
    patch.setattr(monitor, "GREETS_WITHIN_S", 0.5)
    yield
    patch.undo()


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to each value in a tree of lists and dictionaries."""
    yield path
    for step in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield from places(tree[step], (*path, step))


def replaced(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return the tree with another value at a place."""
    if not path:
        return value
    copy = tree.copy()
    copy[path[0]] = replaced(tree[path[0]], path[1:], value)
    return copy


@settings(max_examples=40)
@given(st.sampled_from([place for place in places(HONEST) if place]), values)
def test_answers_of_any_form_are_plain_errors(place: tuple[Any, ...], value: Any) -> None:
    told = replaced(HONEST, place, value)

    def answer(line: str) -> bytes:
        message = json.loads(line)
        return json.dumps({"return": told.get(message["execute"]), "id": message.get("id")}).encode() + b"\n"

    must_fail_plainly(answer)


@settings(max_examples=10)
@given(st.binary(max_size=60), st.integers(0, 4))
def test_lines_of_any_kind_are_plain_errors(noise: bytes, number: int) -> None:
    count = iter(range(1000))

    def answer(line: str) -> bytes:
        if next(count) >= number:
            return noise + b"\n"
        message = json.loads(line)
        return json.dumps({"return": HONEST.get(message["execute"]), "id": message.get("id")}).encode() + b"\n"

    must_fail_plainly(answer)
